"""The questioner: writes questions and reference answers from documents."""

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field

from protocols.messages import SamplingParams
from protocols.placement import Resources
from protocols.questions import Cluster, Proposal, Task
from protocols.service import Empty, Message, Service, rpc


class QuestionerConfig(Message):
    """A questioner actor. It plays its role over a policy and keeps a history memory."""

    documents: int = Field(default=5, ge=1)
    """m: new documents that it reads per question."""
    history: int = Field(default=3, ge=0)
    """L: questions remembered per cluster; 0 turns the memory off."""
    stores: Literal["new", "cumulative"] = "new"
    """Which documents a remembered question keeps: the new ones of its turn (SPELL, paper), or all that
    its questioner saw (reference code)."""
    max_prompt_tokens: int = Field(default=16384, ge=1)
    """Longest prompt; oldest history is dropped first, then documents."""
    max_answer_tokens: int = Field(default=40, ge=1)
    """Longest reference answer to a free question, in policy tokens."""
    require_support: bool = True
    """Refuse reference answers that neither occur in the shown documents nor follow from two of their
    numbers, and questions that quote what no document says: checks that do not use the weights."""
    duplicate_overlap: float = Field(default=0.8, gt=0, le=1)
    """A question is a duplicate if it has the same words as a remembered one of its cluster, or the same
    answer and words that overlap (Jaccard) more than this."""
    resources: Resources = Resources()
    """What one replica takes on a cluster."""


class ProposeRequest(Message):
    """Asks for one question per cluster."""

    clusters: list[Cluster] = Field(min_length=1)
    """Each at most once per call, so that the memory it meets is well defined."""
    uids: list[str]
    """Names of the proposals, one per cluster."""
    seed: int
    """Draws documents, target letters, option orders and samples."""
    documents: int | None = Field(default=None, ge=1)
    """Overrides m."""
    params: SamplingParams = SamplingParams()
    """How the questions are sampled."""


class ProposeResponse(Message):
    """The proposals."""

    proposals: list[Proposal]
    """In the order of the clusters."""


class RememberRequest(Message):
    """Adds questions to the history memory of their clusters."""

    proposals: list[Proposal]
    """Solvable questions; the memory keeps the latest L per cluster."""


class HistoryEntry(Message):
    """One remembered question."""

    question: str
    """The question."""
    answer: str
    """Its reference answer; for multiple choice the text of the option."""
    documents: list[int]
    """Indices of its documents."""


class HistoryRequest(Message):
    """Asks for what is remembered."""

    question_id: str
    """The cluster."""
    task: Task
    """Its task."""


class HistoryResponse(Message):
    """The memory of one cluster."""

    entries: list[HistoryEntry]
    """Oldest first."""


class QuestionerService(Service):
    """Writes questions that a responder can just about answer."""

    kind: ClassVar[str] = "questioner"

    @rpc(safe=True)
    @abstractmethod
    async def propose(self, request: ProposeRequest) -> ProposeResponse:
        """One proposal per cluster, whatever became of it. Raises BadInput on repeated clusters."""

    @rpc(dispatch="all", role="train")
    @abstractmethod
    async def remember(self, request: RememberRequest) -> Empty:
        """Add questions to the memory, oldest out first."""

    @rpc(safe=True)
    @abstractmethod
    async def history(self, request: HistoryRequest) -> HistoryResponse:
        """What is remembered of a cluster."""
