"""Every hyper-parameter of Lookahead routing: the pool, where its answers come from, the router, and its training."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator

from cluster.config import MethodConfig, merged
from methods.worlds.skills import SkillsConfig
from protocols.messages import SamplingParams
from protocols.policy import PolicyConfig
from protocols.reward_model import RewardModelConfig
from protocols.router import FROM_MEMORY, RouteOptions, RouterConfig
from protocols.service import Message

PRESETS = Path(__file__).parent / "presets"


Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TAKEN = ("auto", "policy", "pool-reward", "questioner", "reward_model", "router", "verifier")
"""Names that no model of a pool may have."""


class Member(Message):
    """A model of the pool."""

    policy: PolicyConfig = PolicyConfig(trainer=None)
    """How it samples; it does not learn."""
    price: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """What an answer of it costs, in any unit."""

    @model_validator(mode="before")
    @classmethod
    def _frozen(cls, given: Any) -> Any:
        """A member has no trainer unless one is asked for, which is refused below."""
        return merged({"policy": {"trainer": None}}, given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _does_not_learn(self) -> Self:
        if self.policy.trainer is not None:
            raise ValueError("policy.trainer: the pool does not learn; expected null")
        return self


class DataConfig(Message):
    """Queries, and what a pool has made of them."""

    queries: list[str] = []
    """Files of queries for `pool`, .jsonl or .jsonl.gz: `id`, `instruction`, and perhaps `source`, `reference`."""
    collected: list[str] = []
    """Files of queries that a pool has answered: `id`, `instruction`, `models`, `scores`, `responses`, `source`."""
    models: list[str] = []
    """Of `collected`: the models that make up the pool; empty: all."""
    prices: dict[str, Price] = {}
    """Of `collected`: what an answer of each model costs; 0 where nothing is said."""
    test_one_in: int = Field(default=5, ge=2)
    """One of so many queries, by a hash of its id, is for tests."""
    validation_one_in: int = Field(default=10, ge=2)
    """One of so many of the others is for choosing among the routers of a run."""

    train_queries: int = Field(default=0, ge=0)
    """Most queries to train on, spread over the sources as they are; 0: all."""
    drop_ties: bool = True
    """Do not train on queries that all models score the same on."""
    collection: str = ""
    """Folder for the pool's answers, one file per model, which other runs and larger pools use too; empty: one under
    runs_dir that is named after the queries and how they are answered."""
    batch: int = Field(default=64, ge=1)
    """Queries per call to a model of the pool."""

    @model_validator(mode="after")
    def _one_is_odd(self) -> Self:
        if self.test_one_in % 2 == self.validation_one_in % 2 == 0:
            raise ValueError("test_one_in, validation_one_in: expected one to be odd, for both go by one hash")
        return self


class Config(MethodConfig):
    """Lookahead routing and what it is compared with."""

    # The schedule of learning rate and curriculum is as long as the run.
    MAY_CHANGE: ClassVar[frozenset[str]] = MethodConfig.MAY_CHANGE - {"steps"}
    SHORTCUTS: ClassVar[dict[str, str]] = {
        "kind": "router.kind",
        "encoder": "router.model",
        "lambda": "router.response_weight",
    }

    stage: Literal["collect", "train", "evaluate", "all"] = "all"
    """`collect`: let the pool answer and be scored. `train`: from what was collected, without a test. `evaluate`:
    test the router at router.trained. `all`: collect what is missing, train and evaluate."""
    world: Literal["", "skills", "trades"] = ""
    """A built-in world instead of data. `skills`: hidden skills, simulated answers, known truth. `trades`: three
    small policies that are trained on the spot."""
    world_seed: int | None = Field(default=None, ge=0)
    """Seed of the world; null: that of the run."""
    data: DataConfig = DataConfig()
    """Queries and answers."""
    skills: SkillsConfig = SkillsConfig()
    """The world of that name."""
    world_encoder: Literal["masked", "causal"] = "masked"
    """Encoder of a built-in world, and thus the variant of lookahead."""
    encoder_spread: float = Field(default=0.05, gt=0)
    """Deviation of that encoder's fresh weights."""
    trade_queries: int = Field(default=600, ge=10)
    """Queries of the world of that name, tests included."""
    pool: dict[str, Member] = {}
    """The models to choose from, by name: pool={small: {policy: {model: DIR}, price: 1}}."""
    sampling: SamplingParams = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=4096)
    """How the pool answers."""
    reward: RewardModelConfig = RewardModelConfig(kind="rules", trainer=None)
    """What scores answers; rules need a reference with each query."""
    router: RouterConfig = RouterConfig()
    """The router; its candidates are the pool."""
    queries_per_step: int = Field(default=64, ge=1)
    """Batch of an optimiser step."""
    test_every: int = Field(default=50, ge=1)
    """Steps between evaluations on validation queries; the best router is kept."""
    price_weights: list[Price] = [0.0, 0.03, 0.1, 0.3, 1.0, 3.0]
    """Values of mu of the curve of quality against price."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [bool(self.world), bool(self.data.collected), bool(self.data.queries)]
        if sum(given) != 1:
            raise ValueError("data: expected one of data.collected, data.queries (with pool) and world")
        if self.data.queries and len(self.pool) < 2:
            raise ValueError(f"pool: got {len(self.pool)} models, expected at least two to answer data.queries")
        if self.pool and not self.data.queries:
            raise ValueError("pool: it answers data.queries; other sources have their own")
        if (self.data.models or self.data.prices) and not self.data.collected:
            raise ValueError("data.models, data.prices: they are of data.collected; expected none")
        for name in self.pool:
            if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or name in TAKEN:
                raise ValueError(f"pool: got the name {name!r}, expected letters, digits, . _ - and none of {TAKEN}")
        if self.router.candidates:
            raise ValueError("router.candidates: they are the pool's; expected none")
        if self.stage == "evaluate" and not self.router.trained:
            raise ValueError("router.trained: expected the folder of a router to evaluate")
        if self.router.trainer is None and self.stage in ("train", "all"):
            raise ValueError("router.trainer: expected one, to train")
        return self

    @model_validator(mode="before")
    @classmethod
    def _as_many_steps_as_it_takes(cls, given: Any) -> Any:
        """Nothing is trained in some stages, and a router that only remembers takes one step."""
        if not isinstance(given, Mapping):
            return given
        if given.get("stage") in ("collect", "evaluate"):
            return {**given, "steps": 0}
        router = given.get("router")
        kind = router.get("kind") if isinstance(router, Mapping) else getattr(router, "kind", "")
        return {**given, "steps": 1} if kind in FROM_MEMORY else given

    @property
    def seed_of_world(self) -> int:
        """What the world is drawn from."""
        return self.seed if self.world_seed is None else self.world_seed

    def price_of(self, model: str) -> float:
        """What an answer of a model costs."""
        return self.pool[model].price if model in self.pool else self.data.prices.get(model, 0.0)

    def ways_to_choose(self, prices: Mapping[str, float]) -> list[RouteOptions]:
        """By score alone; always the same model, for each; and, where there are prices, by score less price."""
        alone = [RouteOptions(exclude=[other for other in prices if other != name]) for name in prices]
        curve = [RouteOptions(price_weight=weight) for weight in self.price_weights] if any(prices.values()) else []
        return [RouteOptions(), *alone, *curve]


def preset(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Defaults for a built-in world."""
    file = PRESETS / f"lookahead-{given.get('world', '')}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
