"""Win rates from judgements in both orders, and at equal lengths."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.qrm_measures import wilson
from methods.seft_judge import at_equal_length, judged, win_rate
from protocols.verifier import Comparison


def test_win_rate() -> None:
    assert win_rate([0.9, 0.6, 0.5, 0.1]) == (2.5 / 4, *wilson(2.5, 4))
    assert math.isnan(win_rate([])[0])


def test_a_judge_that_likes_length_alone_finds_equal_lengths_equal() -> None:
    longer_by = np.random.default_rng(0).normal(30, 40, 500)
    preferences = 1 / (1 + np.exp(-2 * np.tanh(longer_by / longer_by.std())))
    assert np.mean(preferences) > 0.6
    assert at_equal_length(preferences.tolist(), longer_by.tolist()) == pytest.approx(0.5, abs=1e-3)


def test_a_judge_that_likes_the_reply_likes_it_at_equal_length() -> None:
    longer_by = np.random.default_rng(0).normal(30, 40, 500)
    logits = 1.0 + 2 * np.tanh(longer_by / longer_by.std())
    found = at_equal_length((1 / (1 + np.exp(-logits))).tolist(), longer_by.tolist())
    assert found == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)


@given(st.lists(st.floats(0, 1), min_size=1))
def test_where_all_are_as_long_it_is_the_mean(preferences: list[float]) -> None:
    clipped = np.clip(preferences, 1e-3, 1 - 1e-3)
    found = at_equal_length(preferences, [0.0] * len(preferences))
    assert found == pytest.approx(float(clipped.mean()), abs=2e-3)


def test_what_a_judge_says_of_two_policies() -> None:
    comparisons = [
        Comparison(uid="a", preference=0.8, shown_first=0.9, shown_second=0.7),
        Comparison(uid="b", preference=0.55, shown_first=0.9, shown_second=0.2),
        Comparison(uid="c"),
        Comparison(uid="d", preference=0.2, shown_first=0.3, shown_second=0.1),
    ]
    found = judged(comparisons, ["xx", "xx", "xx", "xx"], ["x", "x", "x", "x"])
    assert (found["win_rate"], found["low"], found["high"]) == (2 / 3, *wilson(2, 3))
    assert found["same_in_both_orders"] == pytest.approx(2 / 3)
    # The same reply twice is a tie, whatever the last bits say, and tells nothing of places.
    equal = judged(comparisons[:2], ["x", "x"], ["x", "x"])
    assert equal["win_rate"] == 0.5 and math.isnan(equal["same_in_both_orders"])
    assert win_rate([0.5 + 1e-9, 0.5 - 1e-9])[0] == 0.5
    assert (found["too_long"], found["length_ratio"]) == (1, 2)
    assert found["preference"] == pytest.approx((0.8 + 0.55 + 0.2) / 3)
