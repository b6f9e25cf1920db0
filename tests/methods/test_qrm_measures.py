"""Q-RM's measures: worked numbers, and what must hold for any scores."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.qrm_measures import (
    auc,
    best_of_n,
    bootstrap,
    drift_alarm,
    first_error_auc,
    pairwise_accuracy,
    pass_at_k_interval,
    wilson,
)

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_auc() -> None:
    assert auc([3, 4], [1, 2]) == 1
    assert auc([1, 2], [3, 4]) == 0
    assert auc([1, 3], [2]) == 0.5
    assert auc([0.5], [0.5]) == 0.5
    # Of six pairs four are in order and one is tied.
    assert auc([1, 2, 3], [1, 1.5]) == pytest.approx(4.5 / 6)
    assert math.isnan(auc([], [1])) and math.isnan(auc([1], []))
    with pytest.raises(ValueError, match="NaN"):
        auc([math.nan], [1])


@given(SCORES, SCORES)
def test_auc_is_the_share_of_pairs_in_order(positive: list[float], negative: list[float]) -> None:
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a in positive for b in negative]
    assert auc(positive, negative) == pytest.approx(np.mean(won))
    assert auc(negative, positive) == pytest.approx(1 - np.mean(won))


def test_first_error_auc() -> None:
    credits = [np.array([1.0, 0, 1, 0]), np.array([1.0, 0, -1, 0, 0]), np.array([-1.0])]
    scores = [np.array([2.0, -9, 1, 9]), np.array([0.0, 9, -1, 9, 9]), np.array([0.5])]
    # Helped: 2, 1, 0. Hurt: -1, 0.5. Five of six pairs are in order.
    assert first_error_auc(credits, scores) == pytest.approx(5 / 6)
    assert math.isnan(first_error_auc(credits[:1], scores[:1]))
    assert math.isnan(first_error_auc([], []))
    with pytest.raises(ValueError, match="reply 1: got 1 scores for 5 tokens"):
        first_error_auc(credits, [scores[0], scores[2], scores[2]])


def test_wilson() -> None:
    assert wilson(8, 10) == pytest.approx((0.490157, 0.943320), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, 0.277541), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.722459, 1), abs=1e-6)
    assert wilson(50, 100) == pytest.approx((0.403830, 0.596170), abs=1e-6)
    assert wilson(0, 0) == (0, 1)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_are_what_the_share_is_just_compatible_with(case: tuple[int, int]) -> None:
    successes, trials = case
    low, high = wilson(successes, trials)
    share = successes / trials
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / trials, abs=1e-9)
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low))


def test_bootstrap() -> None:
    def share(drawn: Sequence[int]) -> float:
        return float(np.mean(drawn))

    low, high = bootstrap([0] * 50 + [1] * 50, share, rng())
    # The normal interval of the same share is 0.402 to 0.598.
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.015)
    assert (low, high) == bootstrap([0] * 50 + [1] * 50, share, rng())
    narrow = bootstrap([0] * 50 + [1] * 50, share, rng(), level=0.5)
    assert low < narrow[0] < 0.5 < narrow[1] < high
    assert bootstrap([1, 1, 1], share, rng(), draws=10) == (1, 1)


def test_bootstrap_without_a_value() -> None:
    assert all(map(math.isnan, bootstrap([], lambda _: 1.0, rng())))
    assert all(map(math.isnan, bootstrap([1], lambda _: math.nan, rng())))
    # A draw of one kind alone has no AUC, and says nothing against the others.
    sides = bootstrap([0, 1], lambda drawn: 0.7 if len(set(drawn)) == 2 else math.nan, rng())
    assert sides == pytest.approx((0.7, 0.7))


def test_groups_are_drawn_whole() -> None:
    def first(drawn: Sequence[list[int]]) -> float:
        assert all(group in ([1, 2], [3]) for group in drawn) and len(drawn) == 2
        return float(drawn[0][0])

    assert bootstrap([[1, 2], [3]], first, rng()) == (1, 3)


def test_pass_at_k() -> None:
    right = [0, 1, 2, 4]
    assert pass_at_k_interval(right, 4, 1, rng())[0] == pytest.approx(7 / 16)
    mean, low, high = pass_at_k_interval(right, 4, 2, rng())
    # 0, 1 - 3/6, 1 - 1/6, 1.
    assert mean == pytest.approx((0.5 + 5 / 6 + 1) / 4)
    assert 0 <= low < mean < high <= 1
    assert pass_at_k_interval([4, 4], 4, 2, rng()) == (1, 1, 1)
    assert all(map(math.isnan, pass_at_k_interval([], 4, 2, rng())))


def test_best_of_n() -> None:
    scores = [[0.0, 2, 1], [3.0, 3, 4], [1.0, 0, 0]]
    right = [[False, True, False], [False, True, True], [True, False, False]]
    assert best_of_n(scores, right, 1) == pytest.approx(1 / 3)
    # The first of equal scores is wrong.
    assert best_of_n(scores, right, 2) == pytest.approx(2 / 3)
    assert best_of_n(scores, right, 3) == best_of_n(scores, right, 9) == 1
    assert math.isnan(best_of_n([], [], 2))


def test_pairwise_accuracy() -> None:
    share, low, high = pairwise_accuracy([1, 2, 3, 0], [0, 2, 1, 1])
    assert share == 2.5 / 4
    assert (low, high) == pytest.approx(wilson(2.5, 4))
    assert pairwise_accuracy([1] * 8 + [0] * 2, [0.5] * 10) == pytest.approx((0.8, 0.490157, 0.943320), abs=1e-6)
    share, low, high = pairwise_accuracy([], [])
    assert math.isnan(share) and (low, high) == (0, 1)
    with pytest.raises(ValueError):
        pairwise_accuracy([1], [])


@pytest.mark.parametrize(
    ("accuracies", "scores", "rings"),
    [
        # Exploited: right less often, scored higher.
        ([0.3, 0.8, 0.74], [1.0, 2.0, 2.5], True),
        ([0.3, 0.8, 0.78, 0.6], [1.0, 2.0, 2.5, 3.0], True),
        # It gets worse, and the scores say so.
        ([0.3, 0.8, 0.74], [1.0, 2.0, 1.9], False),
        # Scores are compared with those at the best, not with those just before.
        ([0.8, 0.7, 0.7], [2.0, 5.0, 3.0], True),
        # A fall of 0.05 is no more than 0.05, whatever the rounding.
        ([0.8, 0.75], [1.0, 2.0], False),
        # It has recovered.
        ([0.8, 0.6, 0.79], [1.0, 3.0, 3.0], False),
        # It learns.
        ([0.3, 0.5, 0.8], [1.0, 2.0, 3.0], False),
        # Of two bests the last counts: since then scores have fallen.
        ([0.8, 0.8, 0.7], [1.0, 3.0, 2.0], False),
        ([0.8], [1.0], False),
        ([], [], False),
    ],
)
def test_drift_alarm(accuracies: list[float], scores: list[float], rings: bool) -> None:
    assert drift_alarm(accuracies, scores, [0.0] * len(scores)) is rings


def test_the_alarms_threshold() -> None:
    assert drift_alarm([0.8, 0.77], [1, 2], [0, 0], fall=0.02)
    assert not drift_alarm([0.8, 0.7], [1, 2], [0, 0], fall=0.2)
    # A score that fell by less than twice its noise, 2 * sqrt(0.03^2 + 0.04^2) = 0.1, has not fallen.
    assert drift_alarm([0.8, 0.7], [1, 0.91], [0.03, 0.04])
    assert not drift_alarm([0.8, 0.7], [1, 0.89], [0.03, 0.04])
    with pytest.raises(ValueError, match="means, errors: got 1 and 2 for 2"):
        drift_alarm([0.8, 0.7], [1], [0, 0])


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-9, 9)), max_size=8))
def test_the_alarm_needs_a_fall(history: list[tuple[float, float]]) -> None:
    accuracies, means = [a for a, _ in history], [s for _, s in history]
    if drift_alarm(accuracies, means, [0.0] * len(means)):
        best = max(accuracies)
        assert best - accuracies[-1] > 0.05
        assert means[-1] >= [mean for accuracy, mean in history if accuracy == best][-1]


def test_one_sample_each_has_wilsons_interval() -> None:
    rng = np.random.default_rng(0)
    assert pass_at_k_interval([0] * 20, 1, 1, rng) == (0.0, *wilson(0, 20))
    assert pass_at_k_interval([1, 0, 1, 0], 1, 1, rng) == (0.5, *wilson(2, 4))
