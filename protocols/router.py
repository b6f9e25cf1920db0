"""The router: says which model of a pool should answer a query, before any of them has."""

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from protocols.messages import Prompt
from protocols.model import ModelConfig, TrainerConfig
from protocols.service import Empty, Message, Service, rpc

Kind = Literal[
    "lookahead",
    "classifier",
    "zooter",
    "router_dc",
    "mlp",
    "linear",
    "matrix",
    "knn",
    "kmeans",
    "best",
    "random",
]
FINE_TUNED: tuple[Kind, ...] = ("lookahead", "classifier", "zooter", "router_dc")
"""Kinds that train the encoder itself."""
ON_EMBEDDINGS: tuple[Kind, ...] = ("mlp", "linear", "matrix", "knn", "kmeans")
"""Kinds that read the mean of the untrained encoder's states."""
FROM_MEMORY: tuple[Kind, ...] = ("knn", "kmeans", "best", "random")
"""Kinds without weights: they remember what they were shown."""


class Candidate(Message):
    """A model of the pool."""

    name: str = Field(min_length=1)
    """What it is called, here and in a route."""
    price: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """What an answer of it costs, in a unit of the caller's."""


class RouterConfig(ModelConfig):
    """A router actor."""

    kind: Kind = "lookahead"
    """`lookahead`: predicts each candidate's answer in the hidden states that it decides from; joint and masked over
    a masked language model, causal over a causal one. On the query alone, with the same encoder: `classifier` (MLC),
    `zooter` (distils the scores), `router_dc` (contrastive). On embeddings: `mlp`, `linear`, `matrix`
    (factorisation), `knn`, `kmeans`. `best`: the best of the training rows, always. `random`: a draw that depends
    on the query."""
    model: str = "minilm"
    """Masked or causal language model that encodes queries: a Hugging Face name or folder, or `minilm`: the packaged
    all-MiniLM-L6-v2 (extra `minilm`)."""
    trained: str = ""
    """Folder of a trained router to begin with. Candidates that it knows keep what was learnt for them, those that it
    does not know are new. Where kind, response_tokens, blocks and hidden are left open they are taken from there, the
    encoder always."""
    learn: Literal["all", "new"] = "all"
    """`new`: with `trained`, only what belongs to new candidates is trained, and all else stays as it is."""
    candidates: list[Candidate] = []
    """The pool, in the order of its scores."""
    trainer: TrainerConfig | None = TrainerConfig(
        learning_rate=5e-5, weight_decay=0.0, schedule="cosine", total_steps=100
    )
    """How it learns; null: it does not."""
    new_rate: float = Field(default=1.0, gt=0)
    """Factor of the learning rate for weights that did not come with the model, such as heads."""
    response_weight: float | None = Field(default=None, ge=0)
    """Of lookahead: lambda, the factor of the loss of answers; null: 0.2 masked, 0.5 causal."""
    response_tokens: int = Field(default=64, ge=1)
    """Of lookahead: tokens of an answer that are predicted, m; the causal one reads no more than this either."""
    curriculum: float = Field(default=0.4, ge=0, le=1)
    """Of masked lookahead: share of the steps, alpha, over which the masked part of answers grows from 0.3 to all."""
    blocks: Literal["joint", "apart"] = "joint"
    """Of masked lookahead: whether candidates' blocks see each other (paper), or the query alone, which does not see
    them then either: the cheaper form for large pools."""
    target: float = Field(default=0.8, gt=0, le=1)
    """A candidate is right for a query if its score is at least this share of the best."""
    dead_zone: float = Field(default=0.0, ge=0)
    """Rows whose scores differ by no more than this do not train the choice."""
    temperature: float = Field(default=0.1, gt=0)
    """Of zooter and router_dc: divides scores, and similarities."""
    hidden: int = Field(default=256, ge=1)
    """Of mlp: width of its hidden layer; of matrix: of the factors."""
    neighbours: int = Field(default=100, ge=1)
    """Of knn: rows that are asked; of kmeans: clusters."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Before the head, while training."""
    max_tokens: int = Field(default=2048, ge=8)
    """Longest row in tokens, with the answers of one candidate. A longer query is cut at its beginning."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [one.name for one in self.candidates]
        if len(set(names)) < len(names):
            raise ValueError(f"candidates: expected each name once, got {', '.join(names)}")
        if self.lora is not None:
            raise ValueError("lora: a router trains all weights of its encoder; expected null")
        if self.trainer is not None and (self.trainer.engine != "torch" or self.trainer.workers > 1):
            raise ValueError("trainer: a router trains in one process; expected engine=torch and workers=1")
        if self.trainer is not None and self.resources.replicas > 1:
            raise ValueError("resources.replicas: a router that learns has one replica; set trainer=null for more")
        if self.learn == "new" and not self.trained:
            raise ValueError("learn: `new` needs a router to begin with; set `trained`")
        return self


class RouteOptions(Message):
    """What a choice takes into account beside quality."""

    exclude: list[str] = []
    """Candidates that are not to be chosen, such as those that are down."""
    price_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """mu: a candidate counts for its score less mu times its price."""
    within: float = Field(default=0.0, ge=0, le=1)
    """Choose the cheapest candidate whose score is at most this below the best."""
    quality_floor: float | None = Field(default=None, ge=0, le=1)
    """Choose the cheapest candidate whose score reaches this; if none does, go by the rest."""
    abstain_below: float = Field(default=0.0, ge=0, le=1)
    """Choose nobody if no candidate's score reaches this."""
    prices: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """Prices that replace those of the router's configuration."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.price_weight > 0) + (self.within > 0) + (self.quality_floor is not None) > 1:
            raise ValueError("expected at most one of price_weight, within and quality_floor")
        return self


class RouteRequest(Message):
    """Asks who should answer."""

    prompts: list[Prompt] = Field(min_length=1)
    """Queries as conversations or texts. One call is one batch."""
    options: RouteOptions = RouteOptions()
    """Shared by all queries."""


class Route(Message):
    """Who should answer one query."""

    uid: str = ""
    """The query's."""
    choice: str | None
    """Name of the candidate; unset if the router abstains."""
    scores: list[float]
    """Of each candidate, in the order of the pool: the probability that it is right (lookahead, classifier), or that
    it is the best (zooter, router_dc, random), or the score that is expected of it, from 0 to 1."""
    confidence: float
    """Score of the choice, or the best score if the router abstains."""
    price: float = 0.0
    """Of the choice."""
    truncated: bool = False
    """Whether the query was cut."""


class RouteResponse(Message):
    """The routes."""

    candidates: list[str]
    """Names, in the order of the scores."""
    routes: list[Route]
    """In the order of the queries."""
    version: int = 0
    """Weight version that decided."""


class RouteRow(Message):
    """A query, and what the pool made of it."""

    uid: str
    """Leads back to the data."""
    prompt: Prompt
    """The query, as a conversation or text."""
    answers: list[str] = []
    """Of each candidate, in the order of the pool; only lookahead reads them, and only to learn."""
    scores: list[float]
    """Of each candidate, from 0 to 1, higher is better."""
    group: str = ""
    """Where the query comes from; evaluation is per group."""


class RouteTrainRequest(Message):
    """One optimiser step, or rows to remember."""

    rows: list[RouteRow] = Field(min_length=1)
    """The batch."""


class RouteTrainResponse(Message):
    """What the step came to."""

    loss: float
    """Of the choice, plus that of answers by its weight; 0 for kinds that only remember."""
    metrics: dict[str, float] = {}
    """Each loss on its own, and the share of answers that was masked."""
    learnt: int
    """Rows that were learnt from."""
    dropped: dict[str, int] = {}
    """Rows that were left out of the choice's loss, and queries that were cut, by reason."""
    grad_norm: float = 0.0
    """Norm of the gradient before clipping."""
    learning_rate: float = 0.0
    """Learning rate that was used."""
    version: int
    """Weight version after the step."""


class RouteEvaluateRequest(Message):
    """Asks how good routes are where scores are known."""

    rows: list[RouteRow] = Field(min_length=1)
    """Queries with the scores of all candidates."""
    options: list[RouteOptions] = Field(default=[], max_length=64)
    """Ways to choose, all from the same scores; empty: one, by score alone."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""


class RouteQuality(Message):
    """What routing came to on one group of queries."""

    group: str
    """Empty: the mean over groups."""
    queries: int
    """Number of them."""
    router: float
    """Mean score of the chosen candidates; where the router abstained, of all candidates."""
    random: float
    """Mean score of all candidates."""
    oracle: float
    """Mean score of the best candidate of each query."""
    normalised: float
    """100 (router - random) / (oracle - random); NaN if there is nothing to win."""
    low: float
    """Of `normalised`: lower end of the 95 % bootstrap interval over queries."""
    high: float
    """Its upper end."""
    price: float
    """Mean price of the chosen candidates."""
    abstained: float
    """Share of queries that the router chose nobody for."""
    shares: list[float]
    """Share of queries that went to each candidate."""


class Reliability(Message):
    """Scores that a router gave, against what they stand for."""

    low: float
    """Scores from here."""
    high: float
    """To here."""
    count: int
    """Number of them, over all queries and candidates."""
    score: float
    """Their mean."""
    right: float
    """Share of those candidates that were right."""


class RouteEvaluation(Message):
    """What one way to choose came to."""

    groups: list[RouteQuality]
    """In order of their names."""
    mean: RouteQuality
    """Each group counts once."""


class RouteEvaluateResponse(Message):
    """Quality of each way to choose, and calibration."""

    evaluations: list[RouteEvaluation]
    """In the order of the options."""
    reliability: list[Reliability]
    """Ten bins of scores, empty ones left out."""
    calibration_error: float
    """Mean distance of score and share of right ones, weighted by count (ECE)."""
    version: int
    """Weight version that decided."""


class RouterInfo(Message):
    """Facts about a router."""

    kind: Kind
    """How it decides."""
    model: str
    """Encoder; empty for kinds without one."""
    masked: bool
    """Whether the encoder is a masked language model."""
    candidates: list[Candidate]
    """The pool, in the order of scores."""
    parameters: int
    """Number of weights."""
    trainable_parameters: int
    """Number of weights that a step changes."""
    max_tokens: int
    """Longest query, in tokens."""
    version: int
    """Weight version, or rows that are remembered."""


class RouterService(Service):
    """Chooses who answers."""

    kind: ClassVar[str] = "router"

    @rpc(safe=True)
    @abstractmethod
    async def info(self, request: Empty) -> RouterInfo:
        """Facts about the router."""

    @rpc(safe=True)
    @abstractmethod
    async def route(self, request: RouteRequest) -> RouteResponse:
        """Choose a candidate for each query. Raises BadInput if all are excluded."""

    @rpc(dispatch="all", role="train")
    @abstractmethod
    async def train(self, request: RouteTrainRequest) -> RouteTrainResponse:
        """Take one optimiser step, or remember the rows. Raises Stale when the router does not learn."""

    @rpc(safe=True)
    @abstractmethod
    async def evaluate(self, request: RouteEvaluateRequest) -> RouteEvaluateResponse:
        """Route queries whose scores are known, and say what that came to."""
