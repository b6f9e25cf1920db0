"""Completions while they grow, whichever engine draws their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.policy.chat import TextTail
from actors.policy.loading import Loaded
from protocols.errors import Corrupt
from protocols.messages import Completion, FinishReason, SamplingParams
from protocols.policy import SampleDelta
from protocols.tensor import Tensor


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
    tail: TextTail | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: FinishReason | None = None

    def grow(self, token: int, logprob: float, version: int, stops: set[int]) -> str:
        """Append one token and see whether that ends the row. Returns the new text, if somebody wants text."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        text = self.tail.push(token) if self.tail else ""
        if token in stops:
            self.finish = FinishReason.STOP
        elif self.tail and self.tail.stopped:
            self.finish = FinishReason.STOP_TEXT
        elif len(self.tokens) >= self.room:
            self.finish = FinishReason.LENGTH
        return text + self.tail.finish() if self.tail and self.finish else text

    def delta(self, text: str) -> SampleDelta:
        """The token that the row has just grown by."""
        return SampleDelta(
            prompt_index=self.prompt,
            sample_index=self.sample,
            tokens=Tensor([self.tokens[-1]], "int32"),
            text=text,
            logprobs=Tensor([self.logprobs[-1]], "float32"),
            versions=Tensor([self.versions[-1]], "int32"),
            finish_reason=self.finish,
        )

    def completion(self, tokenizer: Any) -> Completion:
        """What became of the row; unfinished, it was aborted. Raises Corrupt when log-probs are not numbers."""
        logprobs = np.asarray(self.logprobs, np.float32)
        if np.isnan(logprobs).any():
            raise Corrupt(f"the model's logits at weight version {self.versions[-1]} are not numbers")
        text = self.tail.text if self.tail else ""
        if self.finish is not FinishReason.STOP_TEXT:
            text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        return Completion(
            tokens=np.asarray(self.tokens, np.int32),
            text=text,
            logprobs=logprobs,
            versions=np.asarray(self.versions, np.int32),
            finish_reason=self.finish or FinishReason.ABORTED,
        )


OnToken = Callable[[Row, str], None]
"""Called with a row that has just grown, and the text that it grew by."""


def new_rows(
    prompts: Sequence[EncodedPrompt], n: int, params: SamplingParams, loaded: Loaded, *, text: bool
) -> list[Row]:
    """n empty rows per prompt, the prompts in turn. `text`: follow the text token by token."""
    rooms = [min(params.max_tokens, loaded.context_length - len(prompt.tokens)) for prompt in prompts]
    rows = [Row(p, i, rooms[p]) for p in range(len(prompts)) for i in range(n)]
    if text or params.stop:
        for row in rows:
            row.tail = TextTail(loaded.tokenizer, params.stop)
    return rows
