"""A model that scores or samples, and how it learns: what the configurations of policies and reward models share."""

from typing import Literal, Self

from pydantic import Field, model_validator

from protocols.placement import Resources
from protocols.service import Message

Head = Literal["vocabulary", "scalar"]
"""What comes out of a model at each token: logits of the next one, or one number."""


class LoRAConfig(Message):
    """Train a low-rank adapter (peft) and leave the base weights as they are."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str = "all-linear"
    """Names of the modules to adapt, comma separated, or `all-linear`."""


class TrainerConfig(Message):
    """AdamW on one or more loss terms."""

    engine: Literal["torch", "deepspeed"] = "torch"
    """`torch`: every rank holds the whole model. `deepspeed`: ZeRO shards it over the ranks."""
    workers: int = Field(default=1, ge=1)
    """Ranks that train together, each in a process of its own; more than one needs transport=ray."""
    zero_stage: Literal[1, 2, 3] = 2
    """Of deepspeed: shard the optimiser (1), the gradients too (2), the weights too (3)."""
    offload: bool = False
    """Of deepspeed: keep optimiser state, and the weights of stage 3, in the machine's memory."""
    learning_rate: float = Field(default=2e-6, ge=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up; `linear` and `cosine` end at 0 after `total_steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser steps of linear warm-up."""
    total_steps: int = Field(default=0, ge=0)
    """Length of the schedule in optimiser steps; `constant` does not need it."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Most tokens, padding included, that go through the model at once; a longer row goes alone."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _schedule_has_an_end(self) -> Self:
        if self.schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ValueError(f"schedule {self.schedule!r} needs total_steps > warmup_steps")
        return self


class ModelConfig(Message):
    """A model and where it computes."""

    model: str = "embedded"
    """Hugging Face model name or path, or `embedded`: the small checkpoint that comes with the package."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: take the model's configuration and tokenizer, draw fresh weights from `seed`."""
    seed: int = 0
    """Seed of random weights, adapters and dropout."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: a trainable policy keeps float32 weights and computes under autocast; a frozen one
    holds bfloat16 weights."""
    device: str = "auto"
    """torch device; `auto` is CUDA when there is one, else the CPU."""
    threads: int = Field(default=0, ge=0)
    """CPU threads for torch; 0: as many as this process may use. Results depend on it in the last bits."""
    trainer: TrainerConfig | None = TrainerConfig()
    """How it learns; null makes the policy frozen."""
    lora: LoRAConfig | None = None
    """Train an adapter instead of all weights."""
    resources: Resources = Resources(cpus=1)
    """What one replica takes on a cluster; where samplers and trainer live apart, what each process takes."""

    @property
    def head(self) -> Head:
        """What comes out of the model."""
        return "vocabulary"
