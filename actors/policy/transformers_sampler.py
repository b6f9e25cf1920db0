"""Batched sampling with a transformers model.

A prompt is encoded once for all its samples, finished rows leave the batch, and the log-probs under which
a token was drawn are kept. One call is one batch, cut only by size: the same call gives the same bits
whatever else goes on around it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache

from actors.policy.cache import join_caches, new_cache, select_rows
from actors.policy.chat import TextTail
from actors.policy.choose import Uniforms, next_tokens
from actors.policy.loading import Loaded
from actors.policy.microbatch import by_length, pad_left
from protocols.messages import Completion, FinishReason, SamplingParams
from protocols.policy import SamplerConfig

PREFILL_TOKENS = 16384
# Dropping rows copies the cache, so it waits until this share of them is done.
DROP_SHARE = 1 / 8


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for the model: token ids int32[T] and the seed of its samples."""

    tokens: NDArray[np.int32]
    seed: int


@dataclass
class Row:
    """One completion while it grows."""

    prompt: int
    sample: int
    room: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    tail: TextTail | None = None
    finish: FinishReason | None = None


OnToken = Callable[[Row, str], None]
"""Called with a row that has just grown, and the text that it grew by."""


class TransformersSampler:
    """Samples from a model that it shares with whoever trains it."""

    def __init__(self, loaded: Loaded, config: SamplerConfig) -> None:
        self._loaded = loaded
        self._config = config
        self.decoded_tokens = 0

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        params: SamplingParams,
        version: int,
        *,
        on_token: OnToken | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion]]:
        """n completions per prompt. When `cancelled` turns true, unfinished rows end as ABORTED."""
        context = self._loaded.context_length
        rooms = [min(params.max_tokens, context - len(prompt.tokens)) for prompt in prompts]
        rows = [Row(p, i, rooms[p]) for p in range(len(prompts)) for i in range(n)]
        if on_token or params.stop:
            for row in rows:
                row.tail = TextTail(self._loaded.tokenizer)
        for group in self._groups(prompts, rooms, n):
            chosen = [rows[p * n + i] for p in group for i in range(n)]
            self._decode_group(prompts, chosen, params, on_token, cancelled)
        return [[self._completion(row, version) for row in rows[p * n : p * n + n]] for p in range(len(prompts))]

    def _groups(self, prompts: Sequence[EncodedPrompt], rooms: list[int], n: int) -> list[list[int]]:
        """Prompts that are decoded side by side: within the row and the cache limit, similar lengths together."""
        config = self._config
        lengths = [len(prompt.tokens) + room for prompt, room in zip(prompts, rooms, strict=True)]
        groups = by_length(lengths, max(1, config.max_batch_tokens // n))
        most = max(1, config.max_batch_rows // n)
        return [group[i : i + most] for group in groups for i in range(0, len(group), most)]

    @torch.inference_mode()
    def _decode_group(
        self,
        prompts: Sequence[EncodedPrompt],
        rows: list[Row],
        params: SamplingParams,
        on_token: OnToken | None,
        cancelled: Callable[[], bool],
    ) -> None:
        """Decode rows together until all are finished."""
        device = self._loaded.model.device
        batch = self._prefill(prompts, rows)
        uniforms = Uniforms([(prompts[row.prompt].seed, row.sample) for row in rows])
        stops = {*self._loaded.eos_token_ids, *params.stop_token_ids}
        while True:
            drawn = torch.from_numpy(np.ascontiguousarray(uniforms.next())).to(device)
            tokens_R, logprobs_R = next_tokens(batch.logits_RV, drawn, params)
            self._grow(rows, tokens_R.tolist(), logprobs_R.tolist(), stops, params, on_token)
            if cancelled():
                for row in rows:
                    row.finish = row.finish or FinishReason.ABORTED
            alive = np.flatnonzero([row.finish is None for row in rows])
            if not alive.size:
                return
            if len(rows) - alive.size >= max(1, DROP_SHARE * len(rows)):
                rows = [rows[i] for i in alive]
                uniforms.select(alive)
                index = torch.from_numpy(alive).to(device)
                batch.select(index)
                tokens_R = tokens_R[index]
            batch.advance(self._loaded.model, tokens_R)

    def _prefill(self, prompts: Sequence[EncodedPrompt], rows: list[Row]) -> "DecodeBatch":
        """Encode each distinct prompt once and spread its cache over its rows."""
        distinct: dict[bytes, int] = {}
        place = [distinct.setdefault(prompts[row.prompt].tokens.tobytes(), len(distinct)) for row in rows]
        tokens = [np.frombuffer(key, dtype=np.int32) for key in distinct]
        lengths = [len(ids) for ids in tokens]
        groups = by_length(lengths, PREFILL_TOKENS)
        parts = [self._encode([tokens[i] for i in group]) for group in groups]
        order = np.argsort(np.concatenate([np.asarray(group) for group in groups]))
        device = self._loaded.model.device
        index = torch.from_numpy(order[place]).to(device)
        cache = join_caches([cache for cache, _ in parts])
        select_rows(cache, index)
        logits = torch.cat([logits for _, logits in parts])[index]
        return DecodeBatch(cache, logits, torch.tensor([lengths[i] for i in place], device=device))

    def _encode(self, tokens: list[NDArray[np.int32]]) -> tuple[Cache, torch.Tensor]:
        """Cache and next-token logits float32[P, V] of prompts, padded on the left."""
        device = self._loaded.model.device
        lengths = np.asarray([len(ids) for ids in tokens])
        tokens_PT = pad_left(tokens).astype(np.int64)
        width = tokens_PT.shape[1]
        inputs: dict[str, torch.Tensor] = {}
        if lengths.min() < width:
            mask = np.arange(width)[None, :] >= width - lengths[:, None]
            positions = np.maximum(np.arange(width)[None, :] - (width - lengths[:, None]), 0)
            inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64)).to(device)
            inputs["position_ids"] = torch.from_numpy(positions).to(device)
        cache = new_cache()
        ids = torch.from_numpy(tokens_PT).to(device)
        output = self._loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
        return cache, output.logits[:, -1].float()

    def _grow(
        self,
        rows: list[Row],
        tokens: list[int],
        logprobs: list[float],
        stops: set[int],
        params: SamplingParams,
        on_token: OnToken | None,
    ) -> None:
        """Append one token to every unfinished row and see whether that ends it."""
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if row.finish is not None:
                continue
            self.decoded_tokens += 1
            row.tokens.append(token)
            row.logprobs.append(logprob)
            added = row.tail.push(token) if row.tail else ""
            row.text += added
            if token in stops:
                row.finish = FinishReason.STOP
            elif any(stop in row.text for stop in params.stop):
                row.finish = FinishReason.STOP_TEXT
                row.text = row.text[: min(row.text.find(stop) for stop in params.stop if stop in row.text)]
            elif len(row.tokens) >= row.room:
                row.finish = FinishReason.LENGTH
            if on_token:
                on_token(row, added)

    def _completion(self, row: Row, version: int) -> Completion:
        assert row.finish is not None
        text = row.text
        if row.finish is not FinishReason.STOP_TEXT:
            text = self._loaded.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return Completion(
            tokens=np.asarray(row.tokens, np.int32),
            text=text,
            logprobs=np.asarray(row.logprobs, np.float32),
            versions=np.full(len(row.tokens), version, np.int32),
            finish_reason=row.finish,
        )


@dataclass
class DecodeBatch:
    """The rows that are being decoded: their cache, next-token logits and prompt lengths."""

    cache: Cache
    logits_RV: torch.Tensor
    lengths_R: torch.Tensor

    def select(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        select_rows(self.cache, rows)
        self.lengths_R = self.lengths_R[rows]

    def advance(self, model: Any, tokens_R: torch.Tensor) -> None:
        """Feed one token per row and hold the logits of the next."""
        width = self.cache.get_seq_length() + 1
        inputs: dict[str, torch.Tensor] = {}
        self.lengths_R = self.lengths_R + 1
        if int(self.lengths_R.min()) < width:
            columns = torch.arange(width, device=tokens_R.device)
            inputs["attention_mask"] = (columns[None, :] >= width - self.lengths_R[:, None]).long()
        output = model(
            input_ids=tokens_R.unsqueeze(-1),
            position_ids=(self.lengths_R - 1).unsqueeze(-1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        self.logits_RV = output.logits[:, -1].float()
