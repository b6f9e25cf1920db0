"""Documents, questions and answers: what questioner, responder and verifier talk about."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from protocols.messages import Completion
from protocols.service import Message
from protocols.tensor import TokenIds


class Task(StrEnum):
    """Kind of question (SPELL section 3): free answer, number, one of four options."""

    GENERAL = "doc_general_qa"
    MATH = "docmath_qa"
    CHOICE = "doc_mc"


LETTERS = ("A", "B", "C", "D")


class Cluster(Message):
    """Documents that belong together, and the task they serve."""

    question_id: str
    """Name of the cluster."""
    task: Task
    """The one task that it serves for a whole run."""
    data_source: str = ""
    """Where it comes from; the part before the first `_` names the kind of text."""
    paragraphs: list[str] = Field(min_length=1)
    """The n documents as text, in original order."""


class Question(Message):
    """What a responder is asked."""

    task: Task
    """Decides how the answer must end and how it is read."""
    question: str
    """The question itself."""
    options: list[str] = []
    """Texts of A, B, C, D; for multiple choice only."""

    @model_validator(mode="after")
    def _options_belong_to_choice(self) -> Self:
        expected = 4 if self.task is Task.CHOICE else 0
        if len(self.options) != expected:
            raise ValueError(f"{self.task.value} takes {expected} options, got {len(self.options)}")
        return self


class GoldQuestion(Question):
    """A question with a known answer, about one cluster."""

    id: str
    """Name of the question."""
    question_id: str
    """The cluster that it is about."""
    answer: str
    """True answer: text, number or letter."""
    aliases: list[str] = []
    """Other answers that are as true."""
    evidence: list[int] = []
    """Indices of the documents that it needs; empty: all of the cluster."""
    hops: int = 1
    """Number of facts that must be combined."""


class ProposalStatus(StrEnum):
    """What became of one attempt to write a question."""

    OK = "ok"
    BAD_FORMAT = "bad_format"
    BAD_ANSWER = "bad_answer"
    TRUNCATED = "truncated"
    DUPLICATE = "duplicate"
    UNSUPPORTED = "unsupported"
    OVERLONG = "overlong"


class Proposal(Message):
    """A question with a reference answer, as the questioner wrote it."""

    uid: str
    """Names the proposal in samples, rows and errors."""
    question_id: str
    """The cluster."""
    task: Task
    """The cluster's task."""
    evidence: list[int]
    """Indices of the documents that the questioner saw, ascending."""
    fresh: list[int]
    """Those of them that no remembered question had brought in."""
    status: ProposalStatus
    """Whether it can be used, and if not, why."""
    reason: str = ""
    """What was wrong, in words."""
    question: str = ""
    """The question."""
    options: list[str] = []
    """For multiple choice, in the order in which the responder sees them."""
    answer: str = ""
    """Reference answer: text, number or letter."""
    prompt_tokens: TokenIds | None = None
    """What the questioner read, int32[T]; unset if it was never asked."""
    completion: Completion | None = None
    """What the questioner wrote."""
    history_used: int = 0
    """Remembered questions shown in its prompt."""
    dropped_history: int = 0
    """Remembered questions left out because the prompt would have been too long."""
    dropped_documents: int = 0
    """Documents left out for the same reason."""

    def as_question(self) -> Question:
        """What the responder is asked. Raises ValidationError unless the status is ok."""
        return Question(task=self.task, question=self.question, options=self.options)
