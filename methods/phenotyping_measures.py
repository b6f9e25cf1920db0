"""How good decisions about patients are: precision, recall, F1 with intervals, tests, calibration, a threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 1 << 18
"""Patients, over all draws of the bootstrap, that are held in memory at once."""


class Drawn(NamedTuple):
    """How a labelled patient came into the sample."""

    stratum: str = ""
    """Of which all patients had the same chance."""
    weight: float = 1.0
    """How many patients of the stratum this one stands for."""


@dataclass(frozen=True)
class Counts:
    """Decisions against the truth; weights of a sample make them fractions."""

    tp: float = 0.0
    fp: float = 0.0
    fn: float = 0.0
    tn: float = 0.0

    @property
    def precision(self) -> float:
        """Share of the yes decisions that are right; NaN without any."""
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else math.nan

    @property
    def recall(self) -> float:
        """Share of the ill who were found; NaN if nobody is ill."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else math.nan

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN if nobody is ill or found."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else math.nan

    @property
    def specificity(self) -> float:
        """Share of the healthy who were left alone; NaN if nobody is healthy."""
        return self.tn / (self.tn + self.fp) if self.tn + self.fp else math.nan


def counts(truth: Sequence[bool], found: Sequence[bool], weights: Sequence[float] | None = None) -> Counts:
    """Of each patient truth and decision; `weights`: how many patients each one of a sample stands for."""
    t, f = np.asarray(truth, bool), np.asarray(found, bool)
    w = weights_of(weights, len(t))
    return Counts(*(float(w[mask].sum()) for mask in (t & f, ~t & f, t & ~f, ~t & ~f)))


def weights_of(weights: Sequence[float] | None, size: int) -> NDArray[np.float64]:
    """As float64[N]; without any each patient stands for themselves."""
    return np.ones(size) if weights is None else np.asarray(weights, float)


def bootstrap_f1(
    truth: Sequence[bool],
    found: Sequence[bool],
    *,
    seed: int,
    draws: int = 1000,
    sample: Sequence[Drawn] | None = None,
) -> tuple[float, float]:
    """95 % interval of F1 over patients; (NaN, NaN) where there are none."""
    values = f1_draws(truth, [found], seed=seed, draws=draws, sample=sample)[0]
    return interval(values)


def bootstrap_gain(
    truth: Sequence[bool],
    one: Sequence[bool],
    other: Sequence[bool],
    *,
    seed: int,
    draws: int = 1000,
    sample: Sequence[Drawn] | None = None,
) -> tuple[float, float]:
    """95 % interval of F1(one) - F1(other), paired: both are drawn with the same patients."""
    first, second = f1_draws(truth, [one, other], seed=seed, draws=draws, sample=sample)
    return interval(first - second)


def f1_draws(
    truth: Sequence[bool],
    systems: Sequence[Sequence[bool]],
    *,
    seed: int,
    draws: int,
    sample: Sequence[Drawn] | None = None,
) -> NDArray[np.float64]:
    """F1 of each system on the same resampled patients, float64[S, draws]; NaN where a draw has nobody to find.

    `sample`: how each patient was drawn. Of each stratum as many are drawn again, and they keep their weights.
    """
    t_N, f_SN = np.asarray(truth, bool), np.asarray(systems, bool)
    drawn = [Drawn()] * len(t_N) if sample is None else sample
    w_N, strata_N = np.asarray([one.weight for one in drawn]), np.asarray([one.stratum for one in drawn])
    tp_SN, wrong_SN = w_N * (t_N & f_SN), w_N * (t_N ^ f_SN)
    tp_SD, wrong_SD = np.zeros((len(systems), draws)), np.zeros((len(systems), draws))
    rng = np.random.default_rng(seed)
    for places_M in (np.flatnonzero(strata_N == name) for name in np.unique(strata_N)):
        # The generator gives the same numbers however many rows it is asked for at once.
        rows = max(1, AT_ONCE // len(places_M))
        for first in range(0, draws, rows):
            some = slice(first, min(first + rows, draws))
            places_DM = places_M[rng.integers(len(places_M), size=(some.stop - first, len(places_M)))]
            tp_SD[:, some] += tp_SN[:, places_DM].sum(-1)
            wrong_SD[:, some] += wrong_SN[:, places_DM].sum(-1)
    total_SD = 2 * tp_SD + wrong_SD
    return np.divide(2 * tp_SD, total_SD, out=np.full_like(total_SD, math.nan), where=total_SD > 0)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """2.5 and 97.5 % points of the numbers among the values."""
    known = values[~np.isnan(values)]
    return (
        (float(np.quantile(known, 0.025)), float(np.quantile(known, 0.975))) if len(known) else (math.nan, math.nan)
    )


def mcnemar(truth: Sequence[bool], one: Sequence[bool], other: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test: of patients on whom one system alone is right, is it as often either?

    Of a sample per stratum it counts the patients who were reviewed, each once: there is no exact test of weighted
    ones, and what it says is of these patients, not of those they stand for.
    """
    right, wrong = np.asarray(one, bool) == truth, np.asarray(other, bool) == truth
    return binomial_p(int((right & ~wrong).sum()), int((~right & wrong).sum()))


def binomial_p(one: int, other: int) -> float:
    """Two-sided p of `one` against `other` heads of a fair coin; 1 without any."""
    total = one + other
    tail = sum(math.comb(total, i) for i in range(min(one, other) + 1))
    return min(1.0, 2 * float(Fraction(tail, 2**total)))


def best_threshold(truth: Sequence[bool], scores: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The threshold with the highest F1, midway between two scores; of equal ones the highest.

    For labels that are not those of the test. `weights`: as in counts. Raises ValueError if nobody is ill.
    """
    if not any(truth):
        raise ValueError("no positive label to choose a threshold by")
    levels = sorted(set(scores))
    middle = [(low + high) / 2 for low, high in pairwise(levels)]
    options = [*middle, levels[0] / 2] if levels[0] > 0 else middle or [0.5]
    order = np.argsort(scores)
    below = np.searchsorted(np.asarray(scores, float)[order], options, side="left")
    w = weights_of(weights, len(scores))[order]
    # How many patients, and how many ill ones, are among the first of that order.
    all_of = np.concatenate([[0], np.cumsum(w)])
    ill = np.concatenate([[0], np.cumsum(w * np.asarray(truth, bool)[order])])
    f1 = 2 * (ill[-1] - ill[below]) / (all_of[-1] - all_of[below] + ill[-1])
    return max(zip(f1.tolist(), options, strict=True))[1]


def cross_fitted(
    truth: Sequence[bool], scores: Sequence[float], folds: Sequence[int], weights: Sequence[float] | None = None
) -> tuple[list[bool], dict[int, float]]:
    """Decisions by thresholds that were chosen on the patients of the other folds, and the thresholds."""
    found = [False] * len(truth)
    w = weights_of(weights, len(truth))
    thresholds = {}
    for fold in sorted(set(folds)):
        rest = [i for i, own in enumerate(folds) if own != fold]
        thresholds[fold] = best_threshold([truth[i] for i in rest], [scores[i] for i in rest], w[rest].tolist())
        for i, own in enumerate(folds):
            if own == fold:
                found[i] = scores[i] >= thresholds[fold]
    return found, thresholds


def calibration_error(
    truth: Sequence[bool], scores: Sequence[float], weights: Sequence[float] | None = None, bins: int = 10
) -> float:
    """Mean distance of score and share of ill patients over equal bins of scores, weighted by size (ECE)."""
    if not len(truth):
        return math.nan
    t_N, s_N = np.asarray(truth, float), np.asarray(scores, float)
    place_N = np.minimum((s_N * bins).astype(int), bins - 1)
    w_N = weights_of(weights, len(t_N))
    sums = [abs(float((w_N * (t_N - s_N))[place_N == i].sum())) for i in range(bins)]
    return sum(sums) / float(w_N.sum())


def average_precision(
    truth: Sequence[bool], scores: Sequence[float], weights: Sequence[float] | None = None
) -> float:
    """Area under precision over recall (AUPRC, as sklearn's average_precision_score); NaN if nobody is ill."""
    if not any(truth):
        return math.nan
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(list(truth), list(scores), sample_weight=weights))
