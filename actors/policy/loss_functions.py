"""One pure function per loss term over tokens: from log-probs or scores to a loss per token.

All arrays are [B, T]; entry t belongs to token t of the row. Reduction, factors and micro-batches are the
trainer's business, so the functions hold nothing but the formula.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from protocols.losses import GRPOLoss, PolicyLoss, ReinforceLoss, SFTLoss, StepsLoss, ValueLoss

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class TokenBatch:
    """What a loss may look at, float32[B, T] each; NaN where a row does not have it."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    scores_BT: Tensor
    advantages_BT: Tensor
    sampled_logprobs_BT: Tensor
    reference_logprobs_BT: Tensor
    targets_BT: Tensor
    old_scores_BT: Tensor


@dataclass(frozen=True)
class TokenLoss:
    """Loss per token, and values per token whose mean is worth reporting, float32[B, T] each."""

    loss_BT: Tensor
    metrics: dict[str, Tensor]


def token_loss(spec: PolicyLoss | StepsLoss | ValueLoss, batch: TokenBatch) -> TokenLoss:
    """The loss per token of any term over tokens."""
    match spec:
        case GRPOLoss():
            return grpo(spec, batch)
        case ReinforceLoss():
            return reinforce(spec, batch)
        case ValueLoss():
            return value(spec, batch)
        case StepsLoss():
            return TokenLoss((batch.scores_BT.tanh() - batch.targets_BT).square(), {})
        case SFTLoss():
            return sft(spec, batch)
    raise TypeError(f"no function for {type(spec).__name__}")


def sft(spec: SFTLoss, batch: TokenBatch) -> TokenLoss:
    """-log p of each token."""
    return TokenLoss(-batch.logprobs_BT, {"entropy": batch.entropy_BT.detach()})


def grpo(spec: GRPOLoss, batch: TokenBatch) -> TokenLoss:
    """Clipped policy gradient with dual clip, k3 KL and entropy bonus (SPELL section 2.7, PPO eq. 7).

    rho = exp(clamp(logp - logp_old, -20, 20)); l = max(-A rho, -A clip(rho)); for A < 0 also min(l, -c A).
    Where sampled log-probs are NaN the token is on-policy: rho is 1 and only its gradient counts.
    """
    advantages_BT = batch.advantages_BT
    old_BT = torch.where(batch.sampled_logprobs_BT.isnan(), batch.logprobs_BT.detach(), batch.sampled_logprobs_BT)
    log_ratio_BT = (batch.logprobs_BT - old_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    loss_BT = torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)
    if spec.dual_clip:
        bounded_BT = torch.minimum(loss_BT, -spec.dual_clip * advantages_BT)
        loss_BT = torch.where(advantages_BT < 0, bounded_BT, loss_BT)
    metrics = {
        "ratio": ratio_BT.detach(),
        "ratio_squared": ratio_BT.detach().square(),
        "clip_share": (ratio_BT != clipped_BT).float(),
        "sampler_gap": log_ratio_BT.detach().abs(),
        "entropy": batch.entropy_BT.detach(),
    }
    return _regularised(spec, TokenLoss(loss_BT, metrics), batch)


def reinforce(spec: ReinforceLoss, batch: TokenBatch) -> TokenLoss:
    """-A log p (Williams 1992)."""
    per_token = TokenLoss(-batch.advantages_BT * batch.logprobs_BT, {"entropy": batch.entropy_BT.detach()})
    return _regularised(spec, per_token, batch)


def _regularised(spec: GRPOLoss | ReinforceLoss, per_token: TokenLoss, batch: TokenBatch) -> TokenLoss:
    """With the KL to the reference and the bonus for entropy."""
    loss_BT, metrics = per_token.loss_BT, dict(per_token.metrics)
    if spec.kl_coef:
        kl_BT = k3(batch.logprobs_BT, batch.reference_logprobs_BT)
        loss_BT = loss_BT + spec.kl_coef * kl_BT
        metrics["kl"] = kl_BT.detach()
    if spec.entropy_coef:
        loss_BT = loss_BT - spec.entropy_coef * batch.entropy_BT
    return TokenLoss(loss_BT, metrics)


def value(spec: ValueLoss, batch: TokenBatch) -> TokenLoss:
    """(V - target)^2; with a clip the larger error of V and of V clipped to its old value -+ clip."""
    error_BT = (batch.scores_BT - batch.targets_BT).square()
    metrics = {"value": batch.scores_BT.detach(), "target": batch.targets_BT}
    if not spec.clip:
        return TokenLoss(error_BT, metrics)
    moved_BT = (batch.scores_BT - batch.old_scores_BT).clamp(-spec.clip, spec.clip)
    clipped_BT = (batch.old_scores_BT + moved_BT - batch.targets_BT).square()
    metrics["clip_share"] = (clipped_BT > error_BT).float()
    return TokenLoss(torch.maximum(error_BT, clipped_BT), metrics)


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(policy, reference) per token: exp(d) - d - 1 with d = reference - policy."""
    difference = reference_logprobs - logprobs
    return difference.expm1() - difference
