"""From prompts to tokens, and from tokens to text."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import BadInput
from protocols.messages import ChatMessage, Prompt


def encode(prompt: Prompt, tokenizer: Any, *, continues: bool = False) -> NDArray[np.int32]:
    """Token ids of a prompt, int32[T]; a conversation ends with the assistant's turn opened.

    A text that `continues` something gets no special tokens around it.

    A tokenizer without a chat template gets the turns joined by newlines. Raises BadInput for an empty prompt.
    """
    if prompt.tokens is not None:
        ids = prompt.tokens.array
    elif prompt.text is not None:
        ids = tokenizer(prompt.text, add_special_tokens=not continues)["input_ids"]
    elif tokenizer.chat_template:
        turns = [turn.model_dump() for turn in prompt.messages]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer("\n".join(turn.content for turn in prompt.messages))["input_ids"]
    array = np.asarray(ids, dtype=np.int32)
    if not array.size:
        raise BadInput(f"prompt {prompt.uid!r}: expected at least one token, got none")
    return array


def spoken(messages: Sequence[ChatMessage]) -> str:
    """A conversation as text: what the user said, or each turn under its speaker's name."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in messages)


def ends_of(tokens: NDArray[np.int32], tokenizer: Any) -> NDArray[np.int32]:
    """Where each token ends in the text of all, special ones left out, in characters: int32[T].

    A token that only begins a character ends where that begins.
    """
    tail = TextTail(tokenizer)
    ends = []
    for token in tokens.tolist():
        tail.push(token)
        ends.append(len(tail.text))
    tail.finish()
    if ends:
        ends[-1] = len(tail.text)
    return np.asarray(ends, np.int32)


def vocabulary_digest(tokenizer: Any) -> str:
    """Names a vocabulary: which token has which number."""
    numbered = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(numbered).encode()).hexdigest()[:16]


class TextTail:
    """Turns tokens into text as they come, up to the first stop text.

    What may still change is held back: incomplete characters, and what may be the beginning of a stop text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        # Tokens from `_start` on are decoded together; `_seen` characters of that are in `text` already.
        self._start = self._seen = self._decoded = 0
        self._given = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that the token adds; empty while it only begins a character or a stop text."""
        self._tokens.append(token)
        self._extend(self._next_characters())
        return self._give(len(self.text) if self.stopped else len(self.text) - self._doubtful())

    def finish(self) -> str:
        """The text that was held back, when no token follows."""
        if not self.stopped:
            self._extend(self._decode(self._start, len(self._tokens))[self._seen :])
        return self._give(len(self.text))

    def _next_characters(self) -> str:
        window = self._decode(self._start, len(self._tokens))
        # Not only the last sign: some decoders write one per byte of an incomplete character.
        whole = window.rstrip("\N{REPLACEMENT CHARACTER}")
        added = whole[self._seen :]
        self._seen += len(added)
        if added and whole == window:
            # Decoding from a little before the next token keeps the blanks that decoders put between tokens.
            self._start, self._decoded = self._decoded, len(self._tokens)
            self._seen = len(self._decode(self._start, self._decoded))
        return added

    def _extend(self, added: str) -> None:
        """Append characters and cut before the first stop text that they complete."""
        before = len(self.text)
        self.text += added
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        cuts = [place for place in found if place >= 0]
        if cuts:
            self.text, self.stopped = self.text[: min(cuts)], True

    def _doubtful(self) -> int:
        """Length of the longest end of the text that begins a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0

    def _give(self, end: int) -> str:
        given, self._given = self.text[self._given : end], max(self._given, end)
        return given

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)
        return text
