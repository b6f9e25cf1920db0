"""Runs of phenotyping with notes and a policy of a test's own."""

import json
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cluster.cluster import Cluster
from cluster.configure import configure
from methods import phenotyping
from protocols.policy import PolicyConfig, PolicyService, ScoreRequest, ScoreResponse

VELTO = """
phenotype_id: velto
version: 1
name: Veltosis
description: The patient has veltosis.
terms: [veltosis]
"""
KOLO = VELTO.replace("velto", "kolo").replace("Velto", "Kolo") + "reduce: {by: count, count: 2}\n"
Run = Callable[..., Awaitable[SimpleNamespace]]


def says(snippet: str) -> str:
    """Yes to a snippet unless it denies."""
    if "possible" in snippet:
        return "uncertain"
    return "no" if re.search(r"denies|no evidence", snippet, re.I) else "yes"


def reader(toys: Any, context: int = 1 << 20) -> Any:
    """Says yes to a snippet unless it denies; keeps all texts that it was asked about."""

    class Reader(toys.Policy):  # type: ignore[misc]
        def answer(self, text: str) -> str:
            return says(text.split("<<<")[-1])

        async def score(self, request: ScoreRequest) -> ScoreResponse:
            self.scored.append(request)
            logprobs = []
            for tokens in request.sequences:
                text, label = self._decode(tokens.array[:-1]), self._decode(tokens.array[-1:])
                row = np.full(len(tokens), -0.5, np.float32)
                row[-1] = -0.1 if label == self.answer(text) else -3.0
                logprobs.append(row)
                if label == "yes":
                    self.seen.append(text.split("<<<")[-1])
                    self.texts.append(text)
            return ScoreResponse(logprobs=logprobs, version=0)

    policy = Reader(lambda call: "", context=context)
    policy.seen, policy.texts = [], []
    return policy


def runner(tmp_path: Path, make: Callable[[], Any]) -> Run:
    """Plays whole runs in a folder; each has a policy of its own, all of which are kept in `policies`."""
    (tmp_path / "velto.yaml").write_text(VELTO)
    (tmp_path / "kolo.yaml").write_text(KOLO)
    policies: list[Any] = []

    async def play(name: str, notes: Sequence[dict[str, object]] | Path, *words: str) -> SimpleNamespace:
        file = notes if isinstance(notes, Path) else tmp_path / f"{name}-notes.jsonl"
        if not isinstance(notes, Path) and not file.exists():
            file.write_text("".join(json.dumps(one) + "\n" for one in notes))
        definitions = f"{tmp_path / 'velto.yaml'}, {tmp_path / 'kolo.yaml'}"
        given = [f"notes=[{file}]", f"definitions=[{definitions}]", f"runs_dir={tmp_path / 'runs'}", f"run={name}"]
        given += ["steps=3", "part_bytes=300", "questions_per_call=2", "wandb=disabled"]
        config = configure(phenotyping.Config, [*given, *words], None, phenotyping.preset)
        policy = make()

        class Company(Cluster):
            async def policy(self, config: PolicyConfig, *, name: str = "policy") -> PolicyService:
                return await self._spawn(PolicyService, name, lambda: policy, config.resources, commit=False)

        async with Company(config, method="phenotyping", run=name) as cluster:
            policies.append(policy)
            await phenotyping.run(cluster, config)
            folder, rows = cluster.directory.path, cluster.metrics()
        file = folder / "decisions.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        decisions = {(one["patient_id"], one["phenotype_id"]): one for one in map(json.loads, lines)}
        return SimpleNamespace(folder=folder, rows=rows, policy=policy, decisions=decisions)

    play.policies = policies  # type: ignore[attr-defined]
    return play


def note(patient: str, number: int, text: str, **more: object) -> dict[str, object]:
    """A row of notes; numbers are days."""
    day = f"2020-01-{number + 1:02d}"
    return {"patient_id": patient, "note_id": f"{patient}-{number}", "text": text, "date": day, **more}


def ward(count: int = 12, seed: int = 0) -> list[dict[str, object]]:
    """Patients with some notes each."""
    rng = random.Random(seed)
    texts = [
        "Seen today with veltosis, which is stable on treatment.",
        "She denies veltosis and any other illness of that kind.",
        "There is possible veltosis, to be confirmed by biopsy soon.",
        "Kolosis was treated at home for several weeks this year.",
        "Nothing of note was found at this visit in the clinic.",
    ]
    return [
        note(f"p{i}", j, f"HISTORY:\nVisit {i}.{j} in ward {rng.randrange(99)}.\n" + rng.choice(texts))
        for i in range(count)
        for j in range(rng.randint(1, 4))
    ]


def comparable(decisions: dict[Any, dict[str, Any]]) -> dict[Any, Any]:
    """Decisions without what names the run, and without whose question was asked first."""
    apart = ("run", "asked", "tokens", "decoded")
    return {key: {name: one[name] for name in one if name not in apart} for key, one in decisions.items()}
