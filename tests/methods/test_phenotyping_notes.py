"""Notes of all formats, and what becomes of bad ones."""

import base64
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.phenotyping_fhir import raw_place, text_of_html
from methods.phenotyping_notes import Note, Part, Reject, parts_of, read_part
from protocols.errors import BadInput


def read(*paths: Path, size: int = 1 << 20, columns: dict[str, str] | None = None, encoding: str = "utf-8") -> Any:
    parts = parts_of([str(path) for path in paths], size)
    found = [one for part in parts for one in read_part(part, columns or {}, encoding)]
    notes = [one for one in found if isinstance(one, Note)]
    return notes, [one for one in found if isinstance(one, Reject)]


def reasons(rejects: list[Reject]) -> list[str]:
    return [f"{Path(one.place).name}: {one.reason}" for one in rejects]


def row(i: object, text: object = "a text", **more: object) -> dict[str, object]:
    return {"patient_id": f"p{i}", "note_id": f"n{i}", "text": text, **more}


def test_bad_lines_cost_themselves_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    lines = [
        json.dumps(row(1, date="2020-01-01", note_type="ward")).encode(),
        b'{"patient_id": "p2", "note_id": "n2", "text": "caf\xe9"}',
        b'{"patient_id": "p3"',
        b"",
        b"[1]",
        json.dumps({"patient_id": "p4", "note_id": "n4"}).encode(),
        json.dumps(row(5, ["no"])).encode(),
        json.dumps(row(6, "")).encode(),
        json.dumps({**row(7), "patient_id": None}).encode(),
        b'{"patient_id": "p8", "note_id": "n8", "text": "half \\ud83d"}',
        b"[" * 100_000,
        json.dumps({**row(9), "note_id": 9.0}).encode(),
    ]
    file.write_bytes(b"\n".join(lines))
    notes, rejects = read(file)
    assert [one.note_id for one in notes] == ["n1", "n6", "9"]
    assert notes[0] == Note("p1", "n1", "a text", "2020-01-01", "ward")
    assert reasons(rejects) == [
        "notes.jsonl:2: not utf-8 at byte 50 of the line",
        "notes.jsonl:3: not JSON: Expecting ',' delimiter at character 20",
        "notes.jsonl:5: expected an object, got list",
        "notes.jsonl:6: text: missing",
        "notes.jsonl:7: text: expected text, got list",
        "notes.jsonl:8: text: empty",
        "notes.jsonl:9: patient_id: empty",
        "notes.jsonl:10: text: half a character (a lone surrogate) at character 5",
        "notes.jsonl:11: not JSON: nested too deeply",
    ]
    assert [one.patient_id for one in rejects if one.note_id == "n6"] == ["p6"]


@given(
    st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=20),
    st.integers(1, 400),
)
def test_parts_of_any_size_hold_each_line_once(tmp_path_factory: Any, texts: list[str], size: int) -> None:
    file = tmp_path_factory.mktemp("parts") / "notes.jsonl"
    made = [json.dumps(row(i, text or "x"), ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    file.write_text("\n".join(made), encoding="utf-8", newline="")
    notes, rejects = read(file, size=size)
    assert [one.text for one in notes] == [text or "x" for text in texts]
    assert [int(Path(one.place).name.split(":")[1]) for one in rejects] == [
        i for i, text in enumerate(texts, start=1) if text and not text.strip()
    ]


def test_a_table_lacks_a_column_or_has_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "notes.csv"
    file.write_bytes(b'patient_id,note_id,text\np1,n1,"two\nlines, quoted"\np2,n2\np3,n3,caf' + b"\xe9\np4,n4,ok\n")
    notes, rejects = read(file)
    assert [(one.note_id, one.text) for one in notes] == [("n1", "two\nlines, quoted"), ("n4", "ok")]
    assert reasons(rejects) == [
        "notes.csv:4: got 2 cells, expected 3",
        "notes.csv:5: text: not in the declared encoding",
    ]
    assert [one.text for one in read(file, encoding="latin-1")[0]] == ["two\nlines, quoted", "café", "ok"]
    file.write_text("person,note_id,text\n1,2,3\n")
    with pytest.raises(BadInput, match=r"notes.csv has no column patient_id or person_id; it has person, note_id"):
        read(file)
    assert read(file, columns={"patient_id": "person"})[0] == [Note("1", "2", "3")]


def test_omop_and_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "person_id": [7, 8, None],
            "note_id": [1, 2, 3],
            "note_text": ["one", None, "three"],
            "note_date": ["2020-01-01", None, None],
        }
    )
    pq.write_table(table, tmp_path / "note.parquet", row_group_size=1)
    parts = parts_of([str(tmp_path / "note.parquet")], 1)
    assert [(part.start, part.end, part.first_line) for part in parts] == [(0, 1, 1), (1, 2, 2), (2, 3, 3)]
    notes, rejects = read(tmp_path / "note.parquet", size=1)
    assert notes == [Note("7", "1", "one", "2020-01-01"), Note("8", "2", "")]
    assert reasons(rejects) == ["note.parquet: row 2: text: empty", "note.parquet: row 3: person_id: empty"]


def test_archives_folders_and_texts(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write(json.dumps(row(1)) + "\n")
    (tmp_path / "p7").mkdir()
    (tmp_path / "p7" / "n2.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "lone.txt").write_text("three")
    (tmp_path / "other.pdf").write_bytes(b"%PDF")
    notes, rejects = read(tmp_path)
    assert [(one.patient_id, one.note_id, one.text) for one in notes] == [
        ("p1", "n1", "a text"),
        ("lone", "lone", "three"),
        ("p7", "p7/n2", "one\r\ntwo"),
    ]
    assert not rejects
    (tmp_path / "a.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(BadInput, match=r"a.jsonl.gz is a broken archive"):
        read(tmp_path / "a.jsonl.gz")
    for path, message in [("no", "is not there"), ("other.pdf", "expected one of .jsonl")]:
        with pytest.raises(BadInput, match=message):
            read(tmp_path / path)


def fhir(name: str, text: str, kind: str = "text/plain", **more: object) -> dict[str, object]:
    return {
        "resourceType": "DocumentReference",
        "id": name,
        "subject": {"reference": "Patient/7"},
        "date": "2021-02-03T04:05:06Z",
        "type": {"coding": [{"display": "Discharge summary"}]},
        "content": [{"attachment": {"contentType": kind, "data": base64.b64encode(text.encode()).decode()}}],
        "context": {"encounter": [{"reference": "Encounter/9"}]},
        **more,
    }


def test_a_bundle_with_resources_of_any_kind(tmp_path: Path) -> None:
    report = {
        "resourceType": "DiagnosticReport",
        "id": "r",
        "subject": {"reference": "urn:uuid:8"},
        "code": {"text": "CT"},
        "effectiveDateTime": "2020-01-01",
        "presentedForm": [
            {"contentType": "text/plain; charset=latin-1", "data": base64.b64encode(b"caf\xe9").decode()}
        ],
    }
    entries = [
        fhir("a", "one"),
        {"resourceType": "Patient", "id": "7"},
        fhir("b", "<p>two &amp; <b>three</b></p>", "text/html"),
        fhir("c", "x", docStatus="entered-in-error"),
        fhir("d", "x", "application/pdf"),
        fhir("e", "x", content=[{"attachment": {"contentType": "text/plain", "url": "http://x"}}]),
        fhir("f", "x", content=[{"attachment": {"contentType": "text/plain", "data": "*"}}]),
        fhir("g", "newer", relatesTo=[{"code": "replaces", "target": {"reference": "DocumentReference/a"}}]),
        fhir("h", "x", subject=None),
        fhir("i", "x", content=7),
        report,
        None,
    ]
    bundle = {"resourceType": "Bundle", "entry": [{"resource": one} for one in entries]}
    (tmp_path / "bundle.json").write_text(json.dumps(bundle))
    notes, rejects = read(tmp_path / "bundle.json")
    assert notes[0] == Note("7", "a", "one", "2021-02-03T04:05:06Z", "Discharge summary", "9")
    assert [(one.note_id, one.text) for one in notes[1:]] == [("b", "\ntwo & three\n"), ("g", "newer"), ("r", "café")]
    assert notes[2].replaces == ("a",)
    assert (notes[3].patient_id, notes[3].note_type, notes[3].date) == ("8", "CT", "2020-01-01")
    assert reasons(rejects) == [
        "bundle.json: entry 2: resourceType: got 'Patient', expected DocumentReference or DiagnosticReport",
        "bundle.json: entry 4: docStatus: entered in error",
        "bundle.json: entry 5: contentType: got 'application/pdf', expected text/plain or text/html",
        "bundle.json: entry 6: attachment: no data; one behind an address is not read",
        "bundle.json: entry 7: attachment.data: not base64",
        "bundle.json: entry 9: DocumentReference: subject.reference: missing",
        "bundle.json: entry 10: DocumentReference: not as FHIR R4 has it",
        "bundle.json: entry 12: resource: missing",
    ]
    lines = "\n".join(json.dumps(one) for one in entries[:3])
    (tmp_path / "bulk.ndjson").write_text(lines)
    assert [one.note_id for one in read(tmp_path / "bulk.ndjson", size=10)[0]] == ["a", "b"]
    (tmp_path / "bad.json").write_text("{")
    assert reasons(read(tmp_path / "bad.json")[1]) == ["bad.json: not JSON: JSONDecodeError"]


PIECES = st.sampled_from(
    ["<p>", "</p>", "<br/>", "<b>", "&amp;", "&lt;", "&#233;", "a text", "é𝔘", " ", "\n", "<!-- x -->"]
)


@given(st.lists(PIECES, max_size=30))
def test_places_in_html_lead_back(pieces: list[str]) -> None:
    html = "".join(pieces)
    text, places = text_of_html(html)
    assert "<p>" not in text and "x -->" not in text
    for i, letter in enumerate(text):
        raw, end = raw_place(places, i), raw_place(places, i + 1, last=True)
        assert 0 <= raw < end <= len(html)
        # A letter is itself; what stands for one begins with its first character.
        assert html[raw] == letter or html[raw] in "<&"
    assert text_of_html("<style>x</style>plain") == ("plain", [(0, 16)])


def test_a_note_of_fifty_megabytes(tmp_path: Path) -> None:
    text = "word " * 10_000_000
    file = tmp_path / "large.csv"
    with open(file, "w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerows([["patient_id", "note_id", "text"], ["p", "n", text], ["q", "m", "small"]])
    assert [len(one.text) for one in read(file)[0]] == [50_000_000, 5]
    lines = io.StringIO()
    lines.write(json.dumps(row(1, text)) + "\n" + json.dumps(row(2)))
    (tmp_path / "large.jsonl").write_text(lines.getvalue())
    assert [part.first_line for part in parts_of([str(tmp_path / "large.jsonl")], 1 << 20)][-1] <= 2
    assert [len(one.text) for one in read(tmp_path / "large.jsonl", size=1 << 20)[0]] == [50_000_000, 6]


def test_parts_are_named_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row(name)) + "\n")
    parts = parts_of([str(tmp_path)], 1)
    assert [(part.index, Path(part.file).name) for part in parts] == [(0, "a.jsonl"), (1, "b.jsonl")]
    assert all(isinstance(part, Part) for part in parts)
