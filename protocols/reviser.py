"""The reviser: says how much a reply has to be revised, revises it, and learns both (SEFT, Chen et al. 2024)."""

from abc import abstractmethod
from collections.abc import AsyncIterator
from itertools import permutations
from string import Formatter
from typing import ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from protocols.messages import ChatMessage, FinishReason, SamplingParams
from protocols.placement import Resources
from protocols.service import Message, Service, rpc

Label = Literal["no", "minor", "major"]
"""How much revision a reply needs."""
LABELS: tuple[Label, ...] = get_args(Label)
PROMPT = (
    "Prompt:\n{prompt}\n\nAnswer:\n{reply}\n\nHow much does the answer have to be revised? Write {labels}. Unless"
    " it is {no}, write the improved answer below."
)
PLAIN_PROMPT = "Prompt:\n{prompt}\n\nAnswer:\n{reply}\n\nWrite an improved answer."
"""What the reviser is asked, with and without labels (our wording: the paper's could not be read)."""


class ReviserConfig(Message):
    """A reviser, which plays its role over a policy."""

    adaptive: bool = True
    """Say first how much revision a reply needs, and give back the ones that need none. false: revise all, as a
    baseline without labels."""
    prompt: str | None = None
    """What it is asked, with the places {prompt} and {reply}, and if wanted {labels} and {no}; null: one of its own.
    It must be the same in training and use."""
    names: dict[Label, str] = {"no": "[no]", "minor": "[minor]", "major": "[major]"}
    """What it writes for each label; quickest where each is one token of the policy."""
    label_weight: float = Field(default=3.0, gt=0)
    """Weight of a label in the loss, spread over its tokens, where each token of the text has 1: a label is one among
    hundreds."""
    resources: Resources = Resources()
    """What it takes on a cluster; its policy does the computing."""

    @field_validator("prompt")
    @classmethod
    def _has_its_places(cls, prompt: str | None) -> str | None:
        if prompt is None:
            return None
        try:
            parts = [part for part in Formatter().parse(prompt) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"{error}; write a brace that is text twice") from error
        places = {str(place) for _, place, *_ in parts}
        plain = all(not form and not conversion for _, _, form, conversion in parts)
        if not plain or not {"prompt", "reply"} <= places <= {"prompt", "reply", "labels", "no"}:
            raise ValueError("expected the places {prompt} and {reply}, and none but {labels} and {no} beside them")
        return prompt

    @field_validator("names")
    @classmethod
    def _tells_labels_apart(cls, names: dict[Label, str]) -> dict[Label, str]:
        texts = [names.get(label, "") for label in LABELS]
        if any(not text.strip() or "\n" in text for text in texts):
            raise ValueError(f"expected one line of text for each of {', '.join(LABELS)}")
        if any(other.startswith(one) for one, other in permutations(texts, 2)):
            raise ValueError("expected names of which none begins with another")
        return names

    @field_validator("resources")
    @classmethod
    def _one_replica(cls, resources: Resources) -> Resources:
        if resources.replicas > 1:
            raise ValueError("replicas: a reviser has one; give its policy more samplers instead")
        return resources

    @property
    def asks(self) -> str:
        """The text that it is asked with."""
        return self.prompt or (PROMPT if self.adaptive else PLAIN_PROMPT)


class ReviseItem(Message):
    """One reply to be revised."""

    uid: str = ""
    """Names it in answers and errors."""
    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation that it answers."""
    reply: str
    """The reply; earlier turns are not revised."""
    seed: int | None = None
    """Seed of the revision where it is sampled; unset: a new one each time."""


class ReviseRequest(Message):
    """Asks for revisions."""

    items: list[ReviseItem] = Field(min_length=1)
    """One call is one batch: all labels are found first, then all texts are written together."""
    params: SamplingParams = SamplingParams(temperature=0.0, max_tokens=512)
    """How texts are written. Labels are not sampled: the most probable one counts."""
    labels_only: bool = False
    """Whether to write no text: then `text` is the reply."""


class LabelProbs(Message):
    """Probability of each label, among the three."""

    no: float
    """Nothing has to be revised."""
    minor: float
    """A little has to be."""
    major: float
    """It has to be written anew."""


class Revision(Message):
    """What became of one reply."""

    uid: str
    """The reply."""
    label: Label | None = None
    """The most probable label; unset for a reviser without labels, and where the reply is too long."""
    label_probs: LabelProbs | None = None
    """How sure it is of that."""
    text: str
    """The revised reply; the reply itself, character by character, where the label is `no`."""
    finish_reason: FinishReason | None = None
    """Why the text ended; unset where none was written."""
    decoded_tokens: int = 0
    """Tokens that were sampled for it."""
    too_long: bool = False
    """Whether conversation and reply leave no room in the policy's context; nothing is revised then."""
    version: int = 0
    """Weight version that labelled it, or, where a text was written, that began that; 0 where neither was done."""


class ReviseResponse(Message):
    """The revisions."""

    revisions: list[Revision]
    """In the order of the items."""


class RevisionDelta(Message):
    """What became known of one reply: its label first, then text as it is written."""

    index: int
    """Which item."""
    label: Label | None = None
    """Set on the first one of an item, if there are labels."""
    label_probs: LabelProbs | None = None
    """Set with the label."""
    text: str = ""
    """New text."""
    too_long: bool = False
    """Whether conversation and reply leave no room; then the text is the reply."""
    finish_reason: FinishReason | None = None
    """Set on the last one of a text that is written."""


class ReviserExample(Message):
    """What the reviser is to say of a reply."""

    uid: str
    """Leads back to the row of the data."""
    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation."""
    reply: str
    """The reply to be revised."""
    label: Label
    """How much it has to be."""
    target: str = ""
    """What it is to become; not read where the label is `no`."""

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.label != "no" and not self.target:
            raise ValueError(f"example {self.uid!r}: expected a target for the label {self.label}")
        return self


class ReviserTrainRequest(Message):
    """One optimiser step."""

    examples: list[ReviserExample] = Field(min_length=1)
    """The batch."""
    learning_rate: float | None = Field(default=None, ge=0.0, le=1e6)
    """For this step only, instead of the schedule's."""


class ReviserTrainResponse(Message):
    """What the step came to."""

    loss: float
    """Weighted mean of -log p over the tokens of labels and texts."""
    learnt: int
    """Examples that the step learnt from."""
    too_long: int
    """Examples that the policy's context does not hold; they are left out, never cut."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate that was used."""
    version: int
    """Weight version after the step."""


class ReviserService(Service):
    """Improves replies, and leaves good ones as they are."""

    kind: ClassVar[str] = "reviser"

    @rpc(safe=True)
    @abstractmethod
    async def revise(self, request: ReviseRequest) -> ReviseResponse:
        """Label replies, and revise those that need it."""

    @rpc()
    @abstractmethod
    def stream(self, request: ReviseRequest) -> AsyncIterator[RevisionDelta]:
        """The same, yielding labels when they are known and text as it is written."""

    @rpc(role="train")
    @abstractmethod
    async def train(self, request: ReviserTrainRequest) -> ReviserTrainResponse:
        """Take one optimiser step of the policy. Raises Stale when that is frozen."""
