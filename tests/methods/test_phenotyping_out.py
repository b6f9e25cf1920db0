"""What other systems read: OMOP tables and FHIR groups."""

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from launch import main
from methods.phenotyping_decide import Cited, Decided, Origin, Place
from methods.phenotyping_definition import Definition
from methods.phenotyping_out import COHORT_COLUMNS, NLP_COLUMNS, Add, cohort, groups, note_nlp
from methods.phenotyping_prompts import PromptConfig
from tests.methods.phenotyping_toys import VELTO, Run, note, reader, runner

ORIGIN = Origin("model0", PromptConfig(), "run0")
VX = Definition(phenotype_id="vx", version="2", name="VX fever", description="VX.", terms=["VX"])
KO = VX.model_copy(update={"phenotype_id": "K_o", "name": "Ko"})


def cited(day: str, answer: str = "yes", **more: Any) -> Cited:
    told = {"note_id": f"n{day}", "start": 5, "end": 15, "quote": "there is V", "matches": [(14, 15)], "p": 0.9}
    return Cited.model_validate({**told, "answer": answer, "date": day, **more})


def decision(patient: str, said: str, *evidence: Cited, definition: Definition = VX) -> Decided:
    return Decided(
        patient_id=patient, phenotype_id=definition.phenotype_id, version="2", definition=definition.digest,
        decision=said, score=0.9, reducer="max", n_notes=1, n_found=1, n_groups=1, n_sent=1, evidence=list(evidence),
        model="model0", prompt=ORIGIN.prompt.digest, run="run0",
    )  # type: ignore[arg-type]  # fmt: skip


def write(output: AbstractContextManager[Add], found: Iterable[Decided]) -> None:
    with output as add:
        for one in found:
            add(one)


def rows_of(file: Path) -> list[list[str]]:
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def test_the_cohort_is_who_has_it_from_first_to_last(tmp_path: Path) -> None:
    later = Place(note_id="copy", start=0, end=10, date="2024-01-01")
    found = [
        decision(
            "p", "yes", cited("2020-03-01", also_in=[later]), cited("2019-12-31T23:59:00Z"), cited("2021", "yes")
        ),
        decision("q", "yes", cited("2020-02-02", "yes"), cited("2020-05-05", "no"), cited("2018-01-01", "uncertain")),
        decision("r", "yes", cited("", "yes"), cited("2020-01-01", "no")),
        decision("s", "no", cited("2020-01-01")),
        decision("t", "uncertain", cited("2020-01-01")),
        decision("u", "no_evidence"),
        decision("p,1", "yes", cited("2020-01-01"), definition=KO),
    ]
    write(cohort(tmp_path / "cohort.csv"), found)
    assert rows_of(tmp_path / "cohort.csv") == [
        list(COHORT_COLUMNS),
        ["vx", "p", "2019-12-31", "2020-03-01"],
        ["vx", "q", "2020-02-02", "2020-02-02"],
        ["vx", "r", "", ""],
        ["K_o", "p,1", "2020-01-01", "2020-01-01"],
    ]
    assert COHORT_COLUMNS == ("cohort_definition_id", "subject_id", "cohort_start_date", "cohort_end_date")


def test_a_row_per_match_and_one_per_copy_without_its_text(tmp_path: Path) -> None:
    text = "Now there is V and no V of old."
    copy = Place(note_id="copy", start=7, end=17, date="2020-04-01")
    day = "2020-03-01T10:00:00"
    two = {"start": 4, "end": 23, "quote": text[4:23], "matches": [(13, 14), (22, 23)]}
    own = cited(day, also_in=[copy], status="history", evidence=(5, 10), **two)
    found = [decision("p", "yes", own, cited("", "no", p=0.25))]
    write(note_nlp(tmp_path / "nlp.csv", ORIGIN, "2024-05-01T12:00:00Z"), found)
    head, *rows = rows_of(tmp_path / "nlp.csv")
    assert tuple(head) == NLP_COLUMNS
    system = f"repertory phenotyping model0 {ORIGIN.prompt.digest}"
    told = "phenotype=vx;answer=yes;p=0.9;status=history;note_date="
    when = ["0", system, "2024-05-01", "2024-05-01T12:00:00Z"]
    assert rows == [
        ["1", own.note_id, "0", text[4:23], "13", "V", *when, "Y", "", told + day],
        ["2", own.note_id, "0", text[4:23], "22", "V", *when, "Y", "", told + day],
        ["3", "copy", "0", "", "7", "", *when, "Y", "", told + "2020-04-01"],
        ["4", "n", "0", "there is V", "14", "V", *when, "N", "", "phenotype=vx;answer=no;p=0.25"],
    ]
    for row in map(dict, (zip(head, row, strict=True) for row in rows[:2])):
        offset = int(row["offset"])
        assert text[offset : offset + len(row["lexical_variant"])] == row["lexical_variant"]
    write(note_nlp(tmp_path / "nlp.csv", ORIGIN, ""), found)
    assert {(row[8], row[9]) for row in rows_of(tmp_path / "nlp.csv")[1:]} == {("", "")}


def test_a_group_and_its_provenance_per_phenotype(tmp_path: Path) -> None:
    found = [
        decision("b", "yes", cited("2020-01-01")),
        decision("MRN 7/é", "yes", cited("2020-01-01")),
        decision("a.1-Z", "yes", cited("2020-01-01")),
        decision("c", "no"),
        decision("d", "uncertain"),
        decision("e", "failed"),
        decision("c", "no", definition=KO),
    ]
    write(groups(tmp_path, [VX, KO], ORIGIN, ""), found)
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*"))
    assert files == ["K_o/group.json", "K_o/provenance.json", "vx/group.json", "vx/provenance.json"]
    group = json.loads((tmp_path / "vx" / "group.json").read_text())
    name = group.pop("id")
    assert group == {
        "resourceType": "Group",
        "active": True,
        "type": "person",
        "actual": True,
        "code": {"text": "VX fever"},
        "name": "VX fever: found in notes by a program, confirmed by nobody",
        "quantity": 3,
        "member": [
            {"entity": {"type": "Patient", "identifier": {"value": "MRN 7/é"}}},
            {"entity": {"reference": "Patient/a.1-Z"}},
            {"entity": {"reference": "Patient/b"}},
        ],
    }
    made = json.loads((tmp_path / "vx" / "provenance.json").read_text())
    assert made["target"] == [{"reference": f"Group/{name}"}]
    # The element is needed, and may say that it is unknown.
    assert "recorded" not in made and made["_recorded"]["extension"][0]["valueCode"] == "unknown"
    (agent,), (entity,) = made["agent"], made["entity"]
    assert agent["who"]["display"] == f"repertory phenotyping, model model0, prompt {ORIGIN.prompt.digest}, run run0"
    assert (entity["role"], entity["what"]["identifier"]["value"]) == ("source", VX.digest)
    empty = json.loads((tmp_path / "K_o" / "group.json").read_text())
    assert empty["quantity"] == 0 and "member" not in empty and empty["id"] != name
    told = [file.read_bytes() for file in sorted(tmp_path.rglob("*.json"))]
    write(groups(tmp_path, [KO, VX], ORIGIN, ""), reversed(found))
    assert [file.read_bytes() for file in sorted(tmp_path.rglob("*.json"))] == told
    write(groups(tmp_path, [VX], ORIGIN, "2024-05-01T12:00:00Z"), found[:5])
    made = json.loads((tmp_path / "vx" / "provenance.json").read_text())
    assert made["recorded"] == "2024-05-01T12:00:00Z" and "_recorded" not in made
    other = Origin("model1", ORIGIN.prompt, "run0")
    write(groups(tmp_path, [VX], other, ""), found[:5])
    assert json.loads((tmp_path / "vx" / "group.json").read_text())["id"] != name


def test_outputs_of_a_pass_that_fails_stay_what_they_were(tmp_path: Path) -> None:
    write(cohort(tmp_path / "cohort.csv"), [decision("p", "yes", cited("2020-01-01"))])
    before = (tmp_path / "cohort.csv").read_bytes()

    def failing() -> Iterator[Decided]:
        yield decision("q", "yes", cited("2020-01-01"))
        raise OSError("disk")

    for output in (
        cohort(tmp_path / "cohort.csv"),
        note_nlp(tmp_path / "nlp.csv", ORIGIN, ""),
        groups(tmp_path / "fhir", [VX], ORIGIN, ""),
    ):
        with pytest.raises(OSError, match="disk"):
            write(output, failing())
    assert (tmp_path / "cohort.csv").read_bytes() == before
    assert not (tmp_path / "nlp.csv").exists() and not (tmp_path / "fhir").exists()


@pytest.fixture
def run(tmp_path: Path, toys: Any) -> Run:
    return runner(tmp_path, lambda: reader(toys))


async def test_a_run_leaves_them(run: Run) -> None:
    notes = [
        note("p", 3, "She has veltosis and takes her medicine."),
        note("p", 8, "Here again with veltosis, now much worse."),
        note("p", 9, "She denies veltosis today in the clinic."),
        note("q", 0, "She denies veltosis of any kind or form."),
    ]
    done = await run("out", notes, "recorded=2024-05-01T12:00:00+02:00")
    assert rows_of(done.folder / "cohort.csv")[1:] == [["velto", "p", "2020-01-04", "2020-01-09"]]
    groups = [json.loads((done.folder / "fhir" / name / "group.json").read_text()) for name in ("velto", "kolo")]
    assert [one.get("member") for one in groups] == [[{"entity": {"reference": "Patient/p"}}], None]
    made = json.loads((done.folder / "fhir" / "velto" / "provenance.json").read_text())
    assert made["recorded"] == "2024-05-01T12:00:00+02:00"
    kinds = {json.loads(file.read_text())["resourceType"] for file in (done.folder / "fhir").rglob("*.json")}
    assert kinds == {"Group", "Provenance"}
    assert "veltosis and takes" not in "".join(file.read_text() for file in (done.folder / "fhir").rglob("*.json"))


@pytest.mark.parametrize("given", ["yesterday", "2024-05-01", "2024-05-01T12:00:00", "2024-13-01T12:00:00Z", "Z"])
def test_a_time_that_is_none(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.yaml").write_text(VELTO)
    (tmp_path / "n.jsonl").write_text("")
    words = [f"notes=[{tmp_path / 'n.jsonl'}]", f"definitions=[{tmp_path / 'd.yaml'}]", f"recorded={given}"]
    assert main(["phenotyping", *words, f"runs_dir={tmp_path / 'runs'}", "wandb=disabled"]) == 2
    assert f"recorded: got '{given}'; expected a time with its zone" in capsys.readouterr().err
