"""First pass: every note is read once, snippets are cut, and patients are spread over buckets.

A part's results are files that are there whole or not at all, so a run that was killed reads the other parts only.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from pydantic import ValidationError

from cluster.run_directory import write_atomically
from methods.phenotyping_deidentify import DeidentifyConfig, Stage, deidentified, kept_stage
from methods.phenotyping_fhir import raw_place
from methods.phenotyping_notes import Note, Reject, read_part
from methods.phenotyping_parts import Part
from protocols.errors import Corrupt
from protocols.retriever import Document, PatternSet, RetrieverService, Snippet, SnippetsRequest, Window
from protocols.service import Message

NOTES_PER_CALL = 256
FILES_AT_ONCE = 400
"""Buckets that are written side by side; a process may not have many files open."""
CHARACTERS_PER_CALL = 1 << 20


class Finding(Message):
    """A snippet of a note."""

    set: str
    """The phenotype."""
    start: int
    """First character in the note's text."""
    end: int
    """Behind its last."""
    text: str
    """What stands there."""
    matches: list[tuple[int, int]]
    """First character and the place behind the last of each match, in the note's text; those of several patterns that
    overlap are one."""
    section: str = ""
    """Header above it."""
    raw: tuple[int, int] | None = None
    """Its place in the raw document, where that may be another: of notes in HTML, and of de-identified ones."""


class Scanned(Message):
    """A note without its text."""

    patient_id: str
    note_id: str
    date: str = ""
    note_type: str = ""
    encounter_id: str = ""
    digest: str
    """Of the text."""
    replaces: list[str] = []
    """Ids of notes that it is a newer version of."""
    findings: list[Finding] = []
    """Its snippets, in order of phenotype and place."""


class PartCounts(Message):
    """What a part held."""

    notes: int = 0
    rejects: int = 0
    characters: int = 0
    snippets: int = 0
    replaced: dict[str, int] = {}
    """Identifiers by kind, of notes that are de-identified."""


class Scan(Message):
    """What a part is read with; it goes to whoever reads it."""

    sets: list[PatternSet]
    """All phenotypes."""
    window: Window
    """How much is cut out."""
    columns: dict[str, str] = {}
    """Names of columns by ours."""
    encoding: str = "utf-8"
    """Of lines and tables."""
    deidentify: DeidentifyConfig | None = None
    """What identifiers are taken out with."""
    digests: dict[str, str] = {}
    """Of its secret and names, as the run began."""
    folder: str
    """Where results go."""


def counts_file(folder: Path, index: int) -> Path:
    """Written last: that it is there says that the part is done."""
    return folder / f"part-{index:06d}.counts.json"


async def scan_part(retriever: RetrieverService, scan: Scan, part: Part) -> PartCounts:
    """Read a part and leave its notes with their snippets, and its rejects. Raises Corrupt if a snippet is not where
    it says."""
    folder = Path(scan.folder)
    notes = folder / f"part-{part.index:06d}.jsonl"
    totals = dict.fromkeys(("notes", "characters", "snippets"), 0)
    replaced: Counter[str] = Counter()
    rejects: list[str] = []
    stage = kept_stage(scan.deidentify, scan.digests) if scan.deidentify else None
    with open(staged(notes), "w", encoding="utf-8") as lines:
        for read in batches(part, scan, rejects):
            batch = await without_identifiers(retriever, scan, stage, read, replaced) if stage else read
            for one in await scanned(retriever, scan, batch):
                lines.write(one.model_dump_json(exclude_defaults=True) + "\n")
                totals["snippets"] += len(one.findings)
            totals["notes"] += len(batch)
            totals["characters"] += sum(len(note.text) for note in batch)
        lines.flush()
        os.fsync(lines.fileno())
    write_atomically(folder / f"part-{part.index:06d}.rejects.jsonl", "".join(rejects))
    os.replace(staged(notes), notes)
    found = PartCounts(**totals, rejects=len(rejects), replaced=dict(sorted(replaced.items())))
    write_atomically(counts_file(folder, part.index), found.model_dump_json())
    return found


def staged(file: Path) -> Path:
    """Where it is written before it is there."""
    return file.with_name(f".{file.name}.tmp")


def batches(part: Part, scan: Scan, rejects: list[str]) -> Iterator[list[Note]]:
    """Notes of a part, some at a time; what cannot be read is added to `rejects`, as lines."""
    batch: list[Note] = []
    characters = 0
    for one in read_part(part, scan.columns, scan.encoding, show=scan.deidentify is None):
        if isinstance(one, Reject):
            rejects.append(json.dumps(vars(one), ensure_ascii=False) + "\n")
            continue
        batch.append(one)
        characters += len(one.text)
        if len(batch) == NOTES_PER_CALL or characters >= CHARACTERS_PER_CALL:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


async def without_identifiers(
    retriever: RetrieverService, scan: Scan, stage: Stage, notes: Sequence[Note], replaced: Counter[str]
) -> list[Note]:
    """Notes after the stage; what phenotypes are found by is no name in them. Counts what is replaced."""
    bare = scan.model_copy(update={"window": Window(characters=0, snap=0)})
    found = await scanned(retriever, bare, notes)
    kept = [apart(match for finding in one.findings for match in finding.matches) for one in found]
    return [deidentified(note, stage, replaced, own) for note, own in zip(notes, kept, strict=True)]


async def scanned(retriever: RetrieverService, scan: Scan, notes: Sequence[Note]) -> list[Scanned]:
    """Notes with their snippets."""
    # Several notes may have one id.
    documents = [Document(id=str(i), text=note.text) for i, note in enumerate(notes)]
    request = SnippetsRequest(documents=documents, sets=scan.sets, window=scan.window)
    found: list[list[Finding]] = [[] for _ in notes]
    for snippet in (await retriever.snippets(request)).snippets:
        place = int(snippet.document)
        found[place].append(finding_of(snippet, notes[place]))
    return [
        Scanned(
            patient_id=note.patient_id,
            note_id=note.note_id,
            date=note.date,
            note_type=note.note_type,
            encounter_id=note.encounter_id,
            digest=note.digest,
            replaces=list(note.replaces),
            findings=own,
        )
        for note, own in zip(notes, found, strict=True)
    ]


def finding_of(snippet: Snippet, note: Note) -> Finding:
    """A snippet as it is kept. Raises Corrupt unless the note has it where it says."""
    if note.text[snippet.start : snippet.end] != snippet.text:
        raise Corrupt(f"note {note.note_id!r}: a snippet is not at characters {snippet.start} to {snippet.end}")
    raw = None
    if note.raw_places:
        raw = raw_place(note.raw_places, snippet.start), raw_place(note.raw_places, snippet.end, last=True)
    return Finding(
        set=snippet.set,
        start=snippet.start,
        end=snippet.end,
        text=snippet.text,
        matches=apart((match.start, match.end) for match in snippet.matches),
        section=snippet.section,
        raw=raw,
    )


def apart(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that overlap as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def bucket_of(patient_id: str, buckets: int) -> int:
    """Where a patient belongs: by the id alone."""
    digest = hashlib.blake2b(patient_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % buckets


def spread(folder: Path, parts: int, buckets: int, show: Callable[[str], None]) -> None:
    """Put each patient's notes together: one file per bucket, in the order of the parts. Nothing is left to do where
    that has been done."""
    target = folder / "buckets"
    if target.is_dir():
        return
    staging = folder / ".buckets"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for first in range(0, buckets, FILES_AT_ONCE):
        few = range(first, min(first + FILES_AT_ONCE, buckets))
        with ExitStack() as stack:
            files = {i: stack.enter_context(open(staging / bucket_name(i + 1), "w", encoding="utf-8")) for i in few}
            for index in range(parts):
                show(f"patients are put together: part {index} of {parts}, buckets from {first + 1}")
                with open(folder / "scan" / f"part-{index:06d}.jsonl", encoding="utf-8") as lines:
                    for line in lines:
                        if (i := bucket_of(json.loads(line)["patient_id"], buckets)) in few:
                            files[i].write(line)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
    os.rename(staging, target)


def bucket_name(step: int) -> str:
    """File of a step's patients; steps count from 1."""
    return f"bucket-{step:06d}.jsonl"


def read_bucket(file: Path) -> dict[str, list[Scanned]]:
    """Notes by patient, in order of first appearance. Raises Corrupt."""
    patients: dict[str, list[Scanned]] = {}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                one = Scanned.model_validate_json(line)
            except ValidationError as error:
                raise Corrupt(f"{file} line {number} is no scanned note: {error.error_count()} errors") from error
            patients.setdefault(one.patient_id, []).append(one)
    return patients
