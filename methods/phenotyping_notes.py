"""Notes from files: JSON lines, CSV, Parquet, OMOP's NOTE table, FHIR, folders of text; row by row.

A bad row becomes a reject with its place and the reason; the others are read. Reasons never hold a note's text.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from methods.phenotyping_dates import iso_date
from methods.phenotyping_fhir import documents_of, resources_of
from methods.phenotyping_parts import Part, files_in, suffix_of
from protocols.errors import BadInput

FIELDS = ("patient_id", "note_id", "text", "date", "note_type", "encounter_id")
NEEDED = ("patient_id", "note_id", "text")
OMOP = {
    "patient_id": "person_id",
    "text": "note_text",
    "date": "note_date",
    "note_type": "note_type_concept_id",
    "encounter_id": "visit_occurrence_id",
}
"""Columns of OMOP's NOTE table, which are looked for where ours are not there."""
ROWS_AT_ONCE = 256
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Note:
    """One note."""

    patient_id: str
    note_id: str
    text: str
    date: str = ""
    """YYYY-MM-DD, perhaps with T and a time; empty: unknown."""
    note_type: str = ""
    encounter_id: str = ""
    replaces: tuple[str, ...] = ()
    """Ids of notes that it is a newer version of."""
    raw_places: tuple[tuple[int, int, int], ...] = ()
    """Of each piece where it begins in the text and in the raw document, and where it ends there if it stands for
    something else, or 0: of HTML and of de-identified text; empty: places are the same in the raw document."""

    @property
    def digest(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Reject:
    """A row that could not be read, or holds nothing."""

    place: str
    """File and line."""
    reason: str
    note_id: str = ""
    patient_id: str = ""


class BadRow(ValueError):
    """What is wrong with a row, and as far as they are known whose it is."""

    def __init__(self, reason: str, note_id: str = "", patient_id: str = "") -> None:
        super().__init__(reason)
        self.note_id, self.patient_id = note_id, patient_id


def read_part(
    part: Part, columns: Mapping[str, str], encoding: str = "utf-8", *, show: bool = True
) -> Iterator[Note | Reject]:
    """Notes and rejects in the order of the rows. A note without text is both: its patient is known; so is one whose
    date cannot be read. Of a broken archive the rows before the damage are read, and it becomes one reject.

    `columns`: names of columns by our names. `show`: whether reasons may tell what stood there. Raises BadInput where
    a table lacks a column.
    """
    readers = {"rows": read_lines, "csv": read_csv, "parquet": read_parquet, "fhir": read_bundle, "text": read_text}
    for one in files_in(part):
        try:
            for place, row in readers[one.format](one, columns, encoding):
                yield from told(f"{one.file}{place}", row, show=show)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            # What stands in brackets are the first bytes.
            yield Reject(one.file, f"a broken archive: {str(error).partition(' (')[0]}")


def told(where: str, row: "Note | BadRow", *, show: bool) -> Iterator[Note | Reject]:
    """A row with what is wrong with it."""
    if isinstance(row, BadRow):
        yield Reject(where, str(row), row.note_id, row.patient_id)
        return
    if not row.text.strip():
        yield Reject(where, "text: empty", row.note_id, row.patient_id)
    day = iso_date(row.date)
    if day is None:
        got = f"got {row.date[:40]!r}, " if show else ""
        reason = f"date: {got}expected YYYY-MM-DD; the note is read without it"
        yield Reject(where, reason, row.note_id, row.patient_id)
    yield row if day == row.date else replace(row, date=day or "")


def check_tables(parts: Sequence[Part], columns: Mapping[str, str], encoding: str) -> None:
    """Raise BadInput for the first table that lacks a column, before anything is read."""
    for part in parts:
        if part.format in ("csv", "parquet") and part.start == 0:
            next(read_part(part, columns, encoding), None)


Found = Iterator[tuple[str, Note | BadRow]]


def read_lines(part: Part, columns: Mapping[str, str], encoding: str) -> Found:
    """JSON lines: plain rows, rows of an OMOP table, or FHIR resources."""
    number = part.first_line
    for number, line in enumerate(lines_of(part), start=part.first_line):
        if not line.strip():
            continue
        try:
            row = loaded(decoded(line, encoding))
            if not isinstance(row, dict):
                raise BadRow(f"expected an object, got {type(row).__name__}")
            if "resourceType" in row:
                for note in notes_of_resource(row):
                    yield f":{number}", note
            else:
                yield f":{number}", note_of(row, columns)
        except BadRow as error:
            yield f":{number}", error


def loaded(raw: str | bytes) -> Any:
    """The value of a JSON text. Raises BadRow that names the place, not what stands there."""
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at character {error.pos}") from error
    except UnicodeDecodeError as error:
        raise BadRow(f"not JSON: not {error.encoding} at byte {error.start}") from error
    except RecursionError as error:
        raise BadRow("not JSON: nested too deeply") from error
    except ValueError as error:
        raise BadRow("not JSON: a number has too many digits") from error


def bytes_of(file: str) -> bytes:
    """All of a file. Raises what gzip and zlib do for a broken archive."""
    with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as stream:
        return stream.read()


def lines_of(part: Part) -> Iterator[bytes]:
    """The lines of a part. Raises what gzip and zlib do for a broken archive."""
    if part.file.endswith(".gz"):
        with gzip.open(part.file) as stream:
            yield from stream
        return
    with open(part.file, "rb") as stream:
        stream.seek(part.start)
        left = part.end - part.start
        while left > 0 and (line := stream.readline()):
            left -= len(line)
            yield line


def decoded(line: bytes, encoding: str) -> str:
    """Raises BadRow that names the byte, not what stands there."""
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadRow(f"not {encoding} at byte {error.start} of the line") from error


def note_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> Note:
    """A note of a row. Raises BadRow that names the column."""
    values: dict[str, str] = {}
    for field in FIELDS:
        try:
            values[field] = value_of(field, row, column_of(field, row, columns))
        except BadRow as error:
            raise BadRow(str(error), values.get("note_id", ""), values.get("patient_id", "")) from error
    return Note(**values)  # type: ignore[arg-type]  # all of FIELDS are text


def value_of(field: str, row: Mapping[str, Any], name: str) -> str:
    """A field of a row as text. Raises BadRow that names the column."""
    value = row.get(name)
    if field in NEEDED and name not in row:
        raise BadRow(f"{name}: missing")
    if isinstance(value, dict | list | bool) or (field == "text" and not isinstance(value, str | None)):
        raise BadRow(f"{name}: expected text, got {type(value).__name__}")
    found = "" if isinstance(value, float) and not math.isfinite(value) else plain(value)
    if field in ("patient_id", "note_id") and not found.strip():
        raise BadRow(f"{name}: empty")
    if (problem := not_unicode(found)) is not None:
        raise BadRow(f"{name}: {problem}")
    return found


def not_unicode(text: str) -> str | None:
    """Why a text cannot be kept: JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a character (a lone surrogate) at character {error.start}"
    return None


def plain(value: Any) -> str:
    """A cell as text: 7.0 of a table with gaps is 7."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def column_of(field: str, row: Iterable[str], columns: Mapping[str, str]) -> str:
    """Name of the column that holds a field."""
    if field in columns:
        return columns[field]
    other = OMOP.get(field, field)
    return other if field not in row and other in row else field


def read_csv(part: Part, columns: Mapping[str, str], encoding: str) -> Found:
    """A table with a header. What cannot be decoded costs its row."""
    delimiter = "\t" if suffix_of(Path(part.file)) == ".tsv" else ","
    raw = gzip.open(part.file) if part.file.endswith(".gz") else open(part.file, "rb")  # noqa: SIM115
    with raw, io.TextIOWrapper(raw, encoding=encoding, errors="surrogateescape", newline="") as stream:
        rows = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
        except csv.Error as error:
            raise BadInput(f"notes: {part.file} is not CSV: {error}") from error
        if header is None:
            raise BadInput(f"notes: {part.file} is empty; expected a header")
        check_columns(part.file, [name.removeprefix("\ufeff") for name in header], columns)
        names = [name.removeprefix("\ufeff") for name in header]
        while True:
            place = f":{rows.line_num + 1}"
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, BadRow(f"not CSV: {error}")
                continue
            if cells:
                yield place, row_of_cells(names, cells, columns)


def row_of_cells(names: Sequence[str], cells: Sequence[str], columns: Mapping[str, str]) -> Note | BadRow:
    """A row of a table."""
    if len(cells) != len(names):
        return BadRow(f"got {len(cells)} cells, expected {len(names)}")
    bad = [name for name, cell in zip(names, cells, strict=True) if not cell.isascii() and has_lone(cell)]
    if bad:
        # The name itself may hold such bytes.
        return BadRow(f"{bad[0].encode(errors='backslashreplace').decode()}: not in the declared encoding")
    try:
        return note_of(dict(zip(names, cells, strict=True)), columns)
    except BadRow as error:
        return error


def has_lone(text: str) -> bool:
    """Whether bytes could not be decoded."""
    return any("\udc80" <= letter <= "\udcff" for letter in text)


def check_columns(file: str, names: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raise BadInput if a table lacks a column that is needed. What it has is not shown: without a header those are
    the first note."""
    for field in NEEDED:
        name = column_of(field, names, columns)
        if name not in names:
            other = f" or {OMOP[field]}" if field in OMOP and field not in columns else ""
            raise BadInput(
                f"notes: {file} has no column {name}{other} among its {len(names)}; expected a header with"
                f" {', '.join(NEEDED)}, or name it by columns.{field}="
            )


def read_parquet(part: Part, columns: Mapping[str, str], encoding: str) -> Found:
    """Row groups of a Parquet file."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(part.file)
    names = table.schema_arrow.names
    check_columns(part.file, names, columns)
    wanted = [name for field in FIELDS if (name := column_of(field, names, columns)) in names]
    number = part.first_line
    groups = list(range(part.start, part.end))
    for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups, columns=list(dict.fromkeys(wanted))):
        for row in batch.to_pylist():
            try:
                found: Note | BadRow = note_of(row, columns)
            except BadRow as error:
                found = error
            yield f": row {number}", found
            number += 1


def read_text(part: Part, columns: Mapping[str, str], encoding: str) -> Found:
    """A text file: its name is the note, the folder that it lies in the patient, or its name if there is none."""
    path = Path(part.file)
    inner = path.relative_to(part.root)
    name = inner.as_posix().removesuffix(".gz").removesuffix(".txt")
    patient = inner.parent.as_posix() if inner.parent != Path(".") else name
    raw = bytes_of(part.file)
    try:
        yield "", Note(patient_id=patient, note_id=name, text=decoded(raw, encoding))
    except BadRow as error:
        yield "", BadRow(str(error).replace(" of the line", ""), name, patient)


def read_bundle(part: Part, columns: Mapping[str, str], encoding: str) -> Found:
    """A FHIR bundle, or one resource."""
    raw = bytes_of(part.file)
    try:
        content = loaded(raw)
    except BadRow as error:
        yield "", error
        return
    if not isinstance(content, dict) or "resourceType" not in content:
        yield "", BadRow("expected a FHIR bundle, with resourceType")
        return
    for number, resource in resources_of(content):
        place = f": entry {number}" if number is not None else ""
        for found in notes_of_resource(resource):
            yield place, found


def notes_of_resource(resource: Any) -> Iterator[Note | BadRow]:
    """The notes of a FHIR resource, or what is wrong with it."""
    name = resource.get("id", "") if isinstance(resource, dict) else ""
    name = name if isinstance(name, str) and not_unicode(name) is None else ""
    for one in documents_of(resource):
        if isinstance(one, str):
            yield BadRow(one, name)
            continue
        note = Note(**one)
        texts = [(field, getattr(note, field)) for field in FIELDS] + [("relatesTo", old) for old in note.replaces]
        bad = next((f"{field}: {problem}" for field, text in texts if (problem := not_unicode(text))), None)
        yield note if bad is None else BadRow(bad, name)
