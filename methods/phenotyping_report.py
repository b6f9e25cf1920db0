"""What phenotyping leaves: decisions, rejects, tables, an evaluation, an audit record, a review page."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.run_directory import write_atomically
from cluster.summary import Summary, SummaryRow
from methods.phenotyping_config import Config
from methods.phenotyping_decide import Decided, Origin, rule_of
from methods.phenotyping_eval import Evaluation, evaluate
from methods.phenotyping_measures import Drawn
from methods.phenotyping_out import COST_COLUMNS, cohort, groups, note_nlp
from methods.phenotyping_prompts import MOST_WRITTEN
from methods.phenotyping_review import FLAGGED, OTHER, ReviewSample, write_review
from methods.phenotyping_scan import bucket_name, bucket_of, staged
from methods.phenotyping_source import Labels, Source
from protocols.policy import PolicyInfo

PANELS = {
    "Questions per bucket": ["snippets", "questions", "asked"],
    "Decisions per bucket": ["yes", "no", "uncertain", "no_evidence", "failed"],
    "Tokens of prompts per bucket": ["tokens"],
}
FLAGGED_ONLY = (
    "Labels are of decisions that were flagged for review: precision can be read from them, recall and F1 cannot."
)
OTHERS_ONLY = (
    "Labels are of decisions that were not flagged for review, and of none that were: precision, recall and F1 cannot"
    " be read from them."
)
WEIGHTED = "Labels are a sample of flagged and other decisions: each counts for as many patients as it stands for."
NAMED = 3
"""Phenotypes without a definition that the summary names."""
REPLACED = "scan/replaced/"
SUMMED = (
    *("scan/notes", "scan/rejects", "patients", "snippets", "questions", "asked", "tokens", "decoded"),
    *("yes", "no", "uncertain", "no_evidence", "failed"),
)


def metrics_of(found: Sequence[Decided], patients: int) -> dict[str, float]:
    """One bucket in numbers."""
    decisions = Counter(one.decision for one in found)
    sums = {name: sum(getattr(one, f"n_{name}") for one in found) for name in ("found", "groups", "sent", "read")}
    metrics = {
        "patients": patients,
        "snippets": sums["found"],
        "different": sums["groups"],
        "questions": sums["sent"] + sums["read"],
    }
    metrics |= {name: sum(getattr(one, name) for one in found) for name in ("asked", "tokens", "decoded")}
    metrics |= {name: decisions[name] for name in ("yes", "no", "uncertain", "no_evidence", "failed")}
    metrics["near_threshold"] = sum(one.near_threshold for one in found)
    return {name: float(value) for name, value in metrics.items()}


def finish(
    folder: Path,
    config: Config,
    source: Source,
    origin: Origin,
    rows: Sequence[Mapping[str, float]],
    info: PolicyInfo,
) -> Summary:
    """Put the buckets together, and say what the run came to."""
    buckets = [folder / "decisions" / bucket_name(step) for step in range(1, config.steps + 1)]
    done = [file for file in buckets if file.is_file()]
    join(folder / "decisions.jsonl", done)
    join(folder / "costs.csv", [folder / "costs" / file.name for file in done], ",".join(COST_COLUMNS) + "\n")
    join(folder / "rejects.jsonl", sorted((folder / "scan").glob("part-*.rejects.jsonl")))
    sample = ReviewSample(config.seed, {FLAGGED: config.review, OTHER: config.review_others if config.review else 0})
    labels = labels_of(source.labels, config.steps, {int(file.stem.rpartition("-")[2]) for file in done})
    labelled: dict[str, dict[str, Decided]] = {name: {} for name in labels}
    with ExitStack() as outputs:
        adds = [
            outputs.enter_context(note_nlp(folder / "note_nlp.csv", origin, config.recorded)),
            outputs.enter_context(cohort(folder / "cohort.csv")),
            outputs.enter_context(groups(folder / "fhir", source.definitions, origin, config.recorded)),
            sample.add,
        ]
        for one in read_decisions(folder):
            for add in adds:
                add(one)
            if one.patient_id in labels.get(one.phenotype_id, ()):
                labelled[one.phenotype_id][one.patient_id] = one
    write_atomically(folder / "audit.json", json.dumps(audit(source, origin, info), indent=1, ensure_ascii=False))
    shown = write_review(folder / "review.html", sample, source.definitions)
    evaluations = evaluated(config, source, labelled, labels)
    if evaluations:
        told = json.dumps([without_nan(asdict(one)) for one in evaluations], indent=1, allow_nan=False)
        write_atomically(folder / "evaluation.json", told)
    return summary(rows, evaluations, shown, source.labels, partial=len(done) < len(buckets))


def without_nan(value: Any) -> Any:
    """A value of JSON with None for what is no number."""
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return known(value) if isinstance(value, float) else value


def join(target: Path, files: Sequence[Path], head: str = "") -> None:
    """Files one after the other as one, whole or not at all."""
    with open(staged(target), "wb") as out:
        out.write(head.encode())
        for file in files:
            with open(file, "rb") as stream:
                shutil.copyfileobj(stream, out)
    staged(target).replace(target)


def read_decisions(folder: Path) -> Iterator[Decided]:
    """All of a run, one at a time."""
    with open(folder / "decisions.jsonl", encoding="utf-8") as lines:
        for line in lines:
            yield Decided.model_validate_json(line)


def audit(source: Source, origin: Origin, info: PolicyInfo) -> dict[str, object]:
    """What decisions rest on, and nothing of any note."""
    return {
        "run": origin.run,
        "model": {"name": info.model, "digest": origin.model, "version": info.version, "tokenizer": info.tokenizer},
        "prompt": {"digest": origin.prompt.digest, **origin.prompt.model_dump(mode="json")},
        "definitions": [{"digest": one.digest, **one.model_dump(mode="json")} for one in source.definitions],
        "notes": source.notes,
        "deidentified": dict(origin.deidentified),
    }


def labels_of(labels: Labels, steps: int, done: Collection[int]) -> dict[str, dict[str, bool | None]]:
    """By phenotype and patient, of those buckets that were decided about."""
    found: dict[str, dict[str, bool | None]] = {}
    for (patient, phenotype), label in labels.truth.items():
        if bucket_of(patient, steps) + 1 in done:
            found.setdefault(phenotype, {})[patient] = label
    return found


def evaluated(
    config: Config,
    source: Source,
    decisions: Mapping[str, Mapping[str, Decided]],
    labels: Mapping[str, Mapping[str, bool | None]],
) -> list[Evaluation]:
    """Each phenotype that has labels; decisions and labels by phenotype and patient."""
    samples: dict[str, dict[str, Drawn]] = {}
    for (patient, phenotype), drawn in source.labels.drawn.items():
        samples.setdefault(phenotype, {})[patient] = drawn
    return [
        evaluate(
            definition,
            rule_of(config.reduce, definition, config.prompt),
            decisions[definition.phenotype_id],
            labels[definition.phenotype_id],
            source.facts,
            config.seed,
            sample=samples.get(definition.phenotype_id),
            flagged=definition.phenotype_id in source.labels.flagged,
        )
        for definition in source.definitions
        if definition.phenotype_id in labels
    ]


def planned(folder: Path, config: Config, rows: Sequence[Mapping[str, float]], room: int) -> Summary:
    """What a dry run counted."""
    join(folder / "rejects.jsonl", sorted((folder / "scan").glob("part-*.rejects.jsonl")))
    t = totals_of(rows)
    longest = max((int(row.get("longest") or 0) for row in rows), default=0)
    notes = [
        f"{t['scan/notes']:,} notes read, {t['scan/rejects']:,} rows rejected (rejects.jsonl);"
        f" {t['patients']:,} patients; {t['snippets']:,} snippets.",
        f"{t['questions']:,} questions, {t['asked']:,} of them to be asked: {t['tokens']:,} tokens of prompts.",
        f"The longest prompt has {longest:,} tokens; {t['too_long']:,} exceed the {room:,} that the policy can read.",
        "Nothing was asked or decided.",
    ]
    if config.prompt.answer == "sample":
        notes.insert(3, f"Up to {t['asked'] * MOST_WRITTEN:,} tokens are written, and revisions come on top.")
    if config.prompt.variant == "reasoning":
        notes.insert(3, f"Up to {t['asked'] * config.prompt.reasoning_tokens:,} tokens are written.")
    return Summary(title="Phenotyping by snippets, dry run", notes=notes, panels={"Tokens per bucket": ["tokens"]})


def totals_of(rows: Sequence[Mapping[str, float]]) -> Counter[str]:
    """Sums over steps."""
    totals: Counter[str] = Counter()
    for row in rows:
        for name, value in row.items():
            if value is not None and name != "step":
                totals[name] += int(value)
    return totals


def summary(
    rows: Sequence[Mapping[str, float]],
    evaluations: Sequence[Evaluation],
    shown: int,
    labels: Labels,
    *,
    partial: bool,
) -> Summary:
    """The result of a run in few lines: F1 beside the baseline's where there are labels, and what it took."""
    lines = []
    for one in evaluations:
        by_name = {measured.name: measured for measured in one.measured}
        mine, other = by_name["as decided"], by_name[one.baseline]
        note = f"F1, 95 % {number(mine.low)} to {number(mine.high)}; precision {number(mine.precision)}, recall"
        note += f" {number(mine.recall)}; before: {one.baseline}; {one.patients} patients, {one.positive} of them ill"
        lines.append(SummaryRow(name=one.phenotype_id, before=known(other.f1), after=known(mine.f1), note=note))
    totals = totals_of(rows)
    t = {name: f"{totals[name]:,}" for name in SUMMED}
    notes = [
        f"{t['scan/notes']} notes read, {t['scan/rejects']} rows rejected (rejects.jsonl); {t['patients']} patients;"
        f" {t['snippets']} snippets.",
        f"{t['questions']} questions, {t['asked']} of them asked: {t['tokens']} tokens of prompts, {t['decoded']}"
        " sampled.",
        f"Decisions: {t['yes']} yes, {t['no']} no, {t['uncertain']} uncertain, {t['no_evidence']} without evidence,"
        f" {t['failed']} failed (decisions.jsonl, note_nlp.csv, cohort.csv, fhir).",
        f"review.html shows {shown} of them.",
    ]
    if replaced := [f"{kind} {n:,}" for name, n in totals.items() if (kind := name.removeprefix(REPLACED)) != name]:
        notes.append(f"Identifiers replaced: {', '.join(replaced)}; names that stand in no table remain.")
    if partial:
        notes.insert(0, "Not all patients have been decided about.")
    notes += notes_on(labels)
    if evaluations:
        if any(one.flagged for one in evaluations):
            notes.append(FLAGGED_ONLY)
        notes.append("All reducers, rules and baselines: evaluation.json.")
    return Summary(title="Phenotyping by snippets", rows=lines, notes=notes, panels=PANELS)


def notes_on(labels: Labels) -> list[str]:
    """What must be known of labels to read the figures."""
    notes = []
    if labels.left_out:
        names = ", ".join(repr(name[:40]) for name in list(labels.left_out)[:NAMED])
        names += ", ..." if len(labels.left_out) > NAMED else ""
        rows = f"{labels.left_out.total():,} rows of labels"
        notes.append(f"{rows} are of phenotypes without a definition ({names}) and were left out.")
    strata: dict[str, set[str]] = {}
    for (_, phenotype), drawn in labels.drawn.items():
        strata.setdefault(phenotype, set()).add(drawn.stratum)
    if {FLAGGED, OTHER} in strata.values():
        notes.append(WEIGHTED)
    if {OTHER} in strata.values():
        notes.append(OTHERS_ONLY)
    return notes


def number(value: float) -> str:
    """Three digits, or a dash."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def known(value: float) -> float | None:
    """None for what is no number."""
    return None if math.isnan(value) else value
