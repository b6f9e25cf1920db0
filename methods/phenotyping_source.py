"""Where a run's notes, definitions, facts and labels come from, and which policy answers."""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from cluster.cluster import Cluster
from cluster.run_directory import write_atomically
from cluster.seeds import derive_seed
from methods.phenotyping_config import LABEL_FIELDS, Config
from methods.phenotyping_definition import Definition, read_definitions
from methods.phenotyping_evidence import evidence_of
from methods.phenotyping_mentions import mention_base, read_mentions, unrelated
from methods.phenotyping_notes import Note, plain, suffix_of
from methods.phenotyping_prompts import messages_of
from methods.phenotyping_rules import Fact, Rule
from methods.phenotyping_scan import Scan, scanned
from methods.worlds import wards
from methods.worlds.documents import read_lines
from protocols.errors import BadInput, describe_validation_error
from protocols.retriever import RetrieverService

Labels = dict[tuple[str, str], bool | None]
"""Of patient and phenotype; None where nobody can say."""
FLAGGED = "flagged"
"""In the column `sampled` of labels: of a decision that was flagged for review, as the review page exports them."""
CODE, DRUG = "Z01.7", "veltomab"
"""Of the invented diseases."""


@dataclass
class Source:
    """All that a run reads."""

    notes: list[str]
    definitions: list[Definition]
    model: str
    """Folder or name of the policy's model."""
    facts: dict[str, list[Fact]] = field(default_factory=dict)
    """By patient."""
    labels: Labels = field(default_factory=dict)
    flagged: frozenset[str] = frozenset()
    """Phenotypes with a label whose patient was chosen for the decision: one that was flagged for review."""


async def source_of(cluster: Cluster, config: Config, retriever: RetrieverService) -> Source:
    """Read, or drawn by the world. Raises BadInput that names file, line and field."""
    if config.world:
        return await drawn(cluster, config, retriever)
    definitions = read_definitions(config.definitions)
    model = config.policy.model
    if config.mentions:
        model = await mention_base(
            cluster,
            config.policy,
            await unrelated(read_mentions(config.mentions), retriever, definitions),
            config.prompt.labels,
            config.mention_steps,
            config.mention_rate,
        )
    labels, flagged = read_labels(config, definitions)
    return Source(config.notes, definitions, model, read_facts(config.facts), labels, flagged)


async def drawn(cluster: Cluster, config: Config, retriever: RetrieverService) -> Source:
    """The wards: notes in a file of their own beside the runs, and a policy that is taught if it is not there yet."""
    disease = wards.disease_of(config.seed)
    definition = ward_definition(disease)
    told = json.dumps(
        [config.wards.model_dump(), config.seed, disease, wards.PHRASES, wards.FILLERS, wards.FAMILY_FILLERS]
    )
    name = f"wards-notes-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    file = cluster.directory.path.parent / "bases" / name / "notes.jsonl"
    labels: Labels = {}
    facts: dict[str, list[Fact]] = {}
    lines = []
    for patient in wards.patients_of(config.wards, disease, config.seed):
        labels[patient.id, definition.phenotype_id] = patient.ill
        facts[patient.id] = [
            *([Fact(patient_id=patient.id, kind="code", code=CODE)] if patient.code else []),
            *([Fact(patient_id=patient.id, kind="drug", code=DRUG)] if patient.drug else []),
        ]
        lines += [json.dumps({k: v for k, v in vars(one).items() if k != "said"}) + "\n" for one in patient.notes]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(lines))
    lessons = await ward_lessons(config, retriever)
    model = await wards.ward_base(cluster, config.policy, lessons, config.wards.context, config.seed)
    return Source([str(file)], [definition], model, facts, labels)


def ward_definition(disease: str) -> Definition:
    """Of an invented disease."""
    rules = Rule(any=[Rule(codes=[CODE]), Rule(drugs=[DRUG])])
    return Definition(
        phenotype_id="ward",
        version="1",
        name=disease,
        description=f"The patient has, or has had, {disease}.",
        terms=[disease],
        rules=rules,
    )


async def ward_lessons(config: Config, retriever: RetrieverService) -> list[tuple[str, str]]:
    """Prompts about another disease, cut and written as a run's own are, with answers, of which some are wrong.

    Raises BadInput if no snippet is long enough to be asked about.
    """
    definition = ward_definition(wards.TAUGHT)
    scan = Scan(sets=[definition.pattern_set()], window=config.window, folder="")
    found: list[tuple[str, str]] = []
    rng = np.random.default_rng(derive_seed(config.seed, "noise"))
    answers = list(config.prompt.labels.values())
    first = 0
    size = config.wards.model_copy(update={"prevalence": 0.5, "copied": 0.0})
    if config.wards.stuffed == "asked":
        size = size.model_copy(update={"stuffed": "no"})
    while len(found) < config.wards.lessons:
        some = wards.patients_of(size, wards.TAUGHT, config.seed + 1, unseen=False, first=first, count=200)
        told = [(one, one.said) for patient in some for one in patient.notes if one.said is not None]
        notes = [Note(one.patient_id, one.note_id, one.text, one.date, one.note_type) for one, _ in told]
        for (_, said), note in zip(told, await scanned(retriever, scan, notes), strict=True):
            for group in evidence_of([note], definition, config.evidence).groups:
                answer = config.prompt.labels[wards.LABELS[said]]
                if rng.random() < wards.NOISE:
                    answer = answers[int(rng.integers(len(answers)))]
                found.append((messages_of(group, definition, config.prompt)[0].content, answer))
        if not found:
            raise BadInput(f"window: no snippet has evidence.letters={config.evidence.letters} letters")
        first += 200
    return found[: config.wards.lessons]


def model_digest(model: str) -> str:
    """What tells models apart: of a folder all files in it, else the name."""
    folder = Path(model)
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(model.encode())
    for file in sorted(one for one in folder.iterdir() if one.is_file()) if folder.is_dir() else []:
        digest.update(file.name.encode())
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def rows_of(path: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of .jsonl or .csv, perhaps with .gz, with their places. Raises BadInput, which shows no row."""
    lines = read_lines(Path(path).expanduser(), what)
    if suffix_of(Path(path)) == ".csv":
        reader = csv.DictReader(lines)
        for row in reader:
            yield f"{path}:{reader.line_num}", row
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{what}: {path}:{number}: neither a row of JSON nor, by its name, of CSV") from error
            if not isinstance(value, dict):
                raise BadInput(f"{what}: {path}:{number}: expected an object")
            yield f"{path}:{number}", value


def read_facts(paths: list[str]) -> dict[str, list[Fact]]:
    """Facts by patient."""
    found: dict[str, list[Fact]] = {}
    for path in paths:
        for place, row in rows_of(path, "facts"):
            try:
                one = Fact.model_validate({k: v for k, v in row.items() if v not in ("", None)})
            except ValidationError as error:
                raise BadInput(f"facts: {place}: {describe_validation_error(error)}") from error
            if not one.patient_id.strip():
                raise BadInput(f"facts: {place}: patient_id: missing")
            found.setdefault(one.patient_id, []).append(one)
    return found


def read_labels(config: Config, definitions: Sequence[Definition]) -> tuple[Labels, frozenset[str]]:
    """The truth as far as it is known, and phenotypes with a label of a decision that was flagged for review."""
    found: Labels = {}
    flagged: set[str] = set()
    ids = [one.phenotype_id for one in definitions]
    names = {name: config.label_columns.get(name, name) for name in LABEL_FIELDS}
    held = False
    for place, row in rows_of(config.labels, "labels") if config.labels else ():
        key = (cell(row, names["patient_id"], place), cell(row, names["phenotype"], place).strip())
        if key[1] not in ids:
            told = f"got {key[1][:40]!r}, expected one of {', '.join(ids)}"
            raise BadInput(f"labels: {place}: {names['phenotype']}: {told}")
        if key in found:
            raise BadInput(f"labels: {place}: a patient occurs twice with phenotype {key[1]!r}")
        found[key] = truth_of(row, names["label"], place)
        held = held or names["label"] in row
        if plain(row.get("sampled")).strip() == FLAGGED:
            flagged.add(key[1])
    if found and not held:
        raise BadInput(f"labels: {config.labels} has no column {names['label']}; name it by label_columns.label=")
    return found, frozenset(flagged)


def truth_of(row: Mapping[str, Any], name: str, place: str) -> bool | None:
    """What a label says; None where nobody can say."""
    text = plain(row.get(name)).strip()
    if text not in ("0", "1", ""):
        raise BadInput(f"labels: {place}: {name}: got {text[:40]!r}, expected 1, 0 or nothing")
    return None if not text else text == "1"


def cell(row: Mapping[str, Any], name: str, place: str) -> str:
    """A cell that is needed, as it is."""
    value = plain(row.get(name))
    if not value.strip():
        raise BadInput(f"labels: {place}: {name}: missing; name the column by label_columns")
    return value
