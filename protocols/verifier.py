"""The verifier: judges whether an answer matches a reference."""

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field

from protocols.messages import Completion, SamplingParams
from protocols.placement import Resources
from protocols.questions import Question
from protocols.service import Message, Service, rpc
from protocols.tensor import TokenIds


class VerifierConfig(Message):
    """A verifier actor: rules, votes of a policy, or both."""

    mode: Literal["rules", "votes", "both"] = "both"
    """What it goes by: `score` is the rule's, the majority's (SPELL eq. 4), or the larger of both (eq. 6).
    `rules` needs no policy."""
    vote_on_choice: bool = False
    """Ask for votes on multiple choice too, where they only compare two letters."""
    cover: Literal["tokens", "characters"] = "tokens"
    """How a free answer covers the reference: as a run of whole words, at most 20 words longer, or as any
    substring (the reference code's way)."""
    resources: Resources = Resources()
    """What one replica takes on a cluster."""


class JudgeItem(Message):
    """One reply to be judged."""

    uid: str
    """Names the reply."""
    question: Question
    """What was asked."""
    reply: str
    """The whole reply; its final answer is found by the task's own marker."""
    reference: str
    """Reference answer: text, number or letter."""
    seed: int | None = None
    """Seed of the votes on this reply."""


class JudgeRequest(Message):
    """Asks for judgements."""

    items: list[JudgeItem]
    """Replies to judge together."""
    votes: int = Field(default=8, ge=0)
    """Judgements sampled per reply; 0 goes by the rule, whatever the verifier's mode."""
    params: SamplingParams = SamplingParams()
    """How the votes are sampled."""


class Judgement(Message):
    """What the verifier found."""

    uid: str
    """The reply."""
    parsed: str | None
    """Its final answer; unset if there is none."""
    score: float
    """1 if the reply is accepted, else 0."""
    rule_score: float
    """1 if the rule for the task accepts the answer, else 0."""
    votes: list[int] = []
    """Per vote: 1 yes, 0 no, -1 unreadable. Empty if no vote was asked for."""
    majority: int | None = None
    """1 or 0 if more than half of the readable votes say so; unset on a tie or without any."""
    agree_share: float | None = None
    """Share of the majority among the readable votes."""
    prompt_tokens: TokenIds | None = None
    """What the voters read, int32[T]."""
    completions: list[Completion] = []
    """What they wrote."""


class JudgeResponse(Message):
    """The judgements."""

    judgements: list[Judgement]
    """In the order of the items."""


class VerifierService(Service):
    """Says whether a reply means the same as the reference."""

    kind: ClassVar[str] = "verifier"

    @rpc(safe=True)
    @abstractmethod
    async def judge(self, request: JudgeRequest) -> JudgeResponse:
        """Judge replies. The voters never see the documents."""
