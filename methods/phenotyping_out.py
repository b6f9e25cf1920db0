"""What other systems take from a run: OMOP's NOTE_NLP and cohort tables, FHIR groups. Never a confirmed condition."""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.run_directory import write_atomically
from methods.phenotyping_decide import Decided, Origin, Place
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
FHIR_ID = re.compile(r"[A-Za-z0-9.-]{1,64}")
UNKNOWN = "http://hl7.org/fhir/StructureDefinition/data-absent-reason"
PARTICIPANTS = "http://terminology.hl7.org/CodeSystem/provenance-participant-type"


def write_note_nlp(file: Path, found: Iterable[Decided], origin: Origin) -> None:
    """One row per cited mention, copies included, as OMOP's NOTE_NLP has it; concept ids are left to the site."""
    system = f"repertory phenotyping {origin.model} {origin.prompt.digest}"
    with open(staged(file), "w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(NLP_COLUMNS)
        number = 0
        for one in found:
            for cited in one.evidence:
                exists = "Y" if cited.answer == "yes" else "N"
                variant = cited.quote[cited.matches[0][0] - cited.start : cited.matches[0][1] - cited.start]
                told = f"phenotype={one.phenotype_id};answer={cited.answer};p={cited.p}"
                told += f";status={cited.status}" if cited.status else ""
                own = Place(note_id=cited.note_id, start=cited.start, end=cited.end, date=cited.date)
                for place in [own, *cited.also_in]:
                    number += 1
                    row = [number, place.note_id, 0, cited.quote, place.start, variant, 0, system]
                    rows.writerow([*row, place.date[:10], place.date, exists, "", told])
    staged(file).replace(file)


def write_cohort(file: Path, found: Iterable[Decided]) -> None:
    """Patients who have it, as OMOP's COHORT has them, from the first to the last day of a text that says so; empty
    where none of these has a date. The site puts its number for the phenotype's id."""
    with open(staged(file), "w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(COHORT_COLUMNS)
        for one in found:
            if one.decision == "yes":
                # A copy in a later note is no new evidence.
                days = [day for cited in one.evidence if cited.answer == "yes" and (day := day_of(cited.date))]
                ends = [min(days).isoformat(), max(days).isoformat()] if days else ["", ""]
                rows.writerow([one.phenotype_id, one.patient_id, *ends])
    staged(file).replace(file)


def write_groups(
    folder: Path, found: Iterable[Decided], definitions: Sequence[Definition], origin: Origin, recorded: str
) -> None:
    """Of each phenotype a folder with a FHIR R4 Group of the patients who have it, and the Provenance of that."""
    members: dict[str, list[str]] = {one.phenotype_id: [] for one in definitions}
    for one in found:
        if one.decision == "yes":
            members[one.phenotype_id].append(one.patient_id)
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
