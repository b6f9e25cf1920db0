"""Labels and facts as they are read, and what is wrong with them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from methods.phenotyping_config import Config
from methods.phenotyping_definition import Definition
from methods.phenotyping_source import Labels, read_facts, read_labels
from protocols.errors import BadInput

VX = Definition(phenotype_id="vx", version="2", name="VX fever", description="VX.", terms=["VX"])
KO = VX.model_copy(update={"phenotype_id": "ko"})
HEAD = "patient_id,phenotype,label\n"


def read(tmp_path: Path, text: str, suffix: str = "csv", **columns: str) -> tuple[Labels, frozenset[str]]:
    file = tmp_path / f"labels.{suffix}"
    file.write_text(text)
    config = Config(notes=["n"], definitions=["d"], labels=str(file), label_columns=columns)
    return read_labels(config, [VX, KO])


def test_labels_keep_ids_as_they_are(tmp_path: Path) -> None:
    found, flagged = read(tmp_path, HEAD + "a,vx,1\n a, vx ,0\nb,ko,\n")
    assert found == {("a", "vx"): True, (" a", "vx"): False, ("b", "ko"): None} and flagged == frozenset()
    found, _ = read(tmp_path, "mrn,phenotype,truth\n7,vx,1\n", patient_id="mrn", label="truth")
    assert found == {("7", "vx"): True}
    assert read(tmp_path, "") == ({}, frozenset())


def test_labels_of_flagged_decisions_are_known_as_such(tmp_path: Path) -> None:
    text = "patient_id,phenotype,label,sampled\na,vx,1,flagged\nb,vx,0,\na,ko,1,all\n"
    assert read(tmp_path, text)[1] == {"vx"}


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
    assert read(tmp_path, rows, "jsonl")[0] == {("a", "vx"): None, ("b", "vx"): True}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("secret,vy,1", "labels.csv:3: phenotype: got 'vy', expected one of vx, ko"),
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


def test_unknown_columns_of_labels_are_refused() -> None:
    with pytest.raises(ValidationError, match="truth: unknown field; expected one of patient_id, phenotype, label"):
        Config(notes=["n"], definitions=["d"], label_columns={"truth": "x"})


def test_facts_keep_ids_and_refuse_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "facts.csv"
    file.write_text("patient_id,kind,code\n a,code,X\n")
    assert list(read_facts([str(file)])) == [" a"]
    file.write_text("patient_id,kind,code\na,code,X\n  ,code,X\n")
    with pytest.raises(BadInput, match=r"facts.csv:3: patient_id: missing"):
        read_facts([str(file)])
