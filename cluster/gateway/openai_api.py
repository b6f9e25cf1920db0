"""OpenAI's requests as messages of a policy, and a policy's answers as OpenAI's responses.

What a policy cannot do is refused by name; what has no bearing on the answer (`user`, `metadata`, ...) is accepted.
"""

import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from openai.types import Completion as TextCompletion
from openai.types import CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.completion_choice import Logprobs as TextLogprobs
from pydantic import Field, ValidationError, model_validator
from pydantic_core import from_json

from protocols.errors import BadInput, Unavailable, classify
from protocols.messages import ChatMessage, Completion, FinishReason, Prompt, SamplingParams, Structure
from protocols.policy import EmbedRequest, EmbedResponse, SampleDelta, SampleRequest, SampleResponse
from protocols.service import Message

TEXT_TOKENS = 16
"""Longest text completion where the request names none, as with OpenAI."""
LEAST_LOGPROB = -9999.0
"""What stands for a log-prob of minus infinity, which JSON has not."""

Texts = Mapping[int, str]
"""Text of each drawn token."""
MOST_INPUTS, MOST_TURNS, MOST_TOKENS, MOST_FIELDS = 2048, 4096, 1 << 20, 40_000
"""Prompts, turns of a conversation, ids of a prompt, keys and lists of a whole request: what is cheap to send must
not cost minutes to check, and room is only found for what has been checked."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
ManyTexts = Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
Inputs = (
    str | ManyTexts | Tokens | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
)

A = TypeVar("A", bound=Message)


class StreamOptions(Message):
    """What a stream tells beside its tokens."""

    include_usage: bool = False
    """Whether the last chunk counts tokens."""


class Asked(Message):
    """What requests for completions have in common."""

    model: str
    """Name of a policy."""
    n: int | None = Field(default=None, ge=1, le=128)
    """Completions per prompt."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest completion."""
    temperature: float | None = None
    """Logits are divided by it."""
    top_p: float | None = None
    """Share of probability to draw from."""
    top_k: int | None = None
    """Number of tokens to draw from; an addition to OpenAI's fields."""
    stop: str | Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    """Texts before which the completion ends."""
    seed: int | None = None
    """The same request with the same seed has the same answer, while the weights stay."""
    stream: bool | None = None
    """Whether tokens come as they are drawn."""
    stream_options: StreamOptions | None = None
    """Of a stream."""
    presence_penalty: Literal[0] | None = None
    """None but 0."""
    frequency_penalty: Literal[0] | None = None
    """None but 0."""
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    """None but an empty one."""
    user: str | None = None
    """No bearing on the answer."""

    @property
    def usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, longest: int, structure: Structure | None = None) -> SamplingParams:
        """How to draw. Raises ValidationError that names the field."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams.model_validate(
            {key: value for key, value in given.items() if value is not None}
            | {"max_tokens": longest, "stop": stop, "structure": structure}
        )


class TextPart(Message):
    """A piece of a turn."""

    type: Literal["text"]
    """Pictures and sound are not understood."""
    text: str
    """What is said."""


class Turn(Message):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; developers speak as the system."""
    content: str | Annotated[list[TextPart], Field(max_length=MOST_TURNS, fail_fast=True)]
    """What is said."""

    def message(self) -> ChatMessage:
        """The same for a policy."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=text)


class NamedSchema(Message):
    """A JSON schema with its name."""

    name: str
    """No bearing on the answer."""
    description: str | None = None
    """No bearing on the answer."""
    schema_: dict[str, Any] = Field(alias="schema")
    """The schema."""
    strict: bool | None = None
    """It always is."""


class ResponseFormat(Message):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    """Any text, some JSON object, or JSON of a schema."""
    json_schema: NamedSchema | None = None
    """The schema, of that type."""

    @model_validator(mode="after")
    def _with_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: expected with type json_schema, and with no other")
        return self

    def structure(self) -> Structure | None:
        """The same for a policy."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema else {"type": "object"}
        return Structure(json_schema=json.dumps(schema))


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST_TURNS, fail_fast=True)]
    """The conversation."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of `max_tokens`; without either the answer may be as long as the model's context allows."""
    logprobs: bool | None = None
    """Whether to give the log-probs of the drawn tokens."""
    top_logprobs: Literal[0] | None = None
    """None but 0: a policy gives those of the drawn tokens alone."""
    response_format: ResponseFormat | None = None
    """The form of the answer; all but text needs sampler.engine=vllm."""
    tools: list[Any] | None = Field(default=None, max_length=0)
    """None but an empty list."""
    metadata: dict[str, str] | None = None
    """No bearing on the answer."""
    store: bool | None = None
    """Nothing is stored."""

    @property
    def longest(self) -> int | None:
        """Longest answer, if the request names one."""
        return self.max_completion_tokens or self.max_tokens

    def request(self, longest: int) -> SampleRequest:
        """The same for a policy."""
        prompt = Prompt(messages=[turn.message() for turn in self.messages], seed=self.seed)
        structure = self.response_format.structure() if self.response_format else None
        return SampleRequest(prompts=[prompt], n=self.n or 1, params=self.params(longest, structure))


class TextAsked(Asked):
    """POST /v1/completions."""

    prompt: Inputs
    """Texts, or token ids."""
    logprobs: int | None = Field(default=None, ge=0, le=1)
    """Whether to give the log-probs of the drawn tokens; 1 as well, which is no more."""
    echo: Literal[False] | None = None
    """None but false."""
    best_of: Literal[1] | None = None
    """None but 1."""
    suffix: Literal[""] | None = None
    """None but an empty one."""

    def request(self) -> SampleRequest:
        """The same for a policy."""
        prompts = [
            one.model_copy(update={"seed": None if self.seed is None else self.seed + i})
            for i, one in enumerate(prompts_of(self.prompt))
        ]
        return SampleRequest(prompts=prompts, n=self.n or 1, params=self.params(self.max_tokens or TEXT_TOKENS))


class EmbeddingAsked(Message):
    """POST /v1/embeddings."""

    model: str
    """Name of a policy."""
    input: Inputs
    """Texts, or token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    """How the vectors are written."""
    user: str | None = None
    """No bearing on the answer."""

    def request(self) -> EmbedRequest:
        """The same for a policy."""
        return EmbedRequest(prompts=prompts_of(self.input))


def parsed(kind: type[A], body: bytes) -> A:
    """The request in a body. Raises BadInput that names the field."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadInput(f"request: {error}; expected JSON") from error
    if _fields(value) > MOST_FIELDS:
        raise BadInput(f"request: expected at most {MOST_FIELDS} keys and lists in all")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise classify(error) from error


def _fields(value: Any) -> int:
    """Number of keys and of lists in a value; each that is wrong would be an error of its own."""
    found, left = 0, [value]
    while left and found <= MOST_FIELDS:
        one = left.pop()
        if isinstance(one, dict):
            found += len(one)
            one = list(one.values())
        inner = [part for part in one if isinstance(part, dict | list)] if isinstance(one, list) else []
        found += len(inner)
        left += inner
    return found


def prompts_of(inputs: Inputs) -> list[Prompt]:
    """A prompt for each text or sequence of token ids."""
    if isinstance(inputs, str):
        return [Prompt(text=inputs)]
    if inputs and isinstance(inputs[0], int):
        return [Prompt.model_validate({"tokens": inputs})]
    return [Prompt.model_validate({"text" if isinstance(one, str) else "tokens": one}) for one in inputs]


@dataclass(frozen=True)
class Head:
    """What every response of a call begins with."""

    id: str
    model: str
    created: int

    def fields(self, version: int) -> dict[str, Any]:
        """As keywords of OpenAI's types; the weight version stands for the backend's."""
        fingerprint = f"weights-{version}"
        return {"id": self.id, "model": self.model, "created": self.created, "system_fingerprint": fingerprint}


def chat_response(head: Head, response: SampleResponse, texts: Texts | None) -> ChatCompletion:
    """A conversation's answers. `texts`: of every drawn token, if log-probs are wanted."""
    (result,) = response.results
    choices = [
        Choice(
            index=i,
            message=ChatCompletionMessage(role="assistant", content=one.text),
            finish_reason=reason(one.finish_reason),
            logprobs=None if texts is None else ChoiceLogprobs(content=chat_logprobs(one, texts)),
        )
        for i, one in enumerate(result.completions)
    ]
    fields = head.fields(last_version(result.completions))
    return ChatCompletion(object="chat.completion", choices=choices, usage=usage_of(response), **fields)


def text_response(head: Head, response: SampleResponse, texts: Texts | None) -> TextCompletion:
    """Texts that go on. `texts`: of every drawn token, if log-probs are wanted."""
    completions = [one for result in response.results for one in result.completions]
    choices = [
        CompletionChoice(
            index=i,
            text=one.text,
            finish_reason=reason(one.finish_reason),
            logprobs=None if texts is None else text_logprobs(one, texts, 0),
        )
        for i, one in enumerate(completions)
    ]
    fields = head.fields(last_version(completions))
    return TextCompletion(object="text_completion", choices=choices, usage=usage_of(response), **fields)


async def chat_chunks(
    head: Head, deltas: AsyncIterator[SampleDelta], texts: Texts | None
) -> AsyncGenerator[ChatCompletionChunk, None]:
    """A conversation's answers as they grow. `texts` as above, filled by the time that a delta comes."""
    begun: set[int] = set()
    async for delta in deltas:
        said = ChoiceDelta(content=delta.text)
        if delta.sample_index not in begun:
            begun.add(delta.sample_index)
            said = ChoiceDelta(role="assistant", content=delta.text)
        choice = ChunkChoice(
            index=delta.sample_index,
            delta=said,
            finish_reason=reason(delta.finish_reason) if delta.finish_reason else None,
            logprobs=None if texts is None else ChunkLogprobs(content=chat_logprobs(delta, texts)),
        )
        fields = head.fields(int(delta.versions.array[-1]))
        yield ChatCompletionChunk(object="chat.completion.chunk", choices=[choice], **fields)


async def text_chunks(
    head: Head, n: int, deltas: AsyncIterator[SampleDelta], texts: Texts | None
) -> AsyncGenerator[TextCompletion, None]:
    """Texts as they grow, `n` of each prompt. `texts` as above."""
    offsets: dict[int, int] = {}
    async for delta in deltas:
        index = delta.prompt_index * n + delta.sample_index
        fields: dict[str, Any] = {
            "index": index,
            "text": delta.text,
            "finish_reason": reason(delta.finish_reason) if delta.finish_reason else None,
            "logprobs": None if texts is None else text_logprobs(delta, texts, offsets.get(index, 0)),
        }
        # By OpenAI's own type every choice has ended.
        choice = CompletionChoice.model_construct(**fields)
        offsets[index] = offsets.get(index, 0) + len(delta.text)
        top = head.fields(int(delta.versions.array[-1]))
        yield TextCompletion.model_construct(object="text_completion", choices=[choice], **top)


def embedding_response(model: str, response: EmbedResponse, encoding: str | None) -> dict[str, Any]:
    """The vectors, as numbers or as base64 of their little-endian float32."""
    vectors = response.vectors.array
    written = [
        base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
        for vector in vectors
    ]
    tokens = sum(response.lengths)
    return {
        "object": "list",
        "model": model,
        "data": [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(written)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def usage_of(response: SampleResponse) -> CompletionUsage:
    """Tokens that were read and drawn."""
    read = sum(len(result.prompt_tokens) for result in response.results)
    drawn = sum(len(one.tokens) for result in response.results for one in result.completions)
    return usage(read, drawn)


def usage(read: int, drawn: int) -> CompletionUsage:
    """Tokens that were read and drawn, as OpenAI counts them."""
    return CompletionUsage(prompt_tokens=read, completion_tokens=drawn, total_tokens=read + drawn)


def reason(finish: FinishReason) -> Literal["stop", "length"]:
    """Why a completion ended, in OpenAI's words. Raises Unavailable for one that was cut off."""
    if finish is FinishReason.ABORTED:
        raise Unavailable("the policy has stopped amid the completion")
    return "length" if finish is FinishReason.LENGTH else "stop"


def last_version(completions: Sequence[Completion]) -> int:
    """Weight version under which the last token was drawn."""
    return max(int(one.versions.array[-1]) for one in completions)


def shown_tokens(grown: Completion | SampleDelta) -> list[tuple[int, float]]:
    """Drawn tokens with their log-probs, but for the end token, which is no text."""
    pairs = list(zip(grown.tokens.tolist(), grown.logprobs.array.tolist(), strict=True))
    return pairs[:-1] if grown.finish_reason is FinishReason.STOP else pairs


def chat_logprobs(grown: Completion | SampleDelta, texts: Texts) -> list[ChatCompletionTokenLogprob]:
    """Log-probs as conversations have them."""
    return [
        ChatCompletionTokenLogprob(
            token=texts[token],
            # A part of a character has no text that would give its bytes.
            bytes=None if "\ufffd" in texts[token] else list(texts[token].encode()),
            logprob=max(logprob, LEAST_LOGPROB),
            top_logprobs=[],
        )
        for token, logprob in shown_tokens(grown)
    ]


def text_logprobs(grown: Completion | SampleDelta, texts: Texts, offset: int) -> TextLogprobs:
    """Log-probs as texts have them; `offset`: characters of the completion before these tokens."""
    offsets = []
    for token, _ in shown_tokens(grown):
        offsets.append(offset)
        offset += len(texts[token])
    return TextLogprobs(
        tokens=[texts[token] for token, _ in shown_tokens(grown)],
        token_logprobs=[max(logprob, LEAST_LOGPROB) for _, logprob in shown_tokens(grown)],
        text_offset=offsets,
    )
