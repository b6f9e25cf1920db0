"""From prompts to tokens."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import BadInput
from protocols.messages import Prompt


def encode(prompt: Prompt, tokenizer: Any) -> NDArray[np.int32]:
    """Token ids of a prompt, int32[T]; a conversation ends with the assistant's turn opened.

    A tokenizer without a chat template gets the turns joined by newlines. Raises BadInput for an empty prompt.
    """
    if prompt.tokens is not None:
        ids = prompt.tokens.array
    elif prompt.text is not None:
        ids = tokenizer(prompt.text)["input_ids"]
    elif tokenizer.chat_template:
        turns = [turn.model_dump() for turn in prompt.messages]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer("\n".join(turn.content for turn in prompt.messages))["input_ids"]
    array = np.asarray(ids, dtype=np.int32)
    if not array.size:
        raise BadInput(f"prompt {prompt.uid!r}: expected at least one token, got none")
    return array


class TextTail:
    """Turns tokens into text as they come, holding back characters that are still incomplete."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that the token adds; empty while it only begins a character."""
        self._tokens.append(token)
        before = self._decode(self._start, self._shown)
        now = self._decode(self._start, len(self._tokens))
        if now.endswith("�"):
            return ""
        # Decoding from a little before the new token keeps the blanks that decoders put between tokens.
        self._start, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)
        return text
