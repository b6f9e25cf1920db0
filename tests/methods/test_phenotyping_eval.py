"""What an evaluation says, by hand."""

import math

import pytest

from methods.phenotyping_decide import Cited, Decided
from methods.phenotyping_definition import Definition
from methods.phenotyping_eval import MANY, Alarms, alarms, evaluate
from methods.phenotyping_reduce import ReduceConfig


def evidence(*scores: float | None) -> list[Cited]:
    return [Cited(note_id="n", start=0, end=1, quote="x", matches=[(0, 1)], p=p, answer="") for p in scores]


def test_false_alarms_by_number_of_questions() -> None:
    healthy = [evidence(), evidence(0.1), evidence(0.5), evidence(0.2, 0.9), evidence(0.6, 0.7), evidence(0.4, None)]
    rate, found = alarms(healthy, ReduceConfig())
    # Four of eight snippets reach the threshold; what was not answered does not.
    assert rate == 0.5
    assert found == [Alarms(1, 2, 0.5, 0.0, 0.5), Alarms(2, 3, 2 / 3, 1 / 3, 0.75)]
    rate, found = alarms(healthy, ReduceConfig(threshold=0.65, count=1))
    assert rate == 0.25
    assert [(one.max, one.count) for one in found] == [(0.0, 0.0), (2 / 3, 2 / 3)]


def test_long_charts_are_one_entry() -> None:
    healthy = [evidence(*[0.9] * MANY), evidence(*[0.1] * (MANY + 2)), evidence(*[0.1] * (MANY - 1))]
    rate, found = alarms(healthy, ReduceConfig())
    assert rate == pytest.approx(6 / 19)
    assert [(one.questions, one.patients, one.max, one.count) for one in found] == [(5, 1, 0, 0), (6, 2, 0.5, 0.5)]
    assert found[1].expected == pytest.approx((1 - (13 / 19) ** 6 + 1 - (13 / 19) ** 8) / 2)


def test_nobody_is_healthy() -> None:
    rate, found = alarms([], ReduceConfig())
    assert math.isnan(rate) and found == []


def test_an_evaluation_counts_false_alarms_of_the_healthy_alone() -> None:
    disease = Definition(phenotype_id="v", version="1", name="V", description="Has v.", terms=["veltosis"])
    charts = {"ill": evidence(0.9, 0.9), "well": evidence(0.9, 0.2), "unknown": evidence(0.9)}
    decisions = {
        name: Decided(
            patient_id=name, phenotype_id="v", version="1", definition="", decision="yes", score=0.9, reducer="max",
            n_notes=2, n_found=len(own), n_groups=len(own), n_sent=len(own), evidence=own, model="", prompt="",
            run="",
        )
        for name, own in charts.items()
    }  # fmt: skip
    labels = {"ill": True, "well": False, "without notes": False, "unknown": None}
    found = evaluate(disease, None, decisions, labels, {}, seed=0)
    assert (found.patients, found.positive, found.no_evidence) == (3, 1, 1)
    assert found.snippet_alarms == 0.5
    assert found.alarms == [Alarms(2, 1, 1.0, 0.0, 0.75)]
    by_name = {one.name: one for one in found.measured}
    assert (by_name["MapReduce, max"].f1, by_name["MapReduce, count"].f1) == (pytest.approx(2 / 3), 1.0)
