"""What an evaluation says, by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from methods.phenotyping_decide import Cited, Decided
from methods.phenotyping_definition import Definition
from methods.phenotyping_eval import MANY, Alarms, alarms, evaluate
from methods.phenotyping_reduce import ReduceConfig
from methods.phenotyping_report import FLAGGED_ONLY, without_nan
from methods.phenotyping_review import TEMPLATE
from tests.methods.phenotyping_toys import note, reader, runner


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


DISEASE = Definition(phenotype_id="v", version="1", name="V", description="Has v.", terms=["veltosis"])


def decided(**charts: list[Cited]) -> dict[str, Decided]:
    return {
        name: Decided(
            patient_id=name, phenotype_id="v", version="1", definition="", decision="yes", score=0.9, reducer="max",
            n_notes=2, n_found=len(own), n_groups=len(own), n_sent=len(own), evidence=own, model="", prompt="",
            run="",
        )
        for name, own in charts.items()
    }  # fmt: skip


def test_an_evaluation_counts_false_alarms_of_the_healthy_alone() -> None:
    decisions = decided(ill=evidence(0.9, 0.9), well=evidence(0.9, 0.2), unknown=evidence(0.9))
    labels = {"ill": True, "well": False, "without notes": False, "unknown": None}
    found = evaluate(DISEASE, None, decisions, labels, {}, seed=0)
    assert (found.patients, found.positive, found.no_evidence) == (3, 1, 1)
    assert found.snippet_alarms == 0.5
    assert found.alarms == [Alarms(2, 1, 1.0, 0.0, 0.75)]
    by_name = {one.name: one for one in found.measured}
    assert (by_name["MapReduce, max"].f1, by_name["MapReduce, count"].f1) == (pytest.approx(2 / 3), 1.0)


def test_scores_in_the_band_are_no_for_every_formula() -> None:
    decisions = decided(ill=evidence(0.9), vague=evidence(0.6), well=evidence(0.1))
    labels = {"ill": True, "vague": False, "well": False}
    for band, wrong in ((None, 1), ((0.4, 0.7), 0)):
        found = evaluate(DISEASE, ReduceConfig(band=band), decisions, labels, {}, seed=0)
        by_name = {one.name: one for one in found.measured}
        assert (by_name["MapReduce, max"].tp, by_name["MapReduce, max"].fp) == (1, wrong)
        assert by_name["MapReduce, mean"].fp == wrong


def test_what_is_no_number_is_null_and_texts_stay() -> None:
    given: dict[str, Any] = {"NaN": [math.nan, 1.5, {"a": math.nan}], "b": "NaN", "c": None, "d": 2, "e": True}
    assert without_nan(given) == {"NaN": [None, 1.5, {"a": None}], "b": "NaN", "c": None, "d": 2, "e": True}


async def test_labels_of_flagged_decisions_are_told_apart(tmp_path: Path, toys: Any) -> None:
    run = runner(tmp_path, lambda: reader(toys))
    notes = [note("p", 3, "She has veltosis and takes her medicine.")]
    for name, sampled in (("flagged", "flagged"), ("all", "")):
        (tmp_path / "labels.csv").write_text(f"patient_id,phenotype,label,sampled\np,velto,1,{sampled}\n")
        done = await run(name, notes, f"labels={tmp_path / 'labels.csv'}")
        told = (done.folder / "evaluation.json").read_text()
        (found,) = json.loads(told)
        assert found["flagged"] is bool(sampled) and "NaN" not in told
        said = "".join(file.read_text() for file in done.folder.glob("summary*"))
        assert (FLAGGED_ONLY in said) is bool(sampled)


def test_the_page_exports_labels_as_flagged_and_keeps_verdicts_apart() -> None:
    page = TEMPLATE.read_text(encoding="utf-8")
    assert '"patient_id,phenotype,label,sampled,verdict,decision,definition"' in page
    assert 'label(row), "flagged", verdicts[keyOf(row)]' in page
    assert "[row.patient_id, row.phenotype_id, row.run, row.definition, row.model]" in page
    assert "precision can be read from them, recall cannot" in page.split('id="export"')[1].split("</header>")[0]
