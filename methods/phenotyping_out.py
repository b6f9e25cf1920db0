"""What other systems take from a run: OMOP's NOTE_NLP and cohort tables, FHIR groups, costs. Never a confirmed
condition."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from cluster.run_directory import write_atomically
from methods.phenotyping_decide import Cited, Decided, Origin
from methods.phenotyping_definition import Definition
from methods.phenotyping_evidence import day_of
from methods.phenotyping_scan import staged

NLP_COLUMNS = (
    "note_nlp_id",
    "note_id",
    "section_concept_id",
    "snippet",
    "offset",
    "lexical_variant",
    "note_nlp_concept_id",
    "nlp_system",
    "nlp_date",
    "nlp_datetime",
    "term_exists",
    "term_temporal",
    "term_modifiers",
)
"""Of OMOP's NOTE_NLP."""
COHORT_COLUMNS = ("cohort_definition_id", "subject_id", "cohort_start_date", "cohort_end_date")
"""Of OMOP's COHORT."""
COST_COLUMNS = ("patient_id", "phenotype_id", "asked", "tokens", "decoded", "seconds")
Add = Callable[[Decided], None]
"""Takes the next decision. What is made of all is put in place when its context ends, and not if that fails."""
FHIR_ID = re.compile(r"[A-Za-z0-9.-]{1,64}")
UNKNOWN = "http://hl7.org/fhir/StructureDefinition/data-absent-reason"
PARTICIPANTS = "http://terminology.hl7.org/CodeSystem/provenance-participant-type"


@contextmanager
def whole(file: Path) -> Iterator[TextIO]:
    """A file to write, there when the context ends and not if that fails."""
    with open(staged(file), "w", encoding="utf-8", newline="") as stream:
        yield stream
    staged(file).replace(file)


@contextmanager
def note_nlp(file: Path, origin: Origin, recorded: str) -> Iterator[Add]:
    """As OMOP's NOTE_NLP has it: one row per match of a cited snippet, and one per copy of the snippet, whose text is
    not kept. Concept ids are left to the site. `recorded`: when, as the configuration says it."""
    system = f"repertory phenotyping {origin.model} {origin.prompt.digest}"
    with whole(file) as stream:
        rows = csv.writer(stream)
        rows.writerow(NLP_COLUMNS)
        numbers = count(1)

        def add(one: Decided) -> None:
            for cited in one.evidence:
                exists = "Y" if cited.answer == "yes" else "N"
                told = f"phenotype={one.phenotype_id};answer={cited.answer};p={cited.p}"
                told += f";status={cited.status}" if cited.status else ""
                for note, snippet, offset, variant, day in mentions_of(cited):
                    row = [
                        next(numbers),
                        note,
                        0,
                        snippet,
                        offset,
                        variant,
                        0,
                        system,
                        recorded[:10],
                        recorded,
                        exists,
                    ]
                    rows.writerow([*row, "", told + (f";note_date={day}" if day else "")])

        yield add


def mentions_of(cited: Cited) -> Iterator[tuple[str, str, int, str, str]]:
    """Note, snippet, offset, matched text and the note's date: of each match, then of each copy without its text."""
    for start, end in cited.matches:
        variant = cited.quote[start - cited.start : end - cited.start]
        yield cited.note_id, cited.quote, start, variant, cited.date
    for copy in cited.also_in:
        yield copy.note_id, "", copy.start, "", copy.date


@contextmanager
def cohort(file: Path) -> Iterator[Add]:
    """Patients who have it, as OMOP's COHORT has them, from the first to the last day of a text that says so; empty
    where none of these has a date. The site puts its number for the phenotype's id."""
    with whole(file) as stream:
        rows = csv.writer(stream)
        rows.writerow(COHORT_COLUMNS)

        def add(one: Decided) -> None:
            if one.decision == "yes":
                # A copy in a later note is no new evidence.
                days = [day for cited in one.evidence if cited.answer == "yes" and (day := day_of(cited.date))]
                ends = [min(days).isoformat(), max(days).isoformat()] if days else ["", ""]
                rows.writerow([one.phenotype_id, one.patient_id, *ends])

        yield add


@contextmanager
def groups(folder: Path, definitions: Sequence[Definition], origin: Origin, recorded: str) -> Iterator[Add]:
    """Of each phenotype a folder with a FHIR R4 Group of the patients who have it, and the Provenance of that."""
    members: dict[str, list[str]] = {one.phenotype_id: [] for one in definitions}

    def add(one: Decided) -> None:
        if one.decision == "yes":
            members[one.phenotype_id].append(one.patient_id)

    yield add
    for definition in definitions:
        own = folder / definition.phenotype_id
        own.mkdir(parents=True, exist_ok=True)
        group = group_of(definition, sorted(members[definition.phenotype_id]), origin)
        for resource in (group, provenance_of(group["id"], definition, origin, recorded)):
            told = json.dumps(resource, indent=1, ensure_ascii=False)
            write_atomically(own / f"{resource['resourceType'].lower()}.json", told + "\n")


def group_of(definition: Definition, patients: Sequence[str], origin: Origin) -> dict[str, Any]:
    """The Group. Its id depends on what its members depend on, apart from the notes."""
    told = json.dumps([definition.digest, origin.model, origin.prompt.digest, origin.run])
    group: dict[str, Any] = {
        "resourceType": "Group",
        "id": hashlib.sha256(told.encode()).hexdigest()[:32],
        "active": True,
        "type": "person",
        "actual": True,
        "code": {"text": definition.name},
        "name": f"{definition.name}: found in notes by a program, confirmed by nobody",
        "quantity": len(patients),
    }
    # FHIR has no empty lists.
    return group | ({"member": [{"entity": patient_reference(one)} for one in patients]} if patients else {})


def patient_reference(patient: str) -> dict[str, Any]:
    """A reference to a Patient; one whose id cannot be that of a resource is named by it as a business identifier."""
    if FHIR_ID.fullmatch(patient):
        return {"reference": f"Patient/{patient}"}
    return {"type": "Patient", "identifier": {"value": patient}}


def provenance_of(group: str, definition: Definition, origin: Origin, recorded: str) -> dict[str, Any]:
    """What a Group was made by and from. `recorded`: when, as the configuration says it; equal runs tell the same."""
    unknown = {"extension": [{"url": UNKNOWN, "valueCode": "unknown"}]}
    software = f"repertory phenotyping, model {origin.model}, prompt {origin.prompt.digest}, run {origin.run}"
    source = f"phenotype {definition.phenotype_id} version {definition.version}, definition {definition.digest}"
    return {
        "resourceType": "Provenance",
        "id": group,
        "target": [{"reference": f"Group/{group}"}],
        **({"recorded": recorded} if recorded else {"_recorded": unknown}),
        "agent": [
            {
                "type": {"coding": [{"system": PARTICIPANTS, "code": "assembler"}]},
                "who": {"type": "Device", "identifier": {"value": origin.model}, "display": software},
            }
        ],
        "entity": [
            {"role": "source", "what": {"identifier": {"value": definition.digest}, "display": source}},
        ],
    }


def write_costs(file: Path, found: Iterable[Decided]) -> None:
    """What each decision of a bucket took, without a header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    told = io.StringIO(newline="")
    rows = csv.writer(told, lineterminator="\n")
    rows.writerows([getattr(one, name) for name in COST_COLUMNS] for one in found)
    write_atomically(file, told.getvalue())
