"""From the scores of a pool's answers to what a router learns (specification section 2.2)."""

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def targets_of(scores_BT: Scores, share: float) -> Scores:
    """1 for each candidate whose score is at least `share` of its query's best, else 0: float64[B, T].

    Several may be right. Where nobody scores, all are: the choice makes no difference.
    """
    right_BT: Scores = (scores_BT >= share * scores_BT.max(axis=1, keepdims=True)).astype(np.float64)
    return right_BT


def weights_of(scores_BT: Scores, dead_zone: float) -> Scores:
    """0 for queries whose scores differ by no more than the dead zone, if there is one, else 1: float64[B]."""
    if not dead_zone:
        return np.ones(len(scores_BT))
    weights_B: Scores = (np.ptp(scores_BT, axis=1) > dead_zone).astype(np.float64)
    return weights_B
