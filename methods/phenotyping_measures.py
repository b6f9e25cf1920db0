"""How good decisions about patients are: precision, recall, F1 with intervals, tests, calibration, a threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


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
    w = np.ones(len(t)) if weights is None else np.asarray(weights, float)
    return Counts(*(float(w[mask].sum()) for mask in (t & f, ~t & f, t & ~f, ~t & ~f)))


def bootstrap_f1(
    truth: Sequence[bool], found: Sequence[bool], *, seed: int, draws: int = 1000
) -> tuple[float, float]:
    """95 % interval of F1 over patients; (NaN, NaN) where there are none."""
    values = f1_draws(truth, [found], seed=seed, draws=draws)[0]
    return interval(values)


def bootstrap_gain(
    truth: Sequence[bool], one: Sequence[bool], other: Sequence[bool], *, seed: int, draws: int = 1000
) -> tuple[float, float]:
    """95 % interval of F1(one) - F1(other), paired: both are drawn with the same patients."""
    first, second = f1_draws(truth, [one, other], seed=seed, draws=draws)
    return interval(first - second)


def f1_draws(
    truth: Sequence[bool], systems: Sequence[Sequence[bool]], *, seed: int, draws: int
) -> NDArray[np.float64]:
    """F1 of each system on the same resampled patients, float64[S, draws]; NaN where a draw has nobody to find."""
    t_N, f_SN = np.asarray(truth, bool), np.asarray(systems, bool)
    places_DN = np.random.default_rng(seed).integers(len(t_N), size=(draws, len(t_N))) if len(t_N) else None
    if places_DN is None:
        return np.full((len(systems), draws), math.nan)
    t_DN, f_SDN = t_N[places_DN], f_SN[:, places_DN]
    tp_SD, wrong_SD = (t_DN & f_SDN).sum(-1), (t_DN ^ f_SDN).sum(-1)
    total_SD = 2 * tp_SD + wrong_SD
    return np.where(total_SD > 0, 2 * tp_SD / np.maximum(total_SD, 1), np.nan)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """2.5 and 97.5 % points of the numbers among the values."""
    known = values[~np.isnan(values)]
    return (
        (float(np.quantile(known, 0.025)), float(np.quantile(known, 0.975))) if len(known) else (math.nan, math.nan)
    )


def mcnemar(truth: Sequence[bool], one: Sequence[bool], other: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test: of patients on whom one system alone is right, is it as often either?"""
    right, wrong = np.asarray(one, bool) == truth, np.asarray(other, bool) == truth
    return binomial_p(int((right & ~wrong).sum()), int((~right & wrong).sum()))


def binomial_p(one: int, other: int) -> float:
    """Two-sided p of `one` against `other` heads of a fair coin; 1 without any."""
    total = one + other
    tail = sum(math.comb(total, i) for i in range(min(one, other) + 1))
    return min(1.0, 2 * float(Fraction(tail, 2**total)))


def best_threshold(truth: Sequence[bool], scores: Sequence[float]) -> float:
    """The threshold with the highest F1, midway between two scores; of equal ones the highest.

    For labels that are not those of the test. Raises ValueError if nobody is ill.
    """
    if not any(truth):
        raise ValueError("no positive label to choose a threshold by")
    levels = sorted(set(scores))
    middle = [(low + high) / 2 for low, high in pairwise(levels)]
    options = [*middle, levels[0] / 2] if levels[0] > 0 else middle or [0.5]
    order = np.argsort(scores)
    # How many patients, and how many ill ones, have a score below each option.
    below = np.searchsorted(np.asarray(scores, float)[order], options, side="left")
    ill = np.concatenate([[0], np.cumsum(np.asarray(truth, bool)[order])])
    f1 = 2 * (ill[-1] - ill[below]) / (len(scores) - below + ill[-1])
    return max(zip(f1.tolist(), options, strict=True))[1]


def cross_fitted(
    truth: Sequence[bool], scores: Sequence[float], folds: Sequence[int]
) -> tuple[list[bool], dict[int, float]]:
    """Decisions by thresholds that were chosen on the patients of the other folds, and the thresholds."""
    found = [False] * len(truth)
    thresholds = {}
    for fold in sorted(set(folds)):
        rest = [i for i, own in enumerate(folds) if own != fold]
        thresholds[fold] = best_threshold([truth[i] for i in rest], [scores[i] for i in rest])
        for i, own in enumerate(folds):
            if own == fold:
                found[i] = scores[i] >= thresholds[fold]
    return found, thresholds


def calibration_error(truth: Sequence[bool], scores: Sequence[float], bins: int = 10) -> float:
    """Mean distance of score and share of ill patients over equal bins of scores, weighted by size (ECE)."""
    if not len(truth):
        return math.nan
    t_N, s_N = np.asarray(truth, float), np.asarray(scores, float)
    place_N = np.minimum((s_N * bins).astype(int), bins - 1)
    sums = [abs(float((t_N - s_N)[place_N == i].sum())) for i in range(bins)]
    return sum(sums) / len(t_N)


def average_precision(truth: Sequence[bool], scores: Sequence[float]) -> float:
    """Area under precision over recall (AUPRC, as sklearn's average_precision_score); NaN if nobody is ill."""
    if not any(truth):
        return math.nan
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(list(truth), list(scores)))
