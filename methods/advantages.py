"""Advantages from rewards per token, for any policy-gradient loop. Pure functions over ragged batches.

A batch is one array per reply, float64[T_i] each.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
ROUNDING = 1e-12
"""Share of the largest number below which differences are rounding."""
Normalisation = Literal["centred", "scale_only", "none"]
KL = Literal["abs", "k1", "k3"]


def normalised(rewards: Sequence[Values], how: Normalisation = "centred") -> list[Values]:
    """Rewards over the batch's population standard deviation, less the batch's mean first if `centred`.

    Where all are equal, or there is one token alone, there is nothing to scale by: they are centred at most.
    `centred` is the paper's form (Q-RM section 4, as noted), `scale_only` that of its reference code.
    """
    if how == "none":
        return [reply.copy() for reply in rewards]
    every = np.concatenate([*rewards, np.zeros(0)])
    if not every.size:
        return [reply.copy() for reply in rewards]
    mean = every.mean() if how == "centred" else 0.0
    # Equal numbers differ from their mean by rounding.
    spread = every.std() if np.ptp(every) > ROUNDING * np.abs(every).max() else 0.0
    return [(reply - mean) / (spread if spread > 0 else 1.0) for reply in rewards]


def kl_per_token(logprobs: Values, reference: Values, how: KL = "k3") -> Values:
    """Estimate of KL(policy, reference) at each sampled token, nats (Schulman, "Approximating KL divergence").

    `k1`: the log-ratio r, unbiased. `k3`: exp(-r) - 1 + r, unbiased and never negative. `abs`: |r|, as in Q-RM's
    reference code; no estimate of a KL, but a distance.
    """
    ratio = logprobs - reference
    if how == "abs":
        return np.abs(ratio)
    return ratio if how == "k1" else np.expm1(-ratio) + ratio


def last_token_mean(rewards: Values) -> Values:
    """The reward of the last token replaced by the reply's mean (Q-RM's reference code, REINFORCE)."""
    changed = rewards.copy()
    if len(changed):
        changed[-1] = rewards.mean()
    return changed


def at_last_token(score: float, length: int) -> Values:
    """An outcome's score as a reward: at the last token, 0 before it."""
    rewards = np.zeros(length)
    if length:
        rewards[-1] = score
    return rewards


def returns_to_go(rewards: Values, gamma: float = 1.0) -> Values:
    """Discounted sum of the rewards from each token on (REINFORCE)."""
    return gae(rewards, np.zeros(len(rewards)), gamma, 1.0)


def gae(rewards: Values, values: Values, gamma: float, lam: float) -> Values:
    """Generalised advantage estimates of one reply (Schulman et al. 2016, eq. 16).

    `values`: the critic's, of the states before each token; what follows the last token is worth 0. The critic's
    targets are the estimates plus `values`.
    """
    advantages = np.zeros(len(rewards))
    later, value = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        later = rewards[t] + gamma * value - values[t] + gamma * lam * later
        advantages[t], value = later, values[t]
    return advantages
