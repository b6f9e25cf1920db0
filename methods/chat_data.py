"""Conversations and ranked replies, in the forms of public chat data; row by row, for files of any size."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from methods.worlds.documents import read_rows
from protocols.errors import BadInput, describe_validation_error
from protocols.messages import ChatMessage
from protocols.service import Message

SPEAKERS: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
TURN = re.compile(r"\n\n(Human|Assistant):")


class Candidate(Message):
    """One reply among others to the same prompt; higher scores and lower ranks are better."""

    text: str
    """The reply."""
    score: float | None = Field(default=None, allow_inf_nan=False)
    """How good it is."""
    rank: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """Its place, 1 being the best."""
    model: str = ""
    """Who wrote it."""


class Judged(Message):
    """A prompt with replies of known order."""

    id: str
    """Its name: the row's, or file and line."""
    messages: list[ChatMessage]
    """The conversation that the replies answer."""
    replies: list[Candidate]
    """All have scores, or all have ranks."""


class Conversation(Message):
    """A prompt, with the reply that its data give if there is one."""

    id: str
    """Its name: the row's, or file and line."""
    messages: list[ChatMessage]
    """The conversation up to the reply."""
    reply: str = ""
    """The last turn of the assistant; empty if there is none."""


class Row(BaseModel):
    """What all rows may have; public data have more fields than anybody reads."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str = ""


class Response(BaseModel):
    """One of the responses."""

    text: str
    score: float | None = Field(default=None, allow_inf_nan=False)
    rank: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    model: str = ""


class Ranked(Row):
    """{prompt, responses: [{text, score or rank, model}]}."""

    prompt: str
    responses: list[Response] = Field(min_length=1)

    def judged(self) -> tuple[list[ChatMessage], list[Candidate]]:
        """Its parts."""
        return said(self.prompt), [Candidate.model_validate(one.model_dump()) for one in self.responses]


class BetterWorse(Row):
    """{prompt, better, worse}."""

    prompt: str
    better: str
    worse: str

    def judged(self) -> tuple[list[ChatMessage], list[Candidate]]:
        """Its parts."""
        return said(self.prompt), [Candidate(text=self.better, rank=1), Candidate(text=self.worse, rank=2)]


class Turn(BaseModel):
    """One turn: {role, content}, as OpenAI has it."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChosenRejected(Row):
    """{prompt, chosen, rejected}: texts, or conversations that differ in their last turn."""

    prompt: str = ""
    chosen: str | list[Turn]
    rejected: str | list[Turn]

    def judged(self) -> tuple[list[ChatMessage], list[Candidate]]:
        """Its parts. Raises ValueError when the conversations differ before their last turn."""
        (before, better), (other, worse) = self._side(self.chosen), self._side(self.rejected)
        if before != other:
            raise ValueError("chosen, rejected: expected conversations that differ in their last turn alone")
        return before, [Candidate(text=better, rank=1), Candidate(text=worse, rank=2)]

    def _side(self, given: str | list[Turn]) -> tuple[list[ChatMessage], str]:
        if isinstance(given, str):
            return said(self.prompt), given
        if given and given[-1].role != "assistant":
            raise ValueError("chosen, rejected: expected conversations that end with a turn of the assistant")
        return parted(turns(given))


class Answer(BaseModel):
    """One of Nectar's answers."""

    answer: str
    rank: float = Field(ge=1)
    model: str = ""


class Nectar(Row):
    """{prompt: "\\n\\nHuman: ... \\n\\nAssistant: ", answers: [{answer, rank, model}]}."""

    prompt: str
    answers: list[Answer] = Field(min_length=1)

    def judged(self) -> tuple[list[ChatMessage], list[Candidate]]:
        """Its parts."""
        replies = [Candidate(text=one.answer, rank=one.rank, model=one.model) for one in self.answers]
        return marked_turns(self.prompt), replies


class Scored(BaseModel):
    """One of UltraFeedback's completions."""

    response: str
    overall_score: float = Field(allow_inf_nan=False)
    model: str = ""


class UltraFeedback(Row):
    """{instruction, completions: [{response, overall_score, model}]}."""

    instruction: str
    completions: list[Scored] = Field(min_length=1)

    def judged(self) -> tuple[list[ChatMessage], list[Candidate]]:
        """Its parts."""
        replies = [Candidate(text=o.response, score=o.overall_score, model=o.model) for o in self.completions]
        return said(self.instruction), replies


class Messages(Row):
    """{messages: [{role, content}]}."""

    messages: list[Turn] = Field(min_length=1)

    def conversation(self) -> tuple[list[ChatMessage], str]:
        """Its parts."""
        return parted(turns(self.messages))


class Said(BaseModel):
    """One of ShareGPT's turns; `from` is a word of Python."""

    speaker: str = Field(alias="from")
    value: str


class ShareGPT(Row):
    """{conversations: [{from, value}]}."""

    conversations: list[Said] = Field(min_length=1)

    def conversation(self) -> tuple[list[ChatMessage], str]:
        """Its parts. Raises ValueError for an unknown speaker."""
        unknown = [one.speaker for one in self.conversations if one.speaker not in SPEAKERS]
        if unknown:
            raise ValueError(f"conversations.from: got {unknown[0]!r}; expected one of {', '.join(SPEAKERS)}")
        return parted([ChatMessage(role=SPEAKERS[o.speaker], content=o.value) for o in self.conversations])


class Alpaca(Row):
    """{instruction, input, output}."""

    instruction: str
    input: str = ""
    output: str = ""

    def conversation(self) -> tuple[list[ChatMessage], str]:
        """Its parts."""
        return said(f"{self.instruction}\n\n{self.input}" if self.input.strip() else self.instruction), self.output


class Plain(Row):
    """{prompt, reference}."""

    prompt: str
    reference: str = ""

    def conversation(self) -> tuple[list[ChatMessage], str]:
        """Its parts."""
        return said(self.prompt), self.reference


# The field by which a form is known, in the order in which they are tried.
JUDGED: dict[str, type[Ranked | Nectar | UltraFeedback | ChosenRejected | BetterWorse]] = {
    "responses": Ranked,
    "answers": Nectar,
    "completions": UltraFeedback,
    "chosen": ChosenRejected,
    "better": BetterWorse,
}
CONVERSATIONS: dict[str, type[Messages | ShareGPT | Alpaca | Plain]] = {
    "messages": Messages,
    "conversations": ShareGPT,
    "instruction": Alpaca,
    "prompt": Plain,
}


def read_judged(files: Sequence[str]) -> Iterator[Judged]:
    """Prompts with replies of known order. Raises BadInput that names file, line and field."""
    for place, row in _rows(files, "preferences"):
        form, (messages, replies) = _read(place, row, "preferences", JUDGED, lambda form: form.judged())
        orders = [all(o.score is not None for o in replies), all(o.rank is not None for o in replies)]
        if not any(orders):
            raise BadInput(f"preferences: {place}: expected a score of every reply, or a rank of every reply")
        yield Judged(id=form.id or place, messages=messages, replies=replies)


def read_conversations(files: Sequence[str]) -> Iterator[Conversation]:
    """Prompts, with replies where there are some. Raises BadInput that names file, line and field."""
    for place, row in _rows(files, "prompts"):
        form, (messages, reply) = _read(place, row, "prompts", CONVERSATIONS, lambda form: form.conversation())
        yield Conversation(id=form.id or place, messages=messages, reply=reply)


def _rows(files: Sequence[str], what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        yield from read_rows(Path(file).expanduser(), what)


def _read(
    place: str, row: dict[str, Any], what: str, forms: Mapping[str, Any], parts: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """A row as the form that it has, and its parts."""
    key = next((key for key in forms if key in row), None)
    if key is None:
        shown = ", ".join(row) or "none"
        raise BadInput(f"{what}: {place}: got the fields {shown}; expected one of {', '.join(forms)}")
    try:
        # null says the same as a field that is missing.
        given = {name: value for name, value in row.items() if value is not None}
        form = forms[key].model_validate({**given, "id": str(row["id"])} if "id" in given else given)
        found = parts(form)
    except ValidationError as error:
        raise BadInput(f"{what}: {place}: {describe_validation_error(error)}") from error
    except ValueError as error:
        raise BadInput(f"{what}: {place}: {error}") from error
    return form, found


def said(text: str) -> list[ChatMessage]:
    """A text as what the user says. Raises ValueError when it is empty."""
    if not text.strip():
        raise ValueError("prompt: got an empty text; expected what the user says")
    return [ChatMessage(role="user", content=text)]


def turns(given: Sequence[Turn]) -> list[ChatMessage]:
    """Turns as messages."""
    return [ChatMessage(role=one.role, content=one.content) for one in given]


def parted(messages: list[ChatMessage]) -> tuple[list[ChatMessage], str]:
    """A conversation and the assistant's last turn. Raises ValueError when nobody asked anything."""
    if not messages:
        raise ValueError("got a conversation without turns; expected at least one of the user")
    reply = messages[-1].content if messages[-1].role == "assistant" else ""
    before = messages[:-1] if messages[-1].role == "assistant" else messages
    if not before or before[-1].role != "user":
        raise ValueError("expected a turn of the user before the assistant's last one")
    return before, reply


def marked_turns(text: str) -> list[ChatMessage]:
    """A conversation in one text, its turns marked as Nectar's are.

    Raises ValueError unless the first and the last turn with text are the user's.
    """
    parts = TURN.split(text)
    marked = zip(parts[1::2], parts[2::2], strict=True)
    messages = [ChatMessage(role=SPEAKERS[who.lower()], content=what.strip()) for who, what in marked]
    if messages and messages[-1] == ChatMessage(role="assistant", content=""):
        messages.pop()
    if (
        parts[0].strip()
        or not messages
        or any(messages[i].role != "user" or not messages[i].content for i in (0, -1))
    ):
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise ValueError(f"prompt: got {shown!r}; expected turns after `\\n\\nHuman:` and `\\n\\nAssistant:`")
    return messages
