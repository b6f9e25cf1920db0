"""Snippets of real notes, and of sentences whose names and dates were taken out."""

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from actors.retriever.retriever import RetrieverActor
from methods.phenotyping_definition import read_definitions
from methods.phenotyping_deidentify import Stage, deidentified
from methods.phenotyping_fhir import raw_place
from methods.phenotyping_mentions import read_mentions
from methods.phenotyping_notes import Note, read_part
from methods.phenotyping_parts import parts_of
from methods.phenotyping_scan import Scan, Scanned, scanned
from protocols.retriever import RetrieverConfig, RetrieverService, Window

DATA = os.environ.get("REPERTORY_DATA", "")
pytestmark = pytest.mark.skipif(not DATA, reason="REPERTORY_DATA is not set")
SHIPPED = Path(__file__).parents[2] / "methods" / "definitions"


@pytest.mark.parametrize("window", [Window(), Window(characters=0, snap=300), Window(characters=40, snap=0)], ids=str)
async def test_each_snippet_stands_where_it_says(toys: Any, window: Window) -> None:
    folder = Path(DATA) / "phenotyping"
    (part,) = parts_of([str(folder / "mtsamples_notes_dev.jsonl")], 1 << 30)
    notes = [one for one in read_part(part, {"patient_id": "note_id"}) if isinstance(one, Note)]
    assert len(notes) == 285
    with open(folder / "context_mentions_dev.tsv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    notes += [Note(row["report_no"], row["order"], row["sentence"]) for row in rows]
    assert sum("**" in note.text for note in notes) > 100
    retriever = await toys.serve(RetrieverService, RetrieverActor(RetrieverConfig(kind="pattern")))
    sets = [one.pattern_set() for one in read_definitions([str(SHIPPED)])]
    found = await scanned(retriever, Scan(sets=sets, window=window, folder=""), notes)
    quotes = [(note, one) for note, own in zip(notes, found, strict=True) for one in own.findings]
    assert len(quotes) > 300
    for note, one in quotes:
        assert note.text[one.start : one.end] == one.text
        assert all(one.start <= start < end <= one.end for start, end in one.matches)


def test_real_mentions_and_labels_are_read() -> None:
    folder = Path(DATA) / "phenotyping"
    mentions = read_mentions([str(folder / "context_mentions_dev.tsv")])
    # The README counts 6 of 1,594 concepts that are not in their sentences.
    assert len(mentions) == 1588
    texts = (folder / "mtsamples_notes_dev.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({json.loads(line)["note_id"] for line in texts}) == 285


async def test_identifiers_are_taken_out_and_diseases_stay(toys: Any) -> None:
    (part,) = parts_of([str(Path(DATA) / "phenotyping" / "mtsamples_notes_dev.jsonl")], 1 << 30)
    notes = [one for one in read_part(part, {"patient_id": "note_id"}) if isinstance(one, Note)]
    replaced: Counter[str] = Counter()
    after = [deidentified(note, Stage(365, b"0123456789abcdef", {}, {}), replaced) for note in notes]
    assert replaced["date"] > 300 and replaced["name"] > 150 and replaced["age"] == 11
    assert set(replaced) == {"date", "name", "age", "id", "phone"}
    retriever = await toys.serve(RetrieverService, RetrieverActor(RetrieverConfig(kind="pattern")))
    sets = [one.pattern_set() for one in read_definitions([str(SHIPPED)])]
    scan = Scan(sets=sets, window=Window(), folder="")
    texts = []
    for some in (notes, after):
        found = await scanned(retriever, scan, some)
        texts.append([note.text[slice(*m)] for note, own in zip(some, found, strict=True) for m in matches_of(own)])
    assert texts[0] == texts[1] and len(texts[0]) > 350
    for before, note, own in zip(notes, after, found, strict=True):
        for start, end in matches_of(own):
            raw = raw_place(note.raw_places, start), raw_place(note.raw_places, end, last=True)
            assert before.text[slice(*raw)] == note.text[start:end]


def matches_of(own: Scanned) -> list[tuple[int, int]]:
    return [match for finding in own.findings for match in finding.matches]
