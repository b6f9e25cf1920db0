"""The reward model: scores replies and their tokens, and learns from preferences or labels."""

from abc import abstractmethod
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from protocols.messages import Prompt
from protocols.model import Head, ModelConfig, TrainerConfig
from protocols.service import Empty, Message, Service, rpc
from protocols.tensor import Ends, PerToken, TokenIds

Kind = Literal["rules", "q_function", "outcome", "implicit", "implicit_outcome", "gated", "steps", "value"]
FROM_PAIRS: tuple[Kind, ...] = ("q_function", "outcome", "implicit", "gated")
"""Kinds that learn from preferences as such."""
Match = Literal["math", "exact", "cover", "wildcard"]


class RewardModelConfig(ModelConfig):
    """A reward model actor."""

    kind: Kind = "q_function"
    """What scores mean and how they are learnt. `rules`: 1 if the final answer is right; no model. `q_function`
    (Q-RM), `outcome` (the last token's score counts), `gated` (PGG-RM): a scalar head, from preferences. `implicit`:
    log-ratios to the untrained model, from preferences (DPO). `implicit_outcome`: the same, from right and wrong
    replies. `steps`, `value`: a scalar head, from targets per token; `value` is of the state before a token (a
    critic)."""
    trainer: TrainerConfig | None = TrainerConfig(learning_rate=1e-5, weight_decay=0.0)
    """How it learns; null: it does not."""
    beta: float | None = Field(default=None, gt=0)
    """Factor of the scores in the loss of q_function (null: 0.2), of the log-ratios in implicit (null: 0.1). Other
    kinds have none."""
    gamma: float = Field(default=2.0, ge=0)
    """Of q_function: margin by which a pair must be told apart."""
    clip: float = Field(default=0.0, ge=0)
    """Of value: how far a value may move from the old one before it counts as clipped; 0: no limit."""
    reference: str = ""
    """Of the implicit kinds: the model that log-ratios are taken to; empty: `model` as it is before training. A model
    that is trained already needs it, for its log-ratios to itself are 0."""
    max_tokens: int = Field(default=1024, ge=2)
    """Longest prompt and reply, in tokens; what exceeds it is cut off the reply's end."""
    match: Match = "math"
    """Of rules: `math`: the final answers are mathematically equal. `exact`: the texts are equal, up to case and
    blanks. `cover`: the reply contains the reference. `wildcard`: equal characters, `?` being any."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.needs_reference and self.trainer is None and not self.reference:
            raise ValueError(f"reference: expected the untrained model for {self.kind} without a trainer")
        if self.trainer is not None and self.kind != "rules" and self.resources.replicas > 1:
            raise ValueError(
                "resources.replicas: a reward model that learns has one replica; set trainer=null for more"
            )
        return self

    @property
    def head(self) -> Head:
        """What comes out of the model."""
        return "vocabulary" if self.needs_reference else "scalar"

    @property
    def needs_reference(self) -> bool:
        """Whether scores are log-ratios to a second, untrained copy."""
        return self.kind in ("implicit", "implicit_outcome")

    @property
    def split(self) -> bool:
        """Whether its ranks are processes of their own."""
        trainer = self.trainer
        return trainer is not None and self.learns and (trainer.engine != "torch" or trainer.workers > 1)

    @property
    def learns(self) -> bool:
        """Whether it has weights that change."""
        return self.kind != "rules" and self.trainer is not None


class Reply(Message):
    """A reply to be scored, as tokens of the model's own tokenizer, or as text."""

    uid: str = ""
    """Names it in errors."""
    prompt: Prompt
    """What it answers."""
    tokens: TokenIds | None = None
    """Token ids of the model's own tokenizer, int32[T], with the end token if there was one: scored as they are."""
    text: str = ""
    """The reply as text, without special tokens; where `tokens` are unset the model reads this."""
    ended: bool = True
    """Whether an end token follows the text. One that was not sampled must not be scored."""
    ends: Ends | None = None
    """Where each token of another tokenizer ends in the text, int32[T]: scores are brought to those tokens."""
    reference: str = ""
    """The right answer, for rules."""

    @model_validator(mode="after")
    def _one_reading(self) -> Self:
        if self.tokens is not None and self.ends is not None:
            raise ValueError(f"reply {self.uid!r}: expected tokens of the model's tokenizer or ends of other ones")
        return self


class ReplyScore(Message):
    """What the model says of one reply."""

    uid: str
    """The reply."""
    score: float
    """Of the whole reply: the mean over tokens (q_function; gated: of sigmoids), the last token's (outcome, steps),
    the sum of log-ratios (implicit kinds), the first token's (value); rules: 1 right, 0 wrong."""
    tokens: PerToken | None = None
    """Of each token, float32[T]: what it was worth, times beta for log-ratios; unset for rules."""
    ends: Ends | None = None
    """Where each scored token ends in the text, int32[T], if the model split the text itself."""
    truncated: bool = False
    """Whether the reply was cut."""
    answer: str | None = None
    """The final answer that `match=math` read; unset if there is none."""


class RewardRequest(Message):
    """Asks for scores."""

    replies: list[Reply] = Field(min_length=1)
    """One call is one batch."""


class RewardResponse(Message):
    """The scores."""

    scores: list[ReplyScore]
    """In the order of the replies."""
    version: int = 0
    """Weight version that scored."""


class Preference(Message):
    """Two replies to the same prompt, one of them better."""

    uid: str
    """Leads back to the row of the data."""
    chosen: Reply
    """The better one."""
    rejected: Reply
    """The worse one."""


class LabelledReply(Message):
    """A reply with what its score is to become."""

    reply: Reply
    """The reply."""
    right: bool | None = None
    """Whether it is right; for implicit_outcome."""
    targets: PerToken | None = None
    """Per token, float32[T], NaN where there is none; for steps and value."""
    old_values: PerToken | None = None
    """Values when it was scored, float32[T]; for value with a clip."""


class LearnRequest(Message):
    """One optimiser step."""

    pairs: list[Preference] = []
    """For q_function, outcome, implicit and gated."""
    replies: list[LabelledReply] = []
    """For implicit_outcome, steps and value."""
    learning_rate: float | None = Field(default=None, ge=0.0, le=1e6)
    """For this step only, instead of the schedule's."""


class LearnResponse(Message):
    """What the step came to."""

    loss: float
    """Mean over pairs, replies or tokens."""
    metrics: dict[str, float] = {}
    """Means, such as the share of pairs ranked right before the step and their margin."""
    learnt: int
    """Pairs or replies that the step learnt from."""
    dropped: dict[str, int] = {}
    """Pairs and replies that were left out, by reason."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate that was used."""
    version: int
    """Weight version after the step."""


class RewardModelInfo(Message):
    """Facts about a reward model."""

    kind: Kind
    """What its scores mean."""
    model: str
    """Name or path it was loaded from; empty for rules."""
    parameters: int
    """Number of weights."""
    trainable_parameters: int
    """Number of weights that a step changes."""
    tokenizer: str
    """Digest of its vocabulary: equal to that of a policy whose tokens it can score as they are. Empty for rules."""
    max_tokens: int
    """Longest prompt and reply, in tokens."""
    version: int
    """Weight version."""


class RewardModelService(Service):
    """Scores replies, whatever stands behind the score."""

    kind: ClassVar[str] = "reward_model"

    @rpc(safe=True)
    @abstractmethod
    async def info(self, request: Empty) -> RewardModelInfo:
        """Facts about the reward model."""

    @rpc(safe=True)
    @abstractmethod
    async def score(self, request: RewardRequest) -> RewardResponse:
        """Score replies and, where the kind has them, their tokens. Raises Corrupt when a score is not a number."""

    @rpc(dispatch="all", role="train")
    @abstractmethod
    async def train(self, request: LearnRequest) -> LearnResponse:
        """Take one optimiser step. Raises Stale when the model does not learn, BadInput when there is nothing to."""
