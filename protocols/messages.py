"""Conversations, prompts, sampling parameters and completions."""

from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from protocols.service import Message
from protocols.tensor import PerToken, TokenIds, Versions


class ChatMessage(Message):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said."""


class Prompt(Message):
    """What a policy continues: exactly one of `messages`, `text` and `tokens`."""

    messages: list[ChatMessage] = []
    """A conversation; the policy's chat template turns it into tokens and opens the assistant's turn."""
    text: str | None = None
    """Plain text, tokenized as it stands."""
    tokens: TokenIds | None = None
    """Token ids, int32[T]: never tokenized again, so a continued conversation keeps its tokens."""
    seed: int | None = None
    """Seed of this prompt's samples; sample i depends on (seed, i) alone. Unset: a new one each time."""
    uid: str = ""
    """The caller's name for it, used in errors."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.messages) + (self.text is not None) + (self.tokens is not None) != 1:
            raise ValueError("expected exactly one of messages, text and tokens")
        return self


class Structure(Message):
    """The form that a completion must have: exactly one of `json_schema`, `regex` and `choices`."""

    json_schema: str = ""
    """A JSON schema, as JSON text."""
    regex: str = ""
    """A regular expression for the whole completion."""
    choices: list[str] = []
    """One of these texts."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.json_schema) + bool(self.regex) + bool(self.choices) != 1:
            raise ValueError("expected exactly one of json_schema, regex and choices")
        return self


class SamplingParams(Message):
    """How completions are drawn. The defaults sample from the model's own distribution."""

    max_tokens: int = Field(default=256, ge=1)
    """Longest completion, in tokens."""
    temperature: float = Field(default=1.0, ge=0.0, le=1e6)
    """Logits are divided by it; 0 takes the most likely token, and other values begin at 0.000001."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    top_k: int = Field(default=0, ge=0)
    """Keep this many most likely tokens; 0 keeps all."""
    stop: list[str] = Field(default=[], max_length=64)
    """The completion ends before the first of these texts; the token that completed it is kept."""
    stop_token_ids: list[int] = []
    """The completion ends with the first of these tokens, beside the model's own end tokens."""
    structure: Structure | None = None
    """Draw only tokens that keep to a form; log-probs are then among these tokens. Needs sampler.engine=vllm."""

    @field_validator("temperature")
    @classmethod
    def _finite_quotients(cls, temperature: float) -> float:
        if 0 < temperature < 1e-6:
            raise ValueError("expected 0, or at least 0.000001")
        return temperature

    @field_validator("stop")
    @classmethod
    def _of_a_length(cls, stop: list[str]) -> list[str]:
        # Each token is compared with every beginning of each.
        if not all(1 <= len(text) <= 256 for text in stop):
            raise ValueError("expected texts of 1 to 256 characters")
        return stop


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    STOP_TEXT = "stop_text"
    LENGTH = "length"
    ABORTED = "aborted"


class Completion(Message):
    """One sampled continuation."""

    tokens: TokenIds
    """Sampled token ids, int32[T], with the end token if there was one."""
    text: str
    """The same tokens as text, without special tokens and cut before a stop text."""
    logprobs: PerToken
    """log softmax(logits / temperature) of each token, nats, float32[T], before top-p and top-k."""
    versions: Versions
    """Weight version under which each token was sampled, int32[T]."""
    finish_reason: FinishReason
    """Why it ended."""
