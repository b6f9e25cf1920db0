"""From replies to the tokens that a reward model reads, and from its scores back to those that were asked about."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.policy.chat import encode
from actors.reward_model.align import sums_over, values_at
from protocols.errors import BadInput
from protocols.messages import Prompt
from protocols.reward_model import Reply

Spans = list[tuple[int, int]]


class Unreadable(BadInput):
    """There is nothing to score; `reason` says why in a few words."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Read:
    """A prompt and a reply in the model's own tokens, int32[P + S]; P are the prompt's."""

    uid: str
    tokens: NDArray[np.int32]
    prompt: int
    truncated: bool
    spans: Spans | None
    """Characters of the text that each of the reply's S tokens covers, where the model split it itself."""
    wanted: Spans | None
    """The same of the tokens that scores are asked for, if they are not the model's."""

    @property
    def reply_tokens(self) -> NDArray[np.int32]:
        """The reply's own, int32[S]."""
        return self.tokens[self.prompt :]


class PromptReader:
    """Encodes prompts; replies to the same one often follow each other."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._last: tuple[Prompt, NDArray[np.int32]] | None = None

    def encode(self, prompt: Prompt) -> NDArray[np.int32]:
        """Token ids, int32[P]."""
        if self._last is None or self._last[0] != prompt:
            self._last = prompt, encode(prompt, self.tokenizer)
        return self._last[1]


def read(reply: Reply, prompts: PromptReader, limit: int) -> Read:
    """Bring a reply to the model's tokens; what exceeds `limit` is cut off its end.

    Raises Unreadable for a reply without tokens, and for a prompt that leaves no room for it.
    """
    prompt = prompts.encode(reply.prompt)
    spans: Spans | None = None
    if reply.tokens is not None:
        own = reply.tokens.array
    else:
        own, spans = _split(reply, prompts.tokenizer)
    if not len(own):
        raise Unreadable(f"reply {reply.uid!r}: expected at least one token, got none", "empty reply")
    room = limit - len(prompt)
    if room < 1:
        raise Unreadable(
            f"reply {reply.uid!r}: its prompt has {len(prompt)} tokens, {limit} leave no room for the reply",
            "no room after the prompt",
        )
    wanted = _spans_of(reply) if reply.ends is not None else None
    kept = np.asarray(own[:room], np.int32)
    return Read(
        reply.uid,
        np.concatenate([prompt, kept]),
        len(prompt),
        len(own) > room,
        spans[:room] if spans is not None else None,
        wanted,
    )


def _split(reply: Reply, tokenizer: Any) -> tuple[NDArray[np.int32], Spans]:
    """Tokens of the text, and which characters each covers; an end token covers none."""
    if not tokenizer.is_fast:
        raise BadInput("model: its tokenizer does not say where tokens are in the text; expected a fast tokenizer")
    # What wraps it takes ten times as long, mostly to find out that nothing is to be cut or padded.
    found = tokenizer.backend_tokenizer.encode(reply.text, add_special_tokens=False)
    ids, spans = list(found.ids), list(found.offsets)
    if reply.ended and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        spans.append((len(reply.text), len(reply.text)))
    return np.asarray(ids, np.int32), spans


def _spans_of(reply: Reply) -> Spans:
    assert reply.ends is not None
    ends = reply.ends.array
    starts = np.concatenate([[0], ends[:-1]])
    if not len(ends) or (ends < starts).any() or ends[-1] > len(reply.text):
        raise BadInput(
            f"reply {reply.uid!r}: ends: expected one place per token, rising from 0 to at most {len(reply.text)},"
            f" the length of the text"
        )
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def brought_back(one: Read, scores_S: NDArray[np.float64], *, adds_up: bool) -> NDArray[np.float64]:
    """Scores of the model's tokens as scores of the tokens that were asked about, float64[T].

    `adds_up`: they are shares of a sum, as log-ratios are, rather than values.
    """
    if one.wanted is None or one.spans is None:
        return scores_S
    return (sums_over if adds_up else values_at)(one.wanted, one.spans, scores_S)


def own_ends(one: Read) -> NDArray[np.int32] | None:
    """Where the scored tokens end in the text, if the model split it."""
    if one.spans is None or one.wanted is not None:
        return None
    return np.asarray([end for _, end in one.spans], np.int32)
