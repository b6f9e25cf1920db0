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


class LikelihoodLoss(LossBase):
    """A term over log-probs of tokens: for models with a vocabulary's head."""

    temperature: float = Field(default=1.0, ge=1e-6, le=LARGEST)
    """Logits are divided by it before the softmax, as they were when sampling."""


class PolicyLoss(LikelihoodLoss):
    """A term that is a mean over tokens."""

    normalize: Literal["token", "sequence"] = "token"
    """`token`: one mean over all tokens of the term. `sequence`: mean per row, then over rows."""


class SFTLoss(PolicyLoss):
    """Cross entropy of the row's own tokens: the weighted mean of -log p."""

    type: Literal["sft"] = "sft"
    """Which loss this is."""


class GRPOLoss(PolicyLoss):
    """Clipped policy gradient with per-token advantages (SPELL eq. 12; PPO clip, dual clip, k3 KL).

    With `dual_clip` 0 it is PPO's (Schulman et al. 2017, eq. 7).
    """

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


class ReinforceLoss(PolicyLoss):
    """Policy gradient without a ratio: -A log p (Williams 1992), for tokens of the weights that are trained."""

    type: Literal["reinforce"] = "reinforce"
    """Which loss this is."""
    kl_coef: float = Field(default=0.0, ge=0.0, le=LARGEST)
    """Factor of the k3 estimate of KL(policy, reference); above 0 rows need reference log-probs."""
    entropy_coef: float = Field(default=0.0, ge=0.0, le=LARGEST)
    """Factor of the entropy bonus."""


class DPOLoss(LikelihoodLoss):
    """DPO over pairs of rows (Rafailov et al. 2023, eq. 7); rows need reference log-probs."""

    type: Literal["dpo"] = "dpo"
    """Which loss this is."""
    beta: float = Field(default=0.1, gt=0.0, le=LARGEST)
    """Factor of the log-ratios."""


class ORPOLoss(LikelihoodLoss):
    """ORPO over pairs of rows (Hong et al. 2024, eq. 6 and 7): without a reference model.

    Mean -log p of the better reply's tokens - ratio_coef log sigmoid(log odds of the better - of the worse), the odds
    being p / (1 - p) of p = exp(mean log p of the reply's tokens).
    """

    type: Literal["orpo"] = "orpo"
    """Which loss this is."""
    ratio_coef: float = Field(default=0.1, ge=0.0, le=LARGEST)
    """Factor of the odds ratio's term; lambda in the paper."""


class ImplicitOutcomeLoss(LikelihoodLoss):
    """Cross entropy of outcomes, the logit being a row's sum of log-ratios (Yuan et al. 2024, implicit PRM).

    Weights are 1 on the tokens of a right reply and -1 on those of a wrong one; rows need reference log-probs.
    """

    type: Literal["implicit_outcome"] = "implicit_outcome"
    """Which loss this is."""


class QFunctionLoss(LossBase):
    """Q-RM over pairs of rows: -log sigmoid(beta (mean score of the better - of the worse) - gamma)."""

    type: Literal["q_function"] = "q_function"
    """Which loss this is."""
    beta: float = Field(default=0.2, gt=0.0, le=LARGEST)
    """Factor of the scores."""
    gamma: float = Field(default=2.0, ge=0.0, le=LARGEST)
    """Margin by which a pair must be told apart."""


class OutcomeLoss(LossBase):
    """Bradley-Terry over the last scores of pairs of rows (Ouyang et al. 2022, eq. 1)."""

    type: Literal["outcome"] = "outcome"
    """Which loss this is."""


class GatedLoss(LossBase):
    """Bradley-Terry over the mean sigmoid scores of pairs of rows, times their mean length (PGG-RM)."""

    type: Literal["gated"] = "gated"
    """Which loss this is."""


class StepsLoss(LossBase):
    """Mean squared error of tanh scores at the ends of steps against `targets`, per row, then over rows."""

    type: Literal["steps"] = "steps"
    """Which loss this is."""


class ValueLoss(LossBase):
    """Mean squared error of scores against `targets`, over tokens: a critic's (Schulman et al. 2017, eq. 9)."""

    type: Literal["value"] = "value"
    """Which loss this is."""
    clip: float = Field(default=0.0, ge=0.0, le=LARGEST)
    """Above 0: the larger error of the score and of the score clipped to `old_scores` -+ clip (PPO2); rows need
    `old_scores`."""


LossSpec = Annotated[
    SFTLoss
    | GRPOLoss
    | ReinforceLoss
    | DPOLoss
    | ORPOLoss
    | ImplicitOutcomeLoss
    | QFunctionLoss
    | OutcomeLoss
    | GatedLoss
    | StepsLoss
    | ValueLoss,
    Field(discriminator="type"),
]
"""Any loss term. Those over pairs compare two rows with the same `pair`: weights are 1 on the tokens of the better
reply and -1 on those of the worse."""
