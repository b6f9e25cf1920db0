"""The part of a configuration that every method has."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from cluster.gateway.config import GatewayConfig
from protocols.service import Message


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a leaf, the second wins."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


class MethodConfig(Message):
    """Where a run lives, how long it is, and what carries its calls."""

    # Keys that may differ when a run is continued: they do not change what a step computes.
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            "run",
            "runs_dir",
            "steps",
            "transport",
            "checkpoint_every",
            "keep_checkpoints",
            "wandb",
            "wandb_project",
            "deadline_s",
            "profile",
            "gateway",
        }
    )
    # The same inside of a policy's configuration: where it runs, and over how many processes.
    POLICY_MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            "at.address",
            "at.token_file",
            "at.root_certificate",
            "at.certificate",
            "at.key",
            "resources",
            "trainer.workers",
            "trainer.zero_stage",
            "trainer.offload",
            "sampler.replicas",
            "sampler.tensor_parallel",
            "sampler.cache_gib",
            "sampler.sleep",
            "sampler.publication",
        }
    )

    # Likewise of a reward model's.
    REWARD_MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {"resources", "trainer.workers", "trainer.zero_stage", "trainer.offload"}
    )

    # Short names for nested keys, for the command line and for files.
    SHORTCUTS: ClassVar[dict[str, str]] = {}

    run: str = Field(default="", pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*)?$")
    """Name of the run and of its folder; empty: the method's name and a digest of the configuration, so that
    the same command continues the same run."""
    runs_dir: str = "runs"
    """Folder that holds the runs."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn."""
    steps: int = Field(default=100, ge=0)
    """Steps of the run; a finished run goes on when this is raised."""
    profile: Literal["", "laptop", "node", "cluster"] = ""
    """Defaults of transport, engines and resources for a kind of machine; see cluster/profiles/."""
    transport: Literal["inline", "ray"] = "inline"
    """`inline`: all actors in this process. `ray`: each in a Ray actor."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Steps between commits; a run that was stopped continues from the last one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints that are kept, the latest ones."""
    wandb: Literal["disabled", "offline", "online"] = "offline"
    """Weights & Biases: `offline` writes to the run's folder, `online` also uploads (needs WANDB_API_KEY)."""
    wandb_project: str = "repertory"
    """Weights & Biases project."""
    gateway: GatewayConfig | None = None
    """Let services query the run's actors over gRPC meanwhile, e.g. gateway.address=127.0.0.1:50051; null: no."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """Longest wait for one call to an actor, in seconds; then the run fails and names the actor."""

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, given: Any) -> Any:
        """A part that is given leaves the rest of its field's default: `loss.kl_coef=0.1` keeps the temperature."""
        if not isinstance(given, Mapping):
            return given
        defaults = {name: cls.model_fields[name].default for name in given if name in cls.model_fields}
        parts = {name: default.model_dump() for name, default in defaults.items() if isinstance(default, Message)}
        return merged(parts, given)
