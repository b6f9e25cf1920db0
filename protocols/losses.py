"""Loss specifications: what a training term computes. The pure functions are in actors/policy."""

from typing import Annotated, Literal

from pydantic import Field

from protocols.service import Message

LARGEST = 1e6
"""Far above all that makes sense, and far below what float32 cannot hold."""


class LossBase(Message):
    """What every loss term has."""

    coef: float = Field(default=1.0, ge=-LARGEST, le=LARGEST)
    """Factor of this term in the sum of all terms."""
    temperature: float = Field(default=1.0, ge=1e-6, le=LARGEST)
    """Logits are divided by it before the softmax, as they were when sampling."""
    normalize: Literal["token", "sequence"] = "token"
    """`token`: one mean over all tokens of the term. `sequence`: mean per row, then over rows."""


class SFTLoss(LossBase):
    """Cross entropy of the row's own tokens: the weighted mean of -log p."""

    type: Literal["sft"] = "sft"
    """Which loss this is."""


class GRPOLoss(LossBase):
    """Clipped policy gradient with per-token advantages (SPELL eq. 12; PPO clip, dual clip, k3 KL)."""

    type: Literal["grpo"] = "grpo"
    """Which loss this is."""
    clip_low: float = Field(default=0.2, ge=0.0, le=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0.0, le=LARGEST)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float = Field(default=3.0, ge=0.0, le=LARGEST)
    """For A < 0 the loss is at most -dual_clip * A; 0: no such bound."""
    kl_coef: float = Field(default=0.0, ge=0.0, le=LARGEST)
    """Factor of the k3 estimate of KL(policy, reference); above 0 rows need reference log-probs."""
    entropy_coef: float = Field(default=0.0, ge=0.0, le=LARGEST)
    """Factor of the entropy bonus."""


LossSpec = Annotated[SFTLoss | GRPOLoss, Field(discriminator="type")]
"""Any loss term."""
