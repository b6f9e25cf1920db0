"""The lookup chain: a generated world in which the credit of every token is known (Q-RM specification, section 5.1).

A prompt is K digits, a reply K digits and the end token. At a few decisive positions the right digit is the image of
the prompt's digit under a permutation that the world draws once; the other positions are filler. A reply is right
if all decisive digits are, so that a few tokens of it earn its whole reward. Some digits are hard: the teacher, and
the base model that learns from it, get their images wrong more often than not.
"""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cluster.seeds import derive_seed
from protocols.errors import BadInput
from protocols.service import Message

DIGITS = "0123456789"
# Longer than a digit, so that a reply in which it stands for one is not as long as a right one.
SEPARATOR = "=>"
PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
LONGEST = 256
WILDCARD = "?"

Digits = NDArray[np.int64]
"""Digits of prompts or replies, int64[B, K]."""


class ChainConfig(Message):
    """The generated world with known credit, and how its base model is made."""

    length: int = Field(default=12, ge=1, le=LONGEST)
    """Digits of a prompt and of a reply, K."""
    decisive: int = Field(default=4, ge=1)
    """Positions whose digit decides whether a reply is right, 1 to K."""
    hard_digits: int = Field(default=3, ge=0, le=len(DIGITS))
    """Digits of the ten that the teacher often maps wrongly."""
    hard_error: tuple[float, float] = (0.5, 0.75)
    """Lowest and highest probability of a wrong image of a hard digit; each digit has its own."""
    easy_error: tuple[float, float] = (0.03, 0.05)
    """The same of the other digits."""
    base_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps that make the base model; null: what its length takes."""
    base_rows: int = Field(default=128, ge=1)
    """The teacher's replies per step."""
    base_rate: float = Field(default=6e-3, gt=0)
    """Peak learning rate; after warm-up it falls linearly to 0."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.decisive > self.length:
            raise ValueError(f"decisive: got {self.decisive}, expected 1 to length={self.length}")
        for name in ("hard_error", "easy_error"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name}: got ({low}, {high}), expected 0 <= lowest <= highest <= 1")
        return self


class ChainWorld:
    """What is right, how the teacher errs, and which token is to blame."""

    def __init__(self, config: ChainConfig, seed: int) -> None:
        self.config = config
        self.permutation = [int(image) for image in _rng(seed, "permutation").permutation(len(DIGITS))]
        """The right digit for each digit of a prompt."""
        places = _rng(seed, "positions").permutation(config.length)
        self.positions = sorted(int(at) for at in places[: config.decisive])
        """The decisive positions."""
        self.errors = _errors(config, _rng(seed, "errors"))
        """Probability that the teacher gets the image of each digit wrong."""

    @cached_property
    def _images(self) -> Digits:
        return np.asarray(self.permutation)

    @property
    def teacher_accuracy(self) -> float:
        """Share of the teacher's replies that are right; decisive digits are independent and uniform."""
        return float(1 - np.mean(self.errors)) ** self.config.decisive

    def draw(self, rng: np.random.Generator, count: int) -> Digits:
        """Uniform digits of prompts."""
        return rng.integers(len(DIGITS), size=(count, self.config.length))

    def answer(self, rng: np.random.Generator, prompts_BK: Digits) -> Digits:
        """The teacher's replies: noisy images at decisive positions, uniform digits at the others."""
        replies_BK = self.draw(rng, len(prompts_BK))
        asked_BD = prompts_BK[:, self.positions]
        wrong_BD = rng.random(asked_BD.shape) < np.asarray(self.errors)[asked_BD]
        # A shift by 1 to 9 makes each of the nine other digits equally likely.
        shift_BD = np.where(wrong_BD, rng.integers(1, len(DIGITS), size=asked_BD.shape), 0)
        replies_BK[:, self.positions] = (self._images[asked_BD] + shift_BD) % len(DIGITS)
        return replies_BK

    def prompts(self, rng: np.random.Generator, count: int) -> list[str]:
        """Prompts as the policy reads them: K digits and the separator."""
        return [_text(digits_K) + SEPARATOR for digits_K in self.draw(rng, count)]

    def teacher(self, rng: np.random.Generator, prompt: str) -> str:
        """A noisy reply of K digits."""
        return _text(self.answer(rng, self._digits(prompt)[None])[0])

    def reference(self, prompt: str) -> str:
        """The right digit at decisive positions, `?` at the others: K characters."""
        right_K = self._images[self._digits(prompt)].tolist()
        return "".join(str(right_K[at]) if at in self.positions else WILDCARD for at in range(self.config.length))

    def is_right(self, prompt: str, reply: str) -> bool:
        """Whether a reply has K digits and all decisive ones are right.

        A policy that may write K + 1 tokens has then also ended it, or it would be longer.
        """
        whole = len(reply) == self.config.length and set(reply) <= set(DIGITS)
        return whole and self.first_error(prompt, reply) is None

    def first_error(self, prompt: str, reply: str) -> int | None:
        """Which token of a reply is the first wrong one at a decisive position; None if none of those it has is."""
        reference, tokens = self.reference(prompt), _tokens(reply)
        return next((at for at in self.positions if at < len(tokens) and tokens[at] != reference[at]), None)

    def decisive_credit(self, prompt: str, reply: str, length: int | None = None) -> NDArray[np.float64]:
        """What each token of a reply did for its outcome at the decisive positions, float64[T].

        +1 for a right digit at a decisive position while all before it are right, -1 for the first wrong one, 0 at
        fillers, after the first error, and at the end token. `length`: T, the tokens of the reply, its end token
        among them; unset, those of its text.
        """
        tokens, error = _tokens(reply), self.first_error(prompt, reply)
        credit_T = np.zeros(len(tokens) if length is None else length)
        until = len(tokens) if error is None else error
        credit_T[[at for at in self.positions if at < min(until, len(credit_T))]] = 1
        if error is not None and error < len(credit_T):
            credit_T[error] = -1
        return credit_T

    def exact_credit(self, prompt: str, reply: str, length: int | None = None) -> NDArray[np.float64]:
        """What each token of a reply did for its outcome, float64[T]: the ceiling for any learnt credit.

        As `decisive_credit`; and of replies that are right so far -1 for a token that is no digit, an end before the
        last digit, or a token after it. Without that a policy learns to end before it can err.
        """
        tokens, credit_T = _tokens(reply), self.decisive_credit(prompt, reply, length)
        strange = [at for at, token in enumerate(tokens) if token not in DIGITS]
        end = min(len(tokens), self.config.length)
        # At `end` stands the end token, which is right after the last digit alone, or a token too many.
        wrong = [*strange, end] if end < self.config.length or len(tokens) > end else strange
        lost = min(wrong, default=len(credit_T))
        if lost < len(credit_T) and not (credit_T[:lost] == -1).any():
            credit_T[lost:] = 0
            credit_T[lost] = -1
        return credit_T

    def _digits(self, prompt: str) -> Digits:
        """The digits of a prompt, int64[K]. Raises BadInput for a text that is no prompt of this world."""
        digits, length = prompt.removesuffix(SEPARATOR), self.config.length
        if len(digits) != length or not set(digits) <= set(DIGITS):
            raise BadInput(f"prompt: got {prompt[:300]!r}, expected {length} digits and {SEPARATOR!r}")
        return np.asarray([int(digit) for digit in digits])


def _rng(seed: int, name: str) -> np.random.Generator:
    """One generator per purpose: worlds of different lengths differ in nothing else."""
    return np.random.default_rng(derive_seed(seed, "chain", name))


def _errors(config: ChainConfig, rng: np.random.Generator) -> list[float]:
    """The teacher's error of each digit; which ones are hard is drawn too."""
    order, hard = rng.permutation(len(DIGITS)), config.hard_digits
    errors = np.empty(len(DIGITS))
    for digits, (low, high) in ((order[:hard], config.hard_error), (order[hard:], config.easy_error)):
        # One from each of equal parts of the range, so that worlds of all seeds are about as hard.
        parts = (np.arange(len(digits)) + rng.random(len(digits))) / max(1, len(digits))
        errors[digits] = low + (high - low) * parts
    return [float(error) for error in errors]


def _text(digits_K: Digits) -> str:
    return "".join(map(str, digits_K.tolist()))


def _tokens(reply: str) -> list[str]:
    """The tokens of a reply, its end token apart."""
    return re.findall(f"{SEPARATOR}|.", reply, re.DOTALL)


def vocabulary() -> list[str]:
    """Every token of the world; a digit's id is the digit."""
    return [*DIGITS, SEPARATOR, PAD, UNKNOWN, END]


def write_skeleton(directory: Path) -> None:
    """Write configuration and tokenizer of an untrained model in Hugging Face format (no weights)."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in skeleton().items():
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")


def skeleton() -> dict[str, dict[str, object]]:
    """What the skeleton's files hold, by name."""
    return {
        "config.json": _model_config(),
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "unk_token": UNKNOWN,
            "eos_token": END,
            # A prompt ends with the separator, so a conversation of one turn is the plain text.
            "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
            "clean_up_tokenization_spaces": False,
        },
    }


def _model_config() -> dict[str, object]:
    tokens = vocabulary()
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        # Wider heads tell more places apart: with two, long chains are learnt as fast as with four, in less time.
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2 * LONGEST + 4,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokens.index(END),
        "pad_token_id": tokens.index(PAD),
    }


def _tokenizer() -> dict[str, object]:
    tokens = vocabulary()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": tokens.index(token), "content": token, **flags} for token in (PAD, UNKNOWN, END)
        ],
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": f"{SEPARATOR}|."}, "behavior": "Isolated", "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": UNKNOWN},
    }  # fmt: skip
