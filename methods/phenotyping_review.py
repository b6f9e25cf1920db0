"""The review page: one file in which a clinician sees decisions with their snippets, and says what is right."""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.run_directory import write_atomically
from methods.phenotyping_decide import Decided
from methods.phenotyping_definition import Definition

TEMPLATE = Path(__file__).with_name("phenotyping_review.html.jinja")
FLAGGED = "flagged"
"""In the column `sampled` of labels: of a decision that was flagged for review."""
OTHER = "other"
"""Of one that was not: a plain no, or no evidence."""
HALF = 16
"""Bytes of a digest that choose a decision; the others give its place on the page."""


@dataclass
class ReviewSample:
    """Decisions for the page, of each phenotype and stratum those with the smallest hashes: the same in every run
    with this seed, whatever the order in which they come, and no more in memory than are shown."""

    seed: int
    most: Mapping[str, int]
    """By stratum, of each phenotype."""
    sizes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """All decisions by phenotype and stratum."""
    kept: dict[tuple[str, str], list[tuple[int, int, Decided]]] = field(default_factory=dict)
    """Of each a heap with the largest hash on top: the hash's negative, the place on the page, the decision."""

    def add(self, one: Decided) -> None:
        """Count a decision, and keep it if its hash is among the smallest."""
        stratum = OTHER if one.decision in ("no", "no_evidence") else FLAGGED
        key = (one.phenotype_id, stratum)
        self.sizes[key] += 1
        told = json.dumps([self.seed, one.patient_id, one.phenotype_id])
        digest = hashlib.sha256(told.encode()).digest()
        entry = (-int.from_bytes(digest[:HALF]), int.from_bytes(digest[HALF:]), one)
        heap = self.kept.setdefault(key, [])
        if len(heap) < self.most[stratum]:
            heapq.heappush(heap, entry)
        elif heap:
            heapq.heappushpop(heap, entry)

    def rows(self) -> list[dict[str, Any]]:
        """What is shown, each with its stratum and the stratum's size. The order tells neither decision nor stratum,
        and the first of them are a sample of all."""
        found = [
            (place, {**one.model_dump(mode="json"), "sampled": key[1], "of": self.sizes[key]})
            for key, heap in self.kept.items()
            for _, place, one in heap
        ]
        return [row for _, row in sorted(found, key=lambda one: one[0])]


def write_review(file: Path, sample: ReviewSample, definitions: Sequence[Definition]) -> int:
    """Write the page; returns how many decisions there are on it.

    Texts go into it as data and are only ever shown as text.
    """
    import jinja2

    rows = sample.rows()
    names = {one.phenotype_id: {"name": one.name, "description": one.description} for one in definitions}
    told = {"rows": rows, "definitions": names}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    # A closing tag in a text must not end the data.
    data = json.dumps(told, ensure_ascii=True).replace("<", "\\u003c")
    write_atomically(file, page.render(data=data, others=any(row["sampled"] == OTHER for row in rows)))
    return len(rows)
