"""Where a run's notes, definitions, facts and labels come from, and which policy answers."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from cluster.cluster import Cluster
from cluster.run_directory import write_atomically
from cluster.seeds import derive_seed
from methods.phenotyping_config import LABEL_FIELDS, Config
from methods.phenotyping_definition import Definition, read_definitions
from methods.phenotyping_evidence import evidence_of
from methods.phenotyping_measures import Drawn
from methods.phenotyping_mentions import mention_base, read_mentions, unrelated
from methods.phenotyping_notes import Note, plain
from methods.phenotyping_prompts import messages_of
from methods.phenotyping_review import FLAGGED, OTHER
from methods.phenotyping_rules import Fact, Rule
from methods.phenotyping_scan import Scan, scanned
from methods.phenotyping_tables import rows_of
from methods.worlds import wards
from protocols.errors import BadInput, describe_validation_error
from protocols.retriever import RetrieverService

Key = tuple[str, str]
"""Patient and phenotype."""
CODE, DRUG = "Z01.7", "veltomab"
"""Of the invented diseases."""


@dataclass
class Labels:
    """What is known of patients."""

    truth: dict[Key, bool | None] = field(default_factory=dict)
    """None where nobody can say."""
    drawn: dict[Key, Drawn] = field(default_factory=dict)
    """How they were chosen, of labels that say yes or no and are of a sample per stratum."""
    flagged: frozenset[str] = frozenset()
    """Phenotypes with a label whose patient was chosen for the decision, one that was flagged for review, and without
    weighted labels of the other decisions."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows of phenotypes without a definition."""


class Sampled(NamedTuple):
    """How a row of labels says that it was chosen."""

    place: str
    stratum: str
    of: float | None
    """Decisions of the stratum; None where it is not told."""


@dataclass
class Source:
    """All that a run reads."""

    notes: list[str]
    definitions: list[Definition]
    model: str
    """Folder or name of the policy's model."""
    facts: dict[str, list[Fact]] | None = None
    """Of patients with a label, by patient; None where there are none of anybody."""
    labels: Labels = field(default_factory=Labels)


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
    labels = read_labels(config, definitions)
    facts = read_facts(config.facts, {patient for patient, _ in labels.truth})
    return Source(config.notes, definitions, model, facts, labels)


async def drawn(cluster: Cluster, config: Config, retriever: RetrieverService) -> Source:
    """The wards: notes in a file of their own beside the runs, and a policy that is taught if it is not there yet."""
    disease = wards.disease_of(config.seed)
    definition = ward_definition(disease)
    told = json.dumps(
        [config.wards.model_dump(), config.seed, disease, wards.PHRASES, wards.FILLERS, wards.FAMILY_FILLERS]
    )
    name = f"wards-notes-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    file = cluster.directory.path.parent / "bases" / name / "notes.jsonl"
    labels = Labels()
    facts: dict[str, list[Fact]] = {}
    lines = []
    for patient in wards.patients_of(config.wards, disease, config.seed):
        labels.truth[patient.id, definition.phenotype_id] = patient.ill
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
    stuffed = "taught" if config.wards.stuffed == "taught" else "no"
    size = config.wards.model_copy(update={"prevalence": 0.5, "copied": 0.0, "stuffed": stuffed})
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


def read_facts(paths: list[str], patients: Collection[str]) -> dict[str, list[Fact]] | None:
    """Facts of these patients, by patient; None where nobody has any. All rows are checked."""
    found: dict[str, list[Fact]] = {}
    some = False
    for path in paths:
        for place, row in rows_of(path, "facts"):
            try:
                one = Fact.model_validate({k: v for k, v in row.items() if v not in ("", None)})
            except ValidationError as error:
                raise BadInput(f"facts: {place}: {describe_validation_error(error)}") from error
            if not one.patient_id.strip():
                raise BadInput(f"facts: {place}: patient_id: missing")
            some = True
            if one.patient_id in patients:
                found.setdefault(one.patient_id, []).append(one)
    return found if some else None


def read_labels(config: Config, definitions: Sequence[Definition]) -> Labels:
    """The labels of these phenotypes. Raises BadInput that names line and column, and if none is of one of them."""
    truth: dict[Key, bool | None] = {}
    sampled: dict[Key, Sampled] = {}
    left_out: Counter[str] = Counter()
    ids = [one.phenotype_id for one in definitions]
    names = {name: config.label_columns.get(name, name) for name in LABEL_FIELDS}
    held, strange = False, ""
    for place, row in rows_of(config.labels, "labels") if config.labels else ():
        key = (cell(row, names["patient_id"], place), cell(row, names["phenotype"], place).strip())
        if key[1] not in ids:
            told = f"got {key[1][:40]!r}, expected one of {', '.join(ids)}"
            strange = strange or f"labels: {place}: {names['phenotype']}: {told}"
            left_out[key[1]] += 1
            continue
        if key in truth:
            raise BadInput(f"labels: {place}: a patient occurs twice with phenotype {key[1]!r}")
        truth[key] = truth_of(row, names["label"], place)
        held = held or names["label"] in row
        sampled[key] = sampled_of(row, place)
    if strange and not truth:
        raise BadInput(strange)
    if truth and not held:
        raise BadInput(f"labels: {config.labels} has no column {names['label']}; name it by label_columns.label=")
    drawn = weighted(sampled, {key for key, label in truth.items() if label is not None})
    flagged = {phenotype for (_, phenotype), one in sampled.items() if one.stratum == FLAGGED}
    flagged -= {phenotype for (_, phenotype), one in drawn.items() if one.stratum == OTHER}
    return Labels(truth, drawn, frozenset(flagged), left_out)


def sampled_of(row: Mapping[str, Any], place: str) -> Sampled:
    """The columns `sampled` and `of`; without both nothing is weighted."""
    stratum, told = plain(row.get("sampled")).strip(), plain(row.get("of")).strip()
    if "sampled" not in row or not told:
        return Sampled(place, stratum, None)
    if stratum not in (FLAGGED, OTHER):
        raise BadInput(
            f"labels: {place}: sampled: got {stratum[:40]!r}, expected {FLAGGED} or {OTHER}, as `of` is told"
        )
    try:
        size = float(told)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise BadInput(f"labels: {place}: of: got {told[:40]!r}, expected how many decisions there are, above 0")
    return Sampled(place, stratum, size)


def weighted(rows: Mapping[Key, Sampled], known: Collection[Key]) -> dict[Key, Drawn]:
    """How many patients each of the known labels stands for: the size of its stratum, which is one of a phenotype,
    over its known labels (specification 2.9). Raises BadInput if a stratum has two sizes or more rows than it says,
    or only some rows of a phenotype tell one."""
    sizes: dict[tuple[str, str], tuple[float, str]] = {}
    without: dict[str, str] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for (_, phenotype), (place, stratum, size) in rows.items():
        if size is None:
            without.setdefault(phenotype, place)
            continue
        first, where = sizes.setdefault((phenotype, stratum), (size, place))
        if size != first:
            raise BadInput(f"labels: {place}: of: got {plain(size)}, expected {plain(first)} as in {where}")
        seen[phenotype, stratum] += 1
        if seen[phenotype, stratum] > size:
            told = f"got {plain(size)}, expected no less than the {seen[phenotype, stratum]} labels up to here"
            raise BadInput(f"labels: {place}: of: {told}")
    for phenotype, _ in sizes:
        if phenotype in without:
            raise BadInput(f"labels: {without[phenotype]}: of: missing; other labels of {phenotype!r} have it")
    labels = Counter((key[1], rows[key].stratum) for key in known)
    return {
        key: Drawn(one.stratum, one.of / labels[key[1], one.stratum])
        for key, one in rows.items()
        if one.of is not None and key in known
    }


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
