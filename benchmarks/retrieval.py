"""What finding takes: python benchmarks/retrieval.py.

Snippets of 50 patterns in synthetic notes of 3 KB, by the retriever and by Python's own `re`, which looks for each of
the same patterns in turn and cuts nothing, in the same run; of each the best of some rounds. Then BM25 over notes:
documents per second that are indexed, and queries per second through a handle in this process; no peer of it is a
dependency.
"""

import argparse
import asyncio
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from actors.retriever.snippets import snippets
from cluster.cluster import Cluster
from cluster.config import MethodConfig
from protocols.retriever import (
    Document,
    IndexRequest,
    Pattern,
    PatternSet,
    RetrieverConfig,
    SearchRequest,
    SnippetsRequest,
)

PROSE = """
    the patient was seen for follow-up and denies pain fever chills nausea history of surgery on left right knee
    examination reveals normal range motion no swelling regular rate rhythm clear to auscultation bilaterally abdomen
    soft nontender extremities warm well perfused plan continue current medications return in two weeks laboratory
    hemoglobin sodium potassium within limits discussed risks benefits alternatives including bleeding infection
"""
WORDS = PROSE.split()
STEMS = ("diabet", "copd", "emphysem", "asthma", "fibrillat", "cirrho", "dialys", "stroke", "psoria", "epilep")
FORMS = (
    r"\b{}\w*",
    r"\b{}\w*\W+(?:mellitus|type\W*[12]|chronic)\b",
    r"\b(?:severe|acute|mild)\W+{}\w*",
    r"(?:h/o|history of|known)\s+({}\w*)",
    r"\b{}\w*(?:\s+\w+){{0,3}}\s+(?:disease|disorder|syndrome)\b",
)
EXPRESSIONS = [form.format(stem) for stem in STEMS for form in FORMS]


def notes(count: int, share: float, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        words = [WORDS[j] for j in rng.integers(len(WORDS), size=440)]
        for j in range(9, 440, 10):
            words[j] += "."
        if rng.random() < share:
            for j in rng.integers(440, size=3):
                words[j] = f"known {STEMS[rng.integers(len(STEMS))]}ic disease"
        made.append(Document(id=str(i), text="PLAN: " + " ".join(words)))
    return made


def fastest(work: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def by_re(documents: list[Document], expressions: list["re.Pattern[str]"]) -> set[str]:
    """Which documents match; all matches of each pattern are found, as snippets need them."""
    found = {document.id: [one.findall(document.text) for one in expressions] for document in documents}
    return {name for name, matches in found.items() if any(matches)}


def patterns(rounds: int, told: dict[str, float]) -> None:
    sets = [PatternSet(id="one", include=[Pattern(expression=one) for one in EXPRESSIONS])]
    own = [re.compile(one, re.IGNORECASE | re.ASCII) for one in EXPRESSIONS]
    print("| 50 patterns, notes with a match | snippets, MB/s | re, MB/s | times |")
    print("| --- | --- | --- | --- |")
    for share in (0.0, 0.1, 1.0):
        documents = notes(2000, share)
        size = sum(len(one.text) for one in documents) / 1e6
        request = SnippetsRequest(documents=documents, sets=sets)
        mine = size / fastest(lambda request=request: snippets(request), rounds)
        few = documents[:100]
        # Both must have found the same.
        matched = {snippet.document for snippet in snippets(request.model_copy(update={"documents": few}))}
        assert by_re(few, own) == matched, share
        theirs = size * len(few) / len(documents) / fastest(lambda few=few: by_re(few, own), rounds)
        print(f"| {share:.0%} | {mine:.1f} | {theirs:.2f} | {mine / theirs:.0f} |", flush=True)
        told |= {f"snippets MB/s, {share:.0%}": mine, f"re MB/s, {share:.0%}": theirs}


async def words(runs: Path, queries: int, told: dict[str, float]) -> None:
    documents = notes(5000, 0.3, seed=1)
    rng = np.random.default_rng(2)
    asked = [" ".join(WORDS[j] for j in rng.integers(len(WORDS), size=4)) for _ in range(queries)]
    async with Cluster(MethodConfig(runs_dir=str(runs), wandb="disabled"), method="retrieval", run="bm25") as cluster:
        retriever = await cluster.retriever(RetrieverConfig(threads=1))
        began = time.perf_counter()
        await retriever.index(IndexRequest(documents=documents))
        told["documents/s indexed"] = len(documents) / (time.perf_counter() - began)
        began = time.perf_counter()
        for query in asked:
            await retriever.search(SearchRequest(queries=[query]))
        told["bm25 queries/s"] = queries / (time.perf_counter() - began)
    print(f"\nBM25: {told['documents/s indexed']:.0f} documents/s, {told['bm25 queries/s']:.0f} queries/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    told: dict[str, float] = {}
    patterns(options.rounds, told)
    asyncio.run(words(options.runs, options.queries, told))
    options.runs.mkdir(parents=True, exist_ok=True)
    (options.runs / "retrieval.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
