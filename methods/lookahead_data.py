"""Queries with the answers and scores of a pool: read from files, brought to one scale, and split."""

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.seeds import derive_seed
from methods.lookahead_config import DataConfig
from methods.worlds.documents import read_rows
from methods.worlds.skills import SkillsConfig, SkillsWorld
from protocols.errors import BadInput
from protocols.messages import ChatMessage, Prompt
from protocols.router import RouteRow
from protocols.service import Message


class Query(Message):
    """One query of the data."""

    id: str
    """Its name."""
    instruction: str
    """What is asked."""
    source: str = ""
    """Where it comes from; evaluation is per source."""
    reference: str = ""
    """The right answer, if there is one."""


@dataclass
class Answered:
    """Queries, and the answer and raw score of each model of a pool."""

    models: list[str]
    queries: list[Query] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader of the results must know about the input."""

    def add(self, query: Query, answers: Sequence[str], scores: Sequence[float]) -> None:
        """Add a query with what each model made of it."""
        self.queries.append(query)
        self.answers.append(list(answers))
        self.scores.append(list(scores))


@dataclass(frozen=True)
class Split:
    """Rows for the router, with the pool that they are about."""

    models: list[str]
    train: list[RouteRow]
    validation: list[RouteRow]
    test: list[RouteRow]
    notes: list[str] = field(default_factory=list)


def read_queries(files: Sequence[str]) -> list[Query]:
    """Queries of .jsonl or .jsonl.gz files. Raises BadInput that names file, line and field."""
    found: dict[str, Query] = {}
    for file in files:
        for place, row in read_rows(Path(file).expanduser(), "data.queries"):
            query = _query(row, place)
            if query.id in found:
                raise BadInput(f"{place}: field id: {query.id!r} occurs twice")
            found[query.id] = query
    if not found:
        raise BadInput(f"data.queries: {', '.join(files)} hold no query")
    return list(found.values())


def read_answered(config: DataConfig) -> Answered:
    """Queries that a pool has answered. Models are joined by name; queries that lack one of the pool are left out.

    Raises BadInput that names file, line and field.
    """
    rows: dict[str, tuple[Query, dict[str, tuple[str, float]]]] = {}
    for file in config.collected:
        for place, row in read_rows(Path(file).expanduser(), "data.collected"):
            query = _query(row, place)
            if query.id in rows:
                raise BadInput(f"{place}: field id: {query.id!r} occurs twice")
            rows[query.id] = query, _by_model(row, place)
    if not rows:
        raise BadInput(f"data.collected: {', '.join(config.collected)} hold no query")
    every = list(dict.fromkeys(name for _, made in rows.values() for name in made))
    unknown = sorted({*config.models, *config.prices} - set(every))
    if unknown:
        raise BadInput(f"data.models, data.prices: got {unknown[0]!r}, expected one of {', '.join(every)}")
    answered = Answered(config.models or every)
    lacking: Counter[str] = Counter()
    for query, made in rows.values():
        missing = [name for name in answered.models if name not in made]
        if missing:
            lacking[missing[0]] += 1
            continue
        picked = [made[name] for name in answered.models]
        answered.add(query, [text for text, _ in picked], [score for _, score in picked])
    answered.notes += [f"{count} queries left out: no answer of {name}" for name, count in sorted(lacking.items())]
    if not answered.queries:
        raise BadInput(f"data.collected: no query was answered by all of {', '.join(answered.models)}")
    return answered


def _query(row: Mapping[str, Any], place: str) -> Query:
    for name, needed in (("id", True), ("instruction", True), ("source", False), ("reference", False)):
        if name not in row and needed:
            raise BadInput(f"{place}: field {name}: required, but missing")
        if not isinstance(row.get(name, ""), str):
            raise BadInput(f"{place}: field {name}: got {row[name]!r}, expected text")
    if not row["id"]:
        raise BadInput(f"{place}: field id: got {''!r}, expected a name")
    return Query(**{name: row[name] for name in Query.model_fields if name in row})


def _by_model(row: Mapping[str, Any], place: str) -> dict[str, tuple[str, float]]:
    parts = {name: row.get(name) for name in ("models", "responses", "scores")}
    for name, value in parts.items():
        if not isinstance(value, list) or len(value) != len(row.get("models") or ()):
            raise BadInput(f"{place}: field {name}: expected a list with one entry per model")
    models, responses, scores = parts["models"], parts["responses"], parts["scores"]
    assert models is not None and responses is not None and scores is not None
    for model, response, score in zip(models, responses, scores, strict=True):
        if not isinstance(model, str) or not isinstance(response, str):
            raise BadInput(f"{place}: fields models, responses: got {model!r}, {response!r:.40}, expected texts")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise BadInput(f"{place}: field scores: got {score!r} of {model!r}, expected a finite number")
    if len(set(models)) < len(models):
        raise BadInput(f"{place}: field models: expected each name once, got {', '.join(models)}")
    return {m: (r, float(s)) for m, r, s in zip(models, responses, scores, strict=True)}


def prompt_of(query: Query) -> Prompt:
    """A query as a conversation."""
    return Prompt(uid=query.id, messages=[ChatMessage(role="user", content=query.instruction)])


def rows_of(answered: Answered) -> list[RouteRow]:
    """Rows for the router; scores are brought to 0 .. 1 within each source, all models together (section 2.2)."""
    scores = np.array(answered.scores)
    for source in {query.source for query in answered.queries}:
        own = np.array([query.source == source for query in answered.queries])
        low, high = scores[own].min(), scores[own].max()
        scores[own] = (scores[own] - low) / (high - low) if high > low else 0.0
    return [
        RouteRow(uid=query.id, prompt=prompt_of(query), answers=made, scores=row.tolist(), group=query.source)
        for query, made, row in zip(answered.queries, answered.answers, scores, strict=True)
    ]


def one_in(salt: str, name: str, count: int) -> bool:
    """Whether a name is one of every `count`, by a hash: it stays so whatever else is in the data."""
    return zlib.crc32(f"{salt}{name}".encode()) % count == 0


def split(answered: Answered, config: DataConfig) -> Split:
    """Training, validation and test rows. Raises BadInput if one of them is empty."""
    rows = rows_of(answered)
    test = [row for row in rows if one_in("v", row.uid, config.test_one_in)]
    rest = [row for row in rows if not one_in("v", row.uid, config.test_one_in)]
    validation = [row for row in rest if one_in("w", row.uid, config.validation_one_in)]
    train = [row for row in rest if not one_in("w", row.uid, config.validation_one_in)]
    notes = list(answered.notes)
    usable = [row for row in train if all(answer.strip() for answer in row.answers)]
    if len(usable) < len(train):
        notes.append(f"{len(train) - len(usable)} training queries left out: an answer is empty")
    if config.drop_ties:
        train, usable = usable, [row for row in usable if max(row.scores) > min(row.scores)]
        notes.append(f"{len(train) - len(usable)} of {len(train)} training queries left out: all score the same")
    if config.train_queries:
        usable = sorted(usable, key=lambda row: zlib.crc32(f"t{row.uid}".encode()))[: config.train_queries]
    for name, part in (("training", usable), ("validation", validation), ("test", test)):
        if not part:
            raise BadInput(f"data: of {len(rows)} queries none are left for {name}")
    return Split(answered.models, usable, validation, test, notes)


def simulated(config: SkillsConfig, seed_of_world: int, seed: int) -> Split:
    """Rows of the world of hidden skills; those for tests have the true success rates for scores."""
    world = SkillsWorld(config, seed_of_world)

    def rows(name: str, count: int, *, true_scores: bool = False) -> list[RouteRow]:
        exam = world.draw(np.random.default_rng(derive_seed(seed, "skills", name)), count, true_scores=true_scores)
        queries = [Query(id=f"{name}-{i}", instruction=query) for i, query in enumerate(exam.queries)]
        parts = zip(queries, exam.answers, exam.scores_BT, strict=True)
        return [
            RouteRow(uid=q.id, prompt=prompt_of(q), answers=a, scores=s.tolist(), group="skills") for q, a, s in parts
        ]

    return Split(
        world.candidates,
        rows("train", config.queries),
        rows("validation", config.validation_queries),
        rows("test", config.test_queries, true_scores=True),
    )
