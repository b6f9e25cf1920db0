"""Which of two policies replies better: win rate over pairs that were judged in both orders, and at equal lengths."""

from collections.abc import Sequence

import numpy as np

from methods.qrm_measures import wilson
from protocols.verifier import Comparison

ROUNDING = 1e-6
"""Preferences this near to 1/2 are ties: equal replies in both orders differ in the last bits."""
CERTAIN = 1e-3
"""Preferences this near to 0 and 1 count as that far from them: one judgement must not decide a fit."""


def win_rate(preferences: Sequence[float]) -> tuple[float, float, float]:
    """Share of pairs whose first reply is preferred, ties counting half, and its 95 % Wilson interval."""
    wins = sum(0.5 if abs(one - 0.5) < ROUNDING else float(one > 0.5) for one in preferences)
    return (wins / len(preferences) if len(preferences) else float("nan"), *wilson(wins, len(preferences)))


def at_equal_length(preferences: Sequence[float], longer_by: Sequence[float]) -> float:
    """Mean preference that a logistic fit expects at equal lengths (length-controlled AlpacaEval, Dubois et al.
    2024).

    The logit is a constant and a factor of tanh(difference of lengths / their deviation). NaN without pairs.
    """
    if not len(preferences):
        return float("nan")
    from sklearn.linear_model import LogisticRegression

    chances = np.clip(preferences, CERTAIN, 1 - CERTAIN)
    spread = float(np.std(longer_by)) or 1.0
    features = np.tanh(np.asarray(longer_by, float) / spread).reshape(-1, 1)
    fit = LogisticRegression(C=1e6)
    # Each pair counts as won and as lost, in parts.
    labels = np.repeat([1, 0], len(chances))
    fit.fit(np.concatenate([features, features]), labels, sample_weight=np.concatenate([chances, 1 - chances]))
    return float(fit.predict_proba([[0.0]])[0, 1])


def judged(comparisons: Sequence[Comparison], ones: Sequence[str], others: Sequence[str]) -> dict[str, float]:
    """What a judge thinks of pairs of replies; those that are too long for it are left out and counted."""
    able = [i for i, one in enumerate(comparisons) if one.preference is not None]
    same = [ones[i] == others[i] for i in able]
    found = [comparisons[i].preference or 0.0 for i in able]
    preferences = [0.5 if is_same else one for is_same, one in zip(same, found, strict=True)]
    share, low, high = win_rate(preferences)
    apart = [comparisons[i] for i, is_same in zip(able, same, strict=True) if not is_same]
    agreed = [((one.shown_first or 0.0) > 0.5) == ((one.shown_second or 0.0) > 0.5) for one in apart]
    return {
        "win_rate": share,
        "low": low,
        "high": high,
        "at_equal_length": at_equal_length(preferences, [len(ones[i]) - len(others[i]) for i in able]),
        "preference": float(np.mean(preferences)) if able else float("nan"),
        "same_in_both_orders": float(np.mean(agreed)) if agreed else float("nan"),
        "length_ratio": sum(map(len, ones)) / max(sum(map(len, others)), 1),
        "too_long": float(len(comparisons) - len(able)),
    }
