"""What an evaluation says, by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from methods.phenotyping_decide import Cited, Decided
from methods.phenotyping_definition import Definition
from methods.phenotyping_eval import MANY, Alarms, Evaluation, alarms, evaluate
from methods.phenotyping_measures import Drawn
from methods.phenotyping_reduce import ReduceConfig
from methods.phenotyping_report import FLAGGED_ONLY, OTHERS_ONLY, WEIGHTED, without_nan
from methods.phenotyping_rules import Fact, Rule
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


def test_healthy_patients_of_a_sample_count_for_as_many_as_they_stand_for() -> None:
    healthy = [evidence(0.9), evidence(0.1), evidence(0.9, 0.2), evidence(0.6, 0.7)]
    copies = [3, 2, 1, 4]
    whole = [own for own, n in zip(healthy, copies, strict=True) for _ in range(n)]
    rate, found = alarms(healthy, ReduceConfig(), [float(n) for n in copies])
    assert rate == alarms(whole, ReduceConfig())[0] == 12 / 15
    # One patient in five with one question stands for three, and so on; the number is of those with a label.
    assert [(one.patients, one.max, one.count) for one in found] == [(2, 0.6, 0.0), (2, 1.0, 0.8)]
    assert [one.expected for one in found] == pytest.approx(
        [one.expected for one in alarms(whole, ReduceConfig())[1]]
    )


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


def figures(found: Evaluation) -> dict[str, list[float]]:
    """All that is weighted."""
    names = ("tp", "fp", "fn", "tn", "precision", "recall", "f1", "auprc", "calibration_error")
    return {
        one.name: [
            *(getattr(one, name) for name in names),
            *(value for name, value in one.by_length.items() if not name.startswith("patients")),
        ]
        for one in found.measured
    }


def test_all_figures_of_a_sample_are_those_of_the_patients_it_stands_for() -> None:
    charts = {
        "a": evidence(0.9, 0.8, 0.7), "b": evidence(0.6), "c": evidence(0.9, 0.1), "d": evidence(0.55, 0.2, 0.3),
        "e": evidence(), "f": evidence(0.2), "g": evidence(0.3, 0.4, 0.1),
    }  # fmt: skip
    ill = {"a": True, "b": False, "c": True, "d": False, "e": True, "f": False, "g": True}
    copies = {name: 3 if name in "abcd" else 5 for name in charts}
    sample = {name: Drawn("flagged" if n == 3 else "other", float(n)) for name, n in copies.items()}
    codes = {"a": [Fact(patient_id="a", kind="code", code="X")], "f": [Fact(patient_id="f", kind="code", code="X")]}
    disease = DISEASE.model_copy(update={"rules": Rule(codes=["X"])})
    small = evaluate(disease, None, decided(**charts), ill, codes, seed=0, sample=sample)

    def all_of(values: dict[str, Any]) -> dict[str, Any]:
        # The names of copies put them into folds of their own, so what is chosen on other patients differs.
        return {f"{name}{i}": value for name, value in values.items() for i in range(copies[name])}

    whole = evaluate(disease, None, decided(**all_of(charts)), all_of(ill), all_of(codes | {"b": []}), seed=0)
    one, other = figures(small), figures(whole)
    assert small.patients == 7 and whole.patients == 27 and small.baseline == "rules"
    assert {"rules", "any code", "cue words", "as decided", "MapReduce, noisy_or"} <= one.keys()
    for name in one:
        if not name.endswith("other patients"):
            assert one[name] == pytest.approx(other[name], nan_ok=True)
    assert small.snippet_alarms == pytest.approx(whole.snippet_alarms)


def test_rules_are_the_baseline_where_facts_are_those_of_others() -> None:
    disease = DISEASE.model_copy(update={"rules": Rule(codes=["X"])})
    for facts, baseline in (({}, "rules"), (None, "any mention")):
        assert evaluate(disease, None, decided(a=evidence(0.9)), {"a": True}, facts, seed=0).baseline == baseline


def test_what_is_no_number_is_null_and_texts_stay() -> None:
    given: dict[str, Any] = {"NaN": [math.nan, 1.5, {"a": math.nan}], "b": "NaN", "c": None, "d": 2, "e": True}
    assert without_nan(given) == {"NaN": [None, 1.5, {"a": None}], "b": "NaN", "c": None, "d": 2, "e": True}


async def test_the_example_of_the_specification(tmp_path: Path, toys: Any) -> None:
    """400 flagged, of 100 reviewed 75 true; 9,600 others, of 200 reviewed 2 true."""
    notes, lines = [], ["patient_id,phenotype,label,sampled,of"]
    for i in range(300):
        notes.append(note(f"p{i}", 1, ("She has" if i < 100 else "She denies") + " veltosis, and is at home."))
        ill = i < 75 or i >= 298
        lines.append(f"p{i},velto,{int(ill)},{'flagged,400' if i < 100 else 'other,9600'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    words = ["part_bytes=1000000", "questions_per_call=100", f"labels={tmp_path / 'labels.csv'}"]
    done = await runner(tmp_path, lambda: reader(toys))("sample", notes, *words)
    (found,) = json.loads((done.folder / "evaluation.json").read_text())
    for name in ("as decided", "MapReduce, max", "cue words"):
        (one,) = (one for one in found["measured"] if one["name"] == name)
        assert [one[field] for field in ("tp", "fp", "fn", "tn")] == [300, 100, 96, 9504]
        assert (one["precision"], round(one["recall"], 4), round(one["f1"], 4)) == (0.75, 0.7576, 0.7538)
        assert one["low"] < one["f1"] < one["high"]
    (any_mention,) = (one for one in found["measured"] if one["name"] == "any mention")
    assert (any_mention["tp"], any_mention["fp"]) == (396, 9604)
    assert (found["patients"], found["positive"], found["flagged"]) == (300, 77, False)
    (summed,) = json.loads((done.folder / "summary.json").read_text())["rows"]
    assert summed["after"] == pytest.approx(0.7538, abs=5e-5)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("p,velto,1,flagged,3\nq,velto,0,other,7\n", WEIGHTED),
        ("p,velto,1,flagged,3\n", FLAGGED_ONLY),
        ("q,velto,0,other,7\n", OTHERS_ONLY),
        ("q,velto,0,,\n", ""),
        ("q,velto,0,,\nq,a,0,,\nq,b,0,,\np,a,0,,\n",
         "3 rows of labels are of phenotypes without a definition ('a', 'b') and were left out."),
        ("q,velto,0,,\nq,a,0,,\nq,b,0,,\nq,c,0,,\nq,d,0,,\n",
         "4 rows of labels are of phenotypes without a definition ('a', 'b', 'c', ...) and were left out."),
    ],
    ids=["both", "flagged alone", "others alone", "unweighted", "two without", "four without"],
)  # fmt: skip
async def test_the_summary_says_what_labels_are_worth(tmp_path: Path, toys: Any, rows: str, told: str) -> None:
    (tmp_path / "labels.csv").write_text("patient_id,phenotype,label,sampled,of\n" + rows)
    notes = [
        note("p", 3, "She has veltosis and takes her medicine."),
        note("q", 3, "She denies veltosis today here."),
    ]
    done = await runner(tmp_path, lambda: reader(toys))("notes", notes, f"labels={tmp_path / 'labels.csv'}")
    said = json.loads((done.folder / "summary.json").read_text())["notes"]
    about = [one for one in said if one in (WEIGHTED, FLAGGED_ONLY, OTHERS_ONLY) or "without a definition" in one]
    assert about == ([told] if told else [])


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
