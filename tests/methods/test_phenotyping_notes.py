"""Notes of all formats, and what becomes of bad ones."""

import base64
import csv
import gzip
import io
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from methods.phenotyping_config import Config
from methods.phenotyping_fhir import raw_place, text_of_html
from methods.phenotyping_notes import FIELDS, Note, Reject, read_part
from methods.phenotyping_parts import Part, parts_of
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
    with pytest.raises(BadInput, match=r"notes.csv has no column patient_id or person_id among its 3; expected a h"):
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
    assert reasons(read(tmp_path)[1]) == ["a.jsonl.gz: a broken archive: Not a gzipped file"]
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
    assert reasons(read(tmp_path / "bad.json")[1]) == [
        "bad.json: not JSON: Expecting property name enclosed in double quotes at character 1"
    ]


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
    assert text_of_html("<style>x</style>plain") == ("plain", [(0, 16, 0)])


def test_what_is_a_tag_and_what_is_text() -> None:
    for html, text in [
        ("PE <40 no DVT >5 days", "PE <40 no DVT >5 days"),
        ("a < b > c", "a < b > c"),
        ("<!DOCTYPE html><?xml version='1.0'?><B>a</B>", "a"),
        ("a<!-- <b> > -->b<!-- c <i>d</i>", "ab<!-- c d"),
        ("<script>if (a<b) {}</SCRIPT >a<script>b", "ab"),
        ("&nosuch; &amp;", "&nosuch; &"),
    ]:
        assert text_of_html(html)[0] == text, html


def test_an_end_in_an_entity_is_behind_it() -> None:
    text, places = text_of_html("a &gt;")
    assert (text, raw_place(places, 3, last=True), raw_place(places, 2, last=True)) == ("a >", 6, 2)
    text, places = text_of_html("x&NotEqualTilde;y<br/>z")
    assert text == "x\u2242\u0338y\nz"
    assert [raw_place(places, i) for i in range(6)] == [0, 1, 1, 16, 17, 22]
    assert [raw_place(places, i, last=True) for i in range(1, 7)] == [1, 16, 16, 17, 22, 23]


@pytest.mark.parametrize("piece", ["<!--", "<script>", "<style ", "<a", "<?a?", "<!", "&#", "</script "])
def test_html_is_read_in_linear_time(piece: str) -> None:
    began = time.process_time()
    text_of_html(piece * 100_000)
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("reference", "patient"),
    [
        ("7", "7"),
        ("Patient/7", "7"),
        ("Patient/7/_history/3", "7"),
        ("http://host/fhir/Patient/7/_history/3", "7"),
        ("https://host/Patient/7", "7"),
        ("urn:uuid:7", "7"),
        ("Group/7", "got a Group, "),
        ("http://host/Device/7/_history/1", "got a Device, "),
        ("seen on/7", ""),
    ],
)
def test_a_subject_is_a_patient(tmp_path: Path, reference: str, patient: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(fhir("a", "x", subject={"reference": reference})))
    notes, rejects = read(tmp_path / "a.json")
    if notes:
        assert (notes[0].patient_id, rejects) == (patient, [])
    else:
        assert rejects[0].reason == f"DocumentReference: subject.reference: {patient}expected a Patient"


NO_FHIR = "DocumentReference: not as FHIR R4 has it"
NO_ATTACHMENT = "DocumentReference: attachment: not as FHIR R4 has it"
HALF = "half a character (a lone surrogate) at character 0"


def attached(kind: object, data: str) -> dict[str, Any]:
    return {"content": [{"attachment": {"contentType": kind, "data": data}}]}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"type": {"text": {"secret": 1}}}, NO_FHIR),
        ({"type": {"coding": [{"display": 7}]}}, NO_FHIR),
        ({"date": {"secret": 1}}, NO_FHIR),
        ({"date": 20200101}, NO_FHIR),
        ({"subject": {"reference": 7}}, NO_FHIR),
        ({"context": {"encounter": [{"reference": ["secret"]}]}}, NO_FHIR),
        ({"presentedForm": {"data": "secret"}}, NO_FHIR),
        ({"presentedForm": "secret"}, NO_FHIR),
        ({"content": [{"attachment": "secret"}]}, NO_ATTACHMENT),
        (attached(["secret"], "eA=="), NO_ATTACHMENT),
        (attached("text/plain;charset=utf-7", "KzJBQS0="), f"text: {HALF}"),
        (attached("text/plain;charset=hex", "eA=="), "attachment.data: not hex"),
        ({"id": "\ud83d"}, f"note_id: {HALF}"),
        ({"subject": {"reference": "\ud83d"}}, f"patient_id: {HALF}"),
        ({"type": {"text": "\ud83d"}}, f"note_type: {HALF}"),
        (
            {"relatesTo": [{"code": "replaces", "target": {"reference": "DocumentReference/\ud83d"}}]},
            f"relatesTo: {HALF}",
        ),
    ],
)
def test_values_that_fhir_does_not_have(tmp_path: Path, more: dict[str, Any], reason: str) -> None:
    (tmp_path / "a.ndjson").write_text(json.dumps(fhir("a", "x") | more))
    notes, rejects = read(tmp_path / "a.ndjson")
    assert (notes, [one.reason for one in rejects]) == ([], [reason])
    json.dumps([vars(one) for one in rejects], ensure_ascii=False).encode()


def test_a_table_without_a_header_is_not_shown(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.csv").write_text('7,1,"a secret, and more"\n')
    pq.write_table(pa.table({"a secret": [1]}), tmp_path / "a.parquet")
    for name, columns in [("a.csv", 3), ("a.parquet", 1)]:
        with pytest.raises(BadInput, match=rf"{name} has no column patient_id .* among its {columns}") as caught:
            read(tmp_path / name)
        assert "secret" not in str(caught.value)
    (tmp_path / "a.csv").write_text('"a secret" and\n')
    with pytest.raises(BadInput, match=r"a.csv is not CSV") as caught:
        read(tmp_path / "a.csv")
    assert "secret" not in str(caught.value)
    (tmp_path / "a.csv").write_bytes(b"patient_id,note_id,text,\xe9\n1,2,3,\xe9\n")
    assert reasons(read(tmp_path / "a.csv")[1]) == [r"a.csv:2: \udce9: not in the declared encoding"]


def archive_of(name: str) -> bytes:
    """Rows that hardly shrink, so that the first ones come before the damage."""
    rows = [(f"p{i}", f"n{i}", random.Random(i).randbytes(400).hex()) for i in range(400)]
    if name.startswith("a.csv"):
        return gzip.compress("\n".join(",".join(cells) for cells in [FIELDS[:3], *rows]).encode())
    return gzip.compress("\n".join(json.dumps(dict(zip(FIELDS, cells, strict=False))) for cells in rows).encode())


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "sum"])
def test_a_damaged_archive_costs_its_end(tmp_path: Path, name: str, damage: str) -> None:
    raw = archive_of(name)
    half = len(raw) // 2
    damaged = {"cut": raw[:half], "zeros": raw[:half] + b"\xff" * (len(raw) - half), "sum": raw[:-8] + bytes(8)}
    (tmp_path / name).write_bytes(damaged[damage])
    notes, rejects = read(tmp_path / name)
    assert 100 < len(notes) <= 400
    assert [one.note_id for one in notes] == [f"n{i}" for i in range(len(notes))]
    assert reasons(rejects[-1:])[0].startswith(f"{name}: a broken archive: ")


def test_damaged_texts_and_bundles(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "a.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"a text" * 100)[:-9])
        notes, rejects = read(tmp_path / name)
        assert not notes
        assert reasons(rejects) == [
            f"{name}: a broken archive: Compressed file ended before the end-of-stream marker was reached"
        ]


def test_values_that_no_column_may_hold(tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    fields = [name for name in FIELDS if name != "date"]
    lines = [json.dumps(row(1) | {name: "\ud83d"}) for name in fields]
    lines += [json.dumps(row(2) | {name: value}) for name in fields[:2] for value in (math.nan, -math.inf)]
    lines += ['{"patient_id": ' + "1" * 5000 + "}", json.dumps(row(3, encounter_id=math.nan))]
    file.write_text("\n".join(lines))
    notes, rejects = read(file)
    assert notes == [Note("p3", "n3", "a text")]
    assert [one.reason for one in rejects] == [
        *[f"{name}: {HALF}" for name in fields],
        *["patient_id: empty"] * 2,
        *["note_id: empty"] * 2,
        "not JSON: a number has too many digits",
    ]
    json.dumps([vars(one) for one in rejects], ensure_ascii=False).encode()
    (tmp_path / "a.json").write_text("1" * 5000)
    assert reasons(read(tmp_path / "a.json")[1]) == ["a.json: not JSON: a number has too many digits"]


@pytest.mark.parametrize(
    ("given", "date"),
    [
        ("2019-12-31", "2019-12-31"),
        (" 20191231 ", "2019-12-31"),
        (20191231, "2019-12-31"),
        ("2019-12-31 10:20:30.5", "2019-12-31T10:20:30.5"),
        ("2019-12-31T10:20:30Z", "2019-12-31T10:20:30Z"),
        ("20191231T10:20+01:00", "2019-12-31T10:20+01:00"),
        (None, ""),
        ("  ", ""),
        ("12/31/2019", None),
        ("2019-13-31", None),
        ("2019-02-30", None),
        ("2019-12-31T25:00", None),
        ("2019-12", None),
        ("9" * 50, None),
    ],
)
def test_dates(tmp_path: Path, given: object, date: str | None) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row(1, date=given)))
    notes, rejects = read(tmp_path / "a.jsonl")
    assert [one.date for one in notes] == [date or ""]
    wrong = f"date: got {str(given)[:40]!r}, expected YYYY-MM-DD; the note is read without it"
    assert [(one.reason, one.note_id, one.patient_id) for one in rejects] == ([(wrong, "n1", "p1")] * (date is None))


@pytest.mark.parametrize("name", ["utf-99", "hex", "rot13", "", "a\0b"])
def test_an_encoding_is_one_of_text(name: str) -> None:
    with pytest.raises(ValidationError, match=r"expected the name of a text encoding such as utf-8"):
        Config.model_validate({"world": "wards", "encoding": name})
    assert Config.model_validate({"world": "wards", "encoding": "utf-16"}).encoding == "utf-16"


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
