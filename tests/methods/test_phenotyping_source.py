"""Labels and facts as they are read, and what is wrong with them."""

import csv
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from methods.phenotyping_config import Config
from methods.phenotyping_definition import Definition
from methods.phenotyping_measures import Drawn
from methods.phenotyping_rules import Fact
from methods.phenotyping_source import Labels, read_facts, read_labels
from protocols.errors import BadInput

VX = Definition(phenotype_id="vx", version="2", name="VX fever", description="VX.", terms=["VX"])
KO = VX.model_copy(update={"phenotype_id": "ko"})
HEAD = "patient_id,phenotype,label\n"
SAMPLED = "patient_id,phenotype,label,sampled,of\n"


def read(tmp_path: Path, text: str, suffix: str = "csv", **columns: str) -> Labels:
    file = tmp_path / f"labels.{suffix}"
    file.write_text(text)
    config = Config(notes=["n"], definitions=["d"], labels=str(file), label_columns=columns)
    return read_labels(config, [VX, KO])


def test_labels_keep_ids_as_they_are(tmp_path: Path) -> None:
    found = read(tmp_path, HEAD + "a,vx,1\n a, vx ,0\nb,ko,\n")
    assert found == Labels({("a", "vx"): True, (" a", "vx"): False, ("b", "ko"): None})
    found = read(tmp_path, "mrn,phenotype,truth\n7,vx,1\n", patient_id="mrn", label="truth")
    assert found == Labels({("7", "vx"): True})
    assert read(tmp_path, "") == read(tmp_path, HEAD) == Labels()


def test_labels_of_flagged_decisions_are_known_as_such(tmp_path: Path) -> None:
    text = "patient_id,phenotype,label,sampled\na,vx,1,flagged\nb,vx,0,\na,ko,1,all\n"
    assert read(tmp_path, text) == Labels(
        {("a", "vx"): True, ("b", "vx"): False, ("a", "ko"): True}, {}, frozenset(["vx"])
    )


def test_a_sample_of_both_strata_is_weighted_by_what_they_hold(tmp_path: Path) -> None:
    rows = "a,vx,1,flagged,4\nb,vx,,flagged,4\nc,vx,0,flagged,4.0\nd,vx,0,other,90\ne,ko,1,flagged,1\n"
    found = read(tmp_path, SAMPLED + rows)
    # Of four that were flagged two labels say something; nobody can say b.
    two = Drawn("flagged", 2.0)
    assert found.drawn == {
        ("a", "vx"): two, ("c", "vx"): two, ("d", "vx"): Drawn("other", 90.0), ("e", "ko"): Drawn("flagged", 1.0)
    }  # fmt: skip
    assert found.truth["b", "vx"] is None and found.flagged == {"ko"}
    lines = ""
    for patient, phenotype, label, stratum, size in csv.reader(rows.splitlines()):
        row = {"patient_id": patient, "phenotype": phenotype, "label": label, "sampled": stratum, "of": float(size)}
        lines += json.dumps(row) + "\n"
    assert read(tmp_path, lines, "jsonl") == found
    # Labels of the others that say nothing do not make recall known.
    assert read(tmp_path, SAMPLED + "a,vx,1,flagged,4\nd,vx,,other,90\n").flagged == {"vx"}


@pytest.mark.parametrize(
    "table",
    [
        "patient_id,phenotype,label,of\na,vx,1,0\nb,vx,0,x\n",
        "patient_id,phenotype,label,sampled,of\na,vx,1,,\nb,vx,0,everybody,\n",
    ],
    ids=["no column sampled", "of is empty"],
)
def test_labels_that_do_not_tell_both_are_not_weighted(tmp_path: Path, table: str) -> None:
    assert read(tmp_path, table) == Labels({("a", "vx"): True, ("b", "vx"): False})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b,vx,0,other,many", ":3: of: got 'many', expected how many decisions there are, above 0"),
        ("b,vx,0,other,0", ":3: of: got '0', expected how many decisions there are, above 0"),
        ("b,vx,0,other,-2", ":3: of: got '-2', expected how many decisions there are, above 0"),
        ("b,vx,0,other,nan", ":3: of: got 'nan', expected how many decisions there are, above 0"),
        ("b,vx,0,other,inf", ":3: of: got 'inf', expected how many decisions there are, above 0"),
        ("b,vx,0,all,9", ":3: sampled: got 'all', expected flagged or other, as `of` is told"),
        ("b,vx,0,flagged,9", ":3: of: got 9, expected 2 as in {file}:2"),
        ("b,vx,0,flagged,", ":3: of: missing; other labels of 'vx' have it"),
        ("b,vx,0,flagged,2\nc,vx,,flagged,2", ":4: of: got 2, expected no less than the 3 labels up to here"),
    ],
)
def test_samples_that_cannot_be_are_refused(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(tmp_path, f"{SAMPLED}a,vx,1,flagged,2\n{row}\n")
    file = tmp_path / "labels.csv"
    assert str(caught.value) == f"labels: {file}" + message.format(file=file)


def test_labels_of_other_phenotypes_are_left_out_and_counted(tmp_path: Path) -> None:
    found = read(tmp_path, SAMPLED + "a,vy,1,flagged,x\na,vx,1,,\nb,vy,what,,\nb,vz,,,\n")
    assert found.truth == {("a", "vx"): True} and found.left_out == {"vy": 2, "vz": 1}
    assert found.flagged == frozenset()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_without_labels_is_refused(tmp_path: Path, suffix: str) -> None:
    rows = "patient_id,phenotype,truth\na,vx,1\n"
    text = rows if suffix == "csv" else '{"patient_id": "a", "phenotype": "vx", "truth": 1}\n'
    with pytest.raises(BadInput) as caught:
        read(tmp_path, text, suffix)
    file = tmp_path / f"labels.{suffix}"
    assert str(caught.value) == f"labels: {file} has no column label; name it by label_columns.label="


def test_a_line_without_a_label_says_that_nobody_can_tell(tmp_path: Path) -> None:
    rows = '{"patient_id": "a", "phenotype": "vx"}\n{"patient_id": "b", "phenotype": "vx", "label": 1}\n'
    assert read(tmp_path, rows, "jsonl").truth == {("a", "vx"): None, ("b", "vx"): True}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("  ,vx,1", "labels.csv:3: patient_id: missing"),
        ("secret,vx,2", "labels.csv:3: label: got '2', expected 1, 0 or nothing"),
        ("a,vx,0", "labels.csv:3: a patient occurs twice with phenotype 'vx'"),
    ],
)
def test_errors_name_the_line_and_no_patient(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(tmp_path, f"{HEAD}a,vx,1\n{row}\n")
    told = str(caught.value)
    assert message in told and "secret" not in told and "patient 'a'" not in told


def test_labels_of_other_phenotypes_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        read(tmp_path, HEAD + "secret,vy,1\nsecret,vz,1\n")
    assert str(caught.value) == f"labels: {tmp_path / 'labels.csv'}:2: phenotype: got 'vy', expected one of vx, ko"


def test_unknown_columns_of_labels_are_refused() -> None:
    with pytest.raises(ValidationError, match="truth: unknown field; expected one of patient_id, phenotype, label"):
        Config(notes=["n"], definitions=["d"], label_columns={"truth": "x"})


def test_facts_keep_ids_and_refuse_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "facts.csv"
    file.write_text("patient_id,kind,code\n a,code,X\n")
    assert read_facts([str(file)], [" a"]) == {" a": [Fact(patient_id=" a", kind="code", code="X")]}
    file.write_text("patient_id,kind,code\na,code,X\n  ,code,X\n")
    with pytest.raises(BadInput, match=r"facts.csv:3: patient_id: missing"):
        read_facts([str(file)], [])


def test_facts_of_patients_without_a_label_are_checked_and_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "facts.csv"
    file.write_text("patient_id,kind,code\na,code,X\nb,drug,Y\n")
    assert read_facts([str(file)], ["b"]) == {"b": [Fact(patient_id="b", kind="drug", code="Y")]}
    # There are facts, of others: rules are still the baseline.
    assert read_facts([str(file)], ["c"]) == {}
    assert read_facts([], ["c"]) is None
    file.write_text("patient_id,kind,code\n")
    assert read_facts([str(file)], ["c"]) is None
    file.write_text("patient_id,kind,code\na,code,X\nb,pill,Y\n")
    with pytest.raises(BadInput, match=r"facts.csv:3: kind"):
        read_facts([str(file)], ["a"])
