"""The verifier: judges whether an answer matches a reference, and which of two replies is better."""

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field

from protocols.messages import ChatMessage, Completion, SamplingParams
from protocols.placement import Resources
from protocols.questions import Question
from protocols.service import Message, Service, rpc
from protocols.tensor import TokenIds

COMPARE = (
    "Prompt:\n{prompt}\n\nAnswer {first}:\n{one}\n\nAnswer {second}:\n{other}\n\nWhich answer is better? Write"
    " {first} or {second}."
)
"""How a policy is asked which of two replies is better."""


class VerifierConfig(Message):
    """A verifier actor: rules, votes of a policy, or both. Two replies are compared by a policy in any mode."""

    mode: Literal["rules", "votes", "both"] = "both"
    """What it goes by: `score` is the rule's, the majority's (SPELL eq. 4), or the larger of both (eq. 6).
    `rules` needs no policy."""
    vote_on_choice: bool = False
    """Ask for votes on multiple choice too, where they only compare two letters."""
    cover: Literal["tokens", "characters"] = "tokens"
    """How a free answer covers the reference: as a run of whole words, at most 20 words longer, or as any
    substring (the reference code's way)."""
    names: tuple[str, str] = ("A", "B")
    """What two replies are called that are compared: words that the policy's tokenizer tells apart."""
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


class ComparedItem(Message):
    """Two replies to the same conversation."""

    uid: str
    """Names the pair."""
    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation."""
    one: str
    """A reply."""
    other: str
    """Another one."""


class CompareRequest(Message):
    """Asks which replies are better."""

    items: list[ComparedItem] = Field(min_length=1)
    """Pairs to compare together."""


class Comparison(Message):
    """What the verifier thinks of a pair."""

    uid: str
    """The pair."""
    preference: float | None = None
    """Probability that `one` is better, the mean over both orders; unset where the pair is too long."""
    shown_first: float | None = None
    """The same when `one` is shown first."""
    shown_second: float | None = None
    """The same when it is shown second: what is far from that is a liking for a place."""


class CompareResponse(Message):
    """The comparisons."""

    comparisons: list[Comparison]
    """In the order of the items."""
    version: int = 0
    """Weight version that compared."""


class VerifierService(Service):
    """Says whether a reply means the same as the reference."""

    kind: ClassVar[str] = "verifier"

    @rpc(safe=True)
    @abstractmethod
    async def judge(self, request: JudgeRequest) -> JudgeResponse:
        """Judge replies. The voters never see the documents."""

    @rpc(safe=True)
    @abstractmethod
    async def compare(self, request: CompareRequest) -> CompareResponse:
        """Say which of two replies is better, each pair in both orders, without decoding.

        Raises BadInput for a verifier without a policy.
        """
