"""Q-RM's credit assignment: from scores of replies and tokens to advantages. Pure functions over ragged batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from methods.advantages import Values, at_last_token, gae, kl_per_token, last_token_mean, normalised
from methods.qrm_config import AdvantageConfig, Credit


@dataclass(frozen=True)
class Scored:
    """What rewards one reply: a score of the whole and, where there are any, one of each token, float64[T]."""

    reply: float
    tokens: Values
    adds_up: bool = False
    """Whether the tokens' are rewards that add up to the reply's, as log-ratios do."""


def returns_of(scored: Sequence[Scored], credit: Credit, config: AdvantageConfig) -> list[Values]:
    """Scores of each token as they enter the advantages, float64[T] each (specification, section 2.4).

    `own`: Z, centred and scaled over all tokens of the batch. `copied`: the reply's score on each token, likewise.
    `gae`: rewards; the reply's score, centred and scaled over the batch's replies, at its last token.
    """
    if credit == "own" or (credit == "gae" and all(one.adds_up for one in scored)):
        returns = normalised([one.tokens for one in scored], config.normalisation)
    elif credit == "copied":
        copied = [np.full(len(one.tokens), one.reply) for one in scored]
        returns = normalised(copied, config.normalisation)
    else:
        replies = normalised([np.array([one.reply]) for one in scored], config.normalisation)
        returns = [
            at_last_token(float(score[0]), len(one.tokens)) for score, one in zip(replies, scored, strict=True)
        ]
    if config.last_token == "mean":
        returns = [last_token_mean(one) for one in returns]
    return returns


def less_kl(
    returns: Sequence[Values], logprobs: Sequence[Values], reference: Sequence[Values], config: AdvantageConfig
) -> list[Values]:
    """Returns less the KL to the reference policy at each token."""
    triples = zip(returns, logprobs, reference, strict=True)
    return [one - config.kl_coef * kl_per_token(own, other, config.kl) for one, own, other in triples]


def advantages_of(
    returns: Sequence[Values], values: Sequence[Values] | None, credit: Credit, config: AdvantageConfig
) -> tuple[list[Values], list[Values]]:
    """Advantages and the critic's targets, float64[T] each.

    `gae`: estimates over the rewards. Else A = R - w V, with V over its deviation in the reference's form, and the
    targets are R themselves. Without values A = R.
    """
    if values is None:
        return _whitened(list(returns), config), list(returns)
    if credit == "gae":
        estimates = [gae(r, v, config.gamma, config.lam) for r, v in zip(returns, values, strict=True)]
        targets = [a + v for a, v in zip(estimates, values, strict=True)]
        return _whitened(estimates, config), targets
    if config.baseline_scale == "std":
        values = normalised(values, "scale_only")
    weight = config.baseline_weight
    advantages = [r - weight * v for r, v in zip(returns, values, strict=True)]
    return _whitened(advantages, config), list(returns)


def _whitened(advantages: list[Values], config: AdvantageConfig) -> list[Values]:
    return normalised(advantages, "centred") if config.whiten else advantages
