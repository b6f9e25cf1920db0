"""What Q-RM is judged by: ranking, credit, Pass@k, their intervals, and an alarm. Pure functions."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from methods.spell_maths import pass_at_k

Group = TypeVar("Group")
# Differences of shares that are equal on paper differ by rounding.
ROUNDING = 1e-9


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN if there is none of either.

    Raises ValueError for scores that are not finite.
    """
    from sklearn.metrics import roc_auc_score

    if not len(positive) or not len(negative):
        return math.nan
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    return float(roc_auc_score(labels, np.concatenate([positive, negative])))


def first_error_auc(credits: Sequence[NDArray[np.float64]], scores: Sequence[NDArray[np.float64]]) -> float:
    """Probability that a right decisive token, all before it right, scores above a first error (Q-RM section 5.1).

    Both are float64[T] per reply; credits are exact: 1, -1, or 0 for tokens that neither helped nor hurt.
    Raises ValueError if a reply's arrays differ in length.
    """
    helped: list[float] = []
    hurt: list[float] = []
    for i, (credit_T, score_T) in enumerate(zip(credits, scores, strict=True)):
        if len(credit_T) != len(score_T):
            raise ValueError(f"reply {i}: got {len(score_T)} scores for {len(credit_T)} tokens")
        helped += score_T[credit_T > 0].tolist()
        hurt += score_T[credit_T < 0].tolist()
    return auc(helped, hurt)


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927, "Probable inference"); all of [0, 1] without trials.

    It keeps its level near 0 and 1 and for few trials, where the normal interval does not. Half a success is a tie.
    """
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def bootstrap(
    groups: Sequence[Group],
    statistic: Callable[[Sequence[Group]], float],
    rng: np.random.Generator,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic over groups, which are drawn whole (Efron 1979).

    What belongs to one prompt goes together, as it is not independent. Draws whose statistic is NaN are left out;
    both ends are NaN if there are no others.
    """
    if not groups:
        return math.nan, math.nan
    chosen_DN = rng.integers(len(groups), size=(draws, len(groups)))
    found_D = np.asarray([statistic([groups[i] for i in chosen_N]) for chosen_N in chosen_DN.tolist()])
    found_D = found_D[~np.isnan(found_D)]
    if not len(found_D):
        return math.nan, math.nan
    low, high = np.quantile(found_D, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pass_at_k_interval(
    right: Sequence[int], samples: int, k: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Mean unbiased pass@k over prompts, and its 95 % interval: by bootstrap over prompts, Wilson's with one sample.

    `right`: how many of a prompt's `samples` replies are right. All NaN without prompts.
    """
    if not right:
        return math.nan, math.nan, math.nan
    each = [pass_at_k(samples, count, k) for count in right]
    if samples == 1:
        # Drawn again, prompts of which none is right never say that one might be.
        return (float(np.mean(each)), *wilson(sum(right), len(right)))
    return (float(np.mean(each)), *bootstrap(each, lambda drawn: float(np.mean(drawn)), rng))


def best_of_n(scores: Sequence[Sequence[float]], right: Sequence[Sequence[bool]], n: int) -> float:
    """Share of prompts whose highest scored reply of the first n is right; of equal scores the first counts.

    NaN without prompts.
    """
    picked = [verdicts[int(np.argmax(of[:n]))] for of, verdicts in zip(scores, right, strict=True)]
    return float(np.mean(picked)) if picked else math.nan


def pairwise_accuracy(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float, float]:
    """Share of pairs whose better reply scores above the worse, ties counting half, and its Wilson interval.

    The share is NaN without pairs.
    """
    won = sum(0.5 * ((a > b) + (a >= b)) for a, b in zip(better, worse, strict=True))
    return (won / len(better) if len(better) else math.nan, *wilson(won, len(better)))


def drift_alarm(
    accuracies: Sequence[float], means: Sequence[float], errors: Sequence[float], fall: float = 0.05
) -> bool:
    """Whether a policy exploits its reward: its accuracy has fallen, and the scores of its replies have not.

    All are histories, one entry per test; errors are the standard errors of the mean scores. The alarm rings when the
    latest accuracy is more than `fall` below the best so far, unless the latest mean score is below that at the best
    (the last one, if several are as good) by more than two standard errors of their difference.
    """
    if not len(accuracies) == len(means) == len(errors):
        raise ValueError(f"means, errors: got {len(means)} and {len(errors)} for {len(accuracies)} accuracies")
    if not accuracies:
        return False
    best = max(accuracies)
    at = max(i for i, accuracy in enumerate(accuracies) if accuracy == best)
    noise = 2 * math.hypot(errors[at], errors[-1])
    return best - accuracies[-1] > fall + ROUNDING and means[-1] >= means[at] - noise
