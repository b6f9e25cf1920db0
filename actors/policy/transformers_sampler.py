"""Batched sampling with a transformers model.

A prompt is encoded once for all its samples, finished rows leave the batch, and the log-probs under which
a token was drawn are kept. One call is one batch, cut only by size: the same call gives the same bits
whatever else goes on around it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache

from actors.policy.cache import join_caches, new_cache, select_rows
from actors.policy.choose import Uniforms, next_tokens
from actors.policy.loading import Loaded
from actors.policy.microbatch import by_length, pad_left
from actors.policy.rows import EncodedPrompt, OnToken, Row, new_rows
from protocols.messages import Completion, SamplingParams
from protocols.policy import SamplerConfig

PREFILL_TOKENS = 16384
# Dropping rows copies the cache, so it waits until this share of them is done.
DROP_SHARE = 1 / 8


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
        """n completions per prompt. When `cancelled` turns true, unfinished rows end as ABORTED.

        Raises Corrupt when the model's logits are not numbers.
        """
        rows = new_rows(prompts, n, params, self._loaded, text=on_token is not None)
        lengths = [len(prompt.tokens) + rows[p * n].room for p, prompt in enumerate(prompts)]
        for batch in self._batches(rows, lengths, n):
            if not cancelled():
                self._decode(prompts, batch, params, version, on_token, cancelled)
        tokenizer = self._loaded.tokenizer
        return [[row.completion(tokenizer) for row in rows[p * n : p * n + n]] for p in range(len(prompts))]

    def _batches(self, rows: list[Row], lengths: list[int], n: int) -> Iterator[list[Row]]:
        """Rows that are decoded side by side: within the row and the cache limit, similar lengths together."""
        config = self._config
        at_once = max(1, config.max_batch_rows // n)
        for group in by_length(lengths, max(1, config.max_batch_tokens // n)):
            for i in range(0, len(group), at_once):
                chosen = [row for p in group[i : i + at_once] for row in rows[p * n : p * n + n]]
                # One prompt may have too many samples by itself; then it is encoded again for each part.
                most = max(1, min(config.max_batch_rows, config.max_batch_tokens // lengths[group[i]]))
                yield from (chosen[j : j + most] for j in range(0, len(chosen), most))

    @torch.inference_mode()
    def _decode(
        self,
        prompts: Sequence[EncodedPrompt],
        rows: list[Row],
        params: SamplingParams,
        version: int,
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
            self._grow(rows, tokens_R.tolist(), logprobs_R.tolist(), version, stops, on_token)
            alive = np.flatnonzero([row.finish is None for row in rows])
            if not alive.size or cancelled():
                return
            if len(rows) - alive.size >= max(1, DROP_SHARE * len(rows)):
                rows = [rows[i] for i in alive]
                uniforms.select(alive)
                tokens_R = tokens_R[torch.from_numpy(alive).to(device)]
                batch.select(alive)
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
        return DecodeBatch(cache, logits, np.asarray([lengths[i] for i in place]), self._loaded.context_length)

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
        version: int,
        stops: set[int],
        on_token: OnToken | None,
    ) -> None:
        """Append one token to every unfinished row."""
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if row.finish is None:
                text = row.grow(token, logprob, version, stops)
                self.decoded_tokens += 1
                if on_token:
                    on_token(row, text)


@dataclass
class DecodeBatch:
    """The rows that are being decoded: their cache, next-token logits and numbers of tokens."""

    cache: Cache
    logits_RV: torch.Tensor
    lengths_R: NDArray[np.int64]
    context_length: int

    def select(self, rows: NDArray[np.int64]) -> None:
        """Keep the given rows."""
        select_rows(self.cache, torch.from_numpy(rows).to(self.logits_RV.device))
        self.lengths_R = self.lengths_R[rows]

    def advance(self, model: Any, tokens_R: torch.Tensor) -> None:
        """Feed one token per row and hold the logits of the next."""
        width = self.cache.get_seq_length() + 1
        self.lengths_R = self.lengths_R + 1
        lengths_R1 = torch.from_numpy(self.lengths_R).to(tokens_R.device).unsqueeze(-1)
        inputs: dict[str, torch.Tensor] = {}
        if self.lengths_R.min() < width:
            columns = torch.arange(width, device=tokens_R.device)
            inputs["attention_mask"] = (columns[None, :] >= width - lengths_R1).long()
        output = model(
            input_ids=tokens_R.unsqueeze(-1),
            # A finished row may grow past the last position until it is dropped; nobody reads it.
            position_ids=(lengths_R1 - 1).clamp(max=self.context_length - 1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        self.logits_RV = output.logits[:, -1].float()
