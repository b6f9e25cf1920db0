"""Actors that serve until they are told to stop, behind a gateway."""

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.gateway.config import GatewayConfig
from cluster.gateway.routed import AUTO
from cluster.gateway.running import SERVING
from protocols.model import ModelConfig
from protocols.policy import PolicyConfig
from protocols.questioner import QuestionerConfig
from protocols.retriever import RetrieverConfig
from protocols.reviser import ReviserConfig
from protocols.reward_model import RewardModelConfig
from protocols.router import RouterConfig
from protocols.verifier import VerifierConfig

TAKEN = {AUTO, "policy", "questioner", "retriever", "reviser", "reward_model", "router", "verifier"}
"""Names that no policy of the pool may have."""


class ServedGateway(GatewayConfig):
    """A gateway with both doors."""

    http: str = "127.0.0.1:8000"
    """HOST:PORT of a second door that speaks OpenAI's HTTP API; empty: none."""


class Config(MethodConfig):
    """Which actors serve, and how the gateway listens."""

    # Nothing is continued.
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            *MethodConfig.model_fields,
            "attach",
            "policy",
            "verifier",
            "questioner",
            "reviser",
            "reward_model",
            "pool",
            "router",
            "retriever",
        }
    )
    SHORTCUTS: ClassVar[dict[str, str]] = {"model": "policy.model", "address": "gateway.address"}

    run: str = Field(default="serve", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    """Name of the folder under runs_dir that holds the log, and what callers save."""
    attach: str = ""
    """Name of a run that is up on Ray (RAY_ADDRESS): serve its actors, which stay the run's, instead of own ones."""
    policy: PolicyConfig = PolicyConfig(trainer=None)
    """The policy; with a trainer it can be trained by callers."""
    verifier: VerifierConfig | None = VerifierConfig()
    """A verifier over the policy; null: none."""
    questioner: QuestionerConfig | None = None
    """A questioner over the policy; null: none."""
    reviser: ReviserConfig | None = None
    """A reviser over the policy; null: none."""
    reward_model: RewardModelConfig | None = None
    """A reward model, e.g. reward_model.kind=rules; null: none."""
    pool: dict[str, PolicyConfig] = {}
    """More policies by name, e.g. pool={small: {model: DIR}}; they do not learn unless they are given a trainer."""
    router: RouterConfig | None = None
    """A router among the pool: router.trained=RUN/router. It does not learn unless it is given a trainer. Callers of
    the model `auto` are sent on by it."""
    retriever: RetrieverConfig | None = None
    """A retriever, e.g. retriever.kind=pattern, or retriever.path=DIR for an index that stays; null: none."""
    gateway: ServedGateway = ServedGateway()
    """Where and how callers reach them."""

    @field_validator("router", mode="before")
    @classmethod
    def _frozen_router(cls, given: Any) -> Any:
        return {"trainer": None, **given} if isinstance(given, Mapping) else given

    @field_validator("pool", mode="before")
    @classmethod
    def _frozen_pool(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        members = {name: one for name, one in given.items() if isinstance(one, Mapping)}
        return {**given, **{name: {"trainer": None, **one} for name, one in members.items()}}

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        taken = sorted(TAKEN & self.pool.keys())
        if taken:
            raise ValueError(f"pool: got the name {taken[0]!r}, which is taken; expected another")
        return self

    @model_validator(mode="after")
    def _attached_through_ray(self) -> Self:
        if self.attach and self.transport != "ray":
            raise ValueError("attach: the actors of another run are reached through Ray; set transport=ray")
        return self


def policies(config: Config) -> dict[str, ModelConfig | RetrieverConfig]:
    """What the plan counts."""
    if config.attach:
        return {}
    found: dict[str, ModelConfig | RetrieverConfig] = {"policy": config.policy}
    if config.reward_model is not None and config.reward_model.kind != "rules":
        found["reward_model"] = config.reward_model
    found |= config.pool
    if config.router is not None:
        found["router"] = config.router
    if config.retriever is not None:
        found["retriever"] = config.retriever
    return found


async def run(cluster: Cluster, config: Config) -> None:
    """Start the actors and answer until the process is told to stop."""
    if config.attach:
        await cluster.attach(config.attach)
    else:
        policy = await cluster.policy(config.policy)
        if config.verifier is not None:
            await cluster.verifier(config.verifier, policy)
        if config.questioner is not None:
            await cluster.questioner(config.questioner, policy)
        if config.reviser is not None:
            await cluster.reviser(config.reviser, policy)
        for name, member in config.pool.items():
            await cluster.policy(member, name=name)
        if config.router is not None:
            await cluster.router(config.router)
        if config.retriever is not None:
            await cluster.retriever(config.retriever)
        if config.reward_model is not None:
            await cluster.reward_model(config.reward_model)
    await cluster.serve_until_stopped(lambda where: print(f"{SERVING}{where}; Ctrl-C stops", file=sys.stderr))
