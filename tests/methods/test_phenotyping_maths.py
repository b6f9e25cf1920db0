"""Worked numbers of the phenotyping specification (section 5), and what must hold of any numbers."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from methods import phenotyping_measures
from methods.phenotyping_measures import (
    Counts,
    Drawn,
    average_precision,
    best_threshold,
    binomial_p,
    bootstrap_f1,
    bootstrap_gain,
    calibration_error,
    counts,
    cross_fitted,
    f1_draws,
    mcnemar,
)
from methods.phenotyping_reduce import ReduceConfig, Reducer, decide, patient_score
from methods.qrm_measures import wilson

FORMULAS: list[Reducer] = ["max", "count", "mean", "noisy_or", "log_odds", "recency"]


@pytest.mark.parametrize(
    ("by", "expected"), [("max", 0.9), ("mean", 0.5), ("count", 0.0), ("noisy_or", 0.840064), ("log_odds", 0.786061)]
)
def test_reduces_as_the_specification_says(by: Reducer, expected: float) -> None:
    assert patient_score([0.9, 0.2, 0.4], ReduceConfig(by=by)) == pytest.approx(expected, abs=1e-6)


def test_recency_reads_the_last_dates() -> None:
    config = ReduceConfig(by="recency", recent=2)
    dates = ["2020-01-01", "", "2021-05-01", "2022-01-01"]
    assert patient_score([0.9, 0.8, 0.3, 0.1], config, dates) == 0.3
    assert patient_score([0.9, 0.8], config, ["", ""]) == 0.9
    # Of the same date both count, however they are ordered.
    assert patient_score([0.7, 0.2, 0.1], config, ["2020", "2020", "2021"]) == 0.7


@given(st.lists(st.floats(0, 1), max_size=30), st.sampled_from(FORMULAS), st.randoms())
def test_scores_are_shares_and_do_not_depend_on_the_order(scores: list[float], by: Reducer, rng: object) -> None:
    config = ReduceConfig(by=by)
    dates = [f"20{i % 7:02d}" for i in range(len(scores))]
    score = patient_score(scores, config, dates)
    assert 0 <= score <= 1
    both = list(zip(scores, dates, strict=True))
    rng.shuffle(both)  # type: ignore[attr-defined]
    assert patient_score([p for p, _ in both], config, [d for _, d in both]) == score


def test_false_alarms_grow_with_the_snippets_for_max_and_not_for_count() -> None:
    # Specification 2.6: at a false-positive rate of 0.03 per snippet.
    f = 0.03
    for n, any_of, two_of in [(5, 0.1413, 0.0085), (20, 0.4562, 0.1198), (60, 0.8392, 0.5408)]:
        assert 1 - (1 - f) ** n == pytest.approx(any_of, abs=5e-5)
        assert 1 - (1 - f) ** n - n * f * (1 - f) ** (n - 1) == pytest.approx(two_of, abs=5e-5)


def test_decides() -> None:
    config = ReduceConfig(band=(0.35, 0.65))
    assert [decide(s, 1, config) for s in (0.1, 0.35, 0.5, 0.65, 0.7)] == ["no"] + ["uncertain"] * 3 + ["yes"]
    assert decide(0.0, 0, config) == "no_evidence"
    assert decide(0.5, 2, ReduceConfig()) == "yes"


def test_metrics_of_the_specification() -> None:
    one, other = Counts(45, 15, 15), Counts(40, 29, 20)
    assert (one.precision, one.recall, one.f1) == (0.75, 0.75, 0.75)
    assert [other.precision, other.recall, other.f1] == pytest.approx([0.5797, 0.6667, 0.6202], abs=5e-5)
    assert binomial_p(10, 25) == binomial_p(25, 10) == pytest.approx(0.016674, abs=1e-6)
    assert wilson(45, 60) == pytest.approx((0.6277, 0.8422), abs=1e-4)


def test_a_reviewed_sample_is_weighted_by_its_rate() -> None:
    # Of 400 flagged 100 were reviewed, of 9,600 others 200.
    truth = [True] * 75 + [False] * 25 + [True] * 2 + [False] * 198
    found = [True] * 100 + [False] * 200
    weighted = counts(truth, found, [4.0] * 100 + [48.0] * 200)
    assert (weighted.tp, weighted.fn) == (300, 96)
    assert [weighted.recall, weighted.f1] == pytest.approx([0.7576, 0.7538], abs=5e-5)
    assert counts(truth, found).recall != pytest.approx(weighted.recall, abs=0.1)


def test_nothing_to_count_is_not_a_number() -> None:
    assert all(math.isnan(v) for v in (Counts().precision, Counts().recall, Counts().f1, Counts().specificity))
    assert binomial_p(0, 0) == 1.0
    assert all(map(math.isnan, bootstrap_f1([], [], seed=0)))


def test_mcnemar_counts_patients_on_whom_one_alone_is_right() -> None:
    truth = [True] * 35 + [False] * 5
    one = [True] * 10 + [False] * 25 + [False] * 5
    other = [False] * 10 + [True] * 25 + [False] * 5
    assert mcnemar(truth, one, other) == pytest.approx(0.016674, abs=1e-6)


def test_bootstrap_intervals() -> None:
    truth = [True] * 30 + [False] * 70
    good = [True] * 27 + [False] * 3 + [True] * 3 + [False] * 67
    bad = [True] * 15 + [False] * 15 + [True] * 15 + [False] * 55
    low, high = bootstrap_f1(truth, good, seed=1)
    assert low < 0.9 < high
    low, high = bootstrap_gain(truth, good, bad, seed=1)
    assert 0 < low < 0.4 < high
    assert bootstrap_gain(truth, good, good, seed=1) == (0.0, 0.0)


def systems(size: int = 97) -> tuple[list[bool], list[bool], list[bool]]:
    """A truth, and two systems that are often right."""
    rng = random.Random(7)
    truth = [rng.random() < 0.3 for _ in range(size)]
    return truth, [t != (rng.random() < 0.2) for t in truth], [t != (rng.random() < 0.35) for t in truth]


def test_intervals_stay_what_they_were() -> None:
    # Written down before draws were made some at a time; docs quote such intervals.
    truth, one, other = systems()
    assert bootstrap_f1(truth, one, seed=3) == (0.49230769230769234, 0.7605633802816901)
    assert bootstrap_gain(truth, one, other, seed=4, draws=333) == (-0.17523566610841138, 0.14945209197719958)
    assert bootstrap_f1(truth, one, seed=3, sample=[Drawn()] * 97) == (0.49230769230769234, 0.7605633802816901)


@pytest.mark.parametrize("at_once", [1, 97, 200, 97 * 1000])
def test_draws_do_not_depend_on_how_many_are_made_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, one, other = systems()
    sample = [Drawn("flagged", 4.0) if found else Drawn("other", 48.5) for found in one]
    whole = [f1_draws(truth, [one, other], seed=5, draws=101, sample=how) for how in (None, sample)]
    monkeypatch.setattr(phenotyping_measures, "AT_ONCE", at_once)
    for before, how in zip(whole, (None, sample), strict=True):
        assert np.array_equal(f1_draws(truth, [one, other], seed=5, draws=101, sample=how), before)


def test_the_bootstrap_draws_within_strata_and_keeps_weights() -> None:
    # All of a stratum are alike, so each draw is the sample itself.
    truth, found = [True] * 30 + [True] * 20, [True] * 30 + [False] * 20
    sample = [Drawn("flagged", 4.0)] * 30 + [Drawn("other", 48.0)] * 20
    f1 = counts(truth, found, [one.weight for one in sample]).f1
    assert f1 == 2 * 120 / (2 * 120 + 960)
    assert bootstrap_f1(truth, found, seed=0, sample=sample) == (f1, f1)
    low, high = bootstrap_f1(truth, found, seed=0, sample=[Drawn("", one.weight) for one in sample])
    assert low < f1 < high


WEIGHTED = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.9, 1.0]), st.integers(1, 4)),
    min_size=1,
    max_size=20,
)


@given(WEIGHTED)
def test_a_weight_is_as_many_patients(rows: list[tuple[bool, float, int]]) -> None:
    truth, scores, weights = map(list, zip(*rows, strict=True))
    whole = [(ill, score) for ill, score, n in rows for _ in range(n)]
    all_truth, all_scores = map(list, zip(*whole, strict=True))
    found, all_found = [score >= 0.5 for score in scores], [score >= 0.5 for score in all_scores]
    assert counts(truth, found, weights) == counts(all_truth, all_found)
    for measure in (calibration_error, average_precision):
        assert measure(truth, scores, weights) == pytest.approx(measure(all_truth, all_scores), nan_ok=True)
    if any(truth):
        assert best_threshold(truth, scores, weights) == best_threshold(all_truth, all_scores)
        # In two folds, of which the other one has an ill patient.
        folds, all_folds = [0] * len(rows) + [1] * len(rows), [0] * len(whole) + [1] * len(whole)
        _, chosen = cross_fitted(truth * 2, scores * 2, folds, weights * 2)
        assert chosen == cross_fitted(all_truth * 2, all_scores * 2, all_folds)[1]


def test_a_threshold_is_chosen_on_other_patients() -> None:
    truth, scores = [False, False, True, True], [0.1, 0.4, 0.6, 0.9]
    assert best_threshold(truth, scores) == 0.5
    with pytest.raises(ValueError, match="no positive label"):
        best_threshold([False], [0.3])
    # The odd one out of a fold has no say in its own threshold.
    found, thresholds = cross_fitted([*truth, *truth], [*scores, 0.2, 0.3, 0.7, 0.35], [0] * 4 + [1] * 4)
    assert thresholds[1] == 0.5 and found[7] is False
    assert thresholds[0] == pytest.approx(0.325) and found[1] is True


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([0.0, 5e-324, 0.1, 0.5, 0.9, 1.0]) | st.floats(0, 1)), max_size=40
    )
)
def test_the_best_threshold_is_that_of_trying_each(rows: list[tuple[bool, float]]) -> None:
    truth, scores = [True, *(ill for ill, _ in rows)], [0.5, *(score for _, score in rows)]
    levels = sorted(set(scores))
    middle = [(low + high) / 2 for low, high in pairwise(levels)]
    options = [*middle, levels[0] / 2] if levels[0] > 0 else middle or [0.5]
    expected = max(options, key=lambda t: (counts(truth, [score >= t for score in scores]).f1, t))
    assert best_threshold(truth, scores) == expected


@pytest.mark.parametrize("band", [(0.7, 0.3), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5)])
def test_a_band_that_is_none_is_refused(band: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="expected 0 <= low <= high <= 1"):
        ReduceConfig(band=band)


def test_calibration_and_average_precision() -> None:
    assert calibration_error([True, False], [0.8, 0.8]) == pytest.approx(0.3)
    assert calibration_error([True, False], [1.0, 0.0]) == 0.0
    assert average_precision([True, False, True], [0.9, 0.8, 0.7]) == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(average_precision([False], [0.5]))
