"""Rankings: the best of one, several of parts as one, several of the same as one."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from protocols.retriever import Hit

Item = TypeVar("Item")
DEEPEST = 10_000
"""Hits of a ranking that are asked for at most."""


def depth(k: int) -> int:
    """How much of each ranking is fused for k hits."""
    return min(max(4 * k, 100), DEEPEST)


def with_equals(fetch: Callable[[int], Sequence[tuple[float, Item]]], k: int) -> list[tuple[float, Item]]:
    """The k best of a ranking and all that score the same as the last of them; `fetch` gives the first so many.

    Which of several equal ones an index gives first is chance.
    """
    limit = k + 1
    while True:
        found = fetch(limit)
        if len(found) < limit or found[-1][0] < found[k - 1][0]:
            least = found[:k][-1][0] if found else 0.0
            return [one for one in found if one[0] >= least]
        limit *= 4


def best(hits: Sequence[Hit], k: int) -> list[Hit]:
    """The first k hits of a ranking: the highest scores, equal ones in the order of their ids."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]


def fused(rankings: Mapping[str, Sequence[Hit]], constant: float, k: int) -> list[Hit]:
    """Reciprocal rank fusion: the sum over rankings of 1 / (constant + rank), ranks from 1."""
    ranks: dict[str, dict[str, int]] = {}
    hits: dict[str, Hit] = {}
    for name, ranking in rankings.items():
        for rank, hit in enumerate(ranking, 1):
            ranks.setdefault(hit.id, {})[name] = rank
            hits[hit.id] = hit
    scores = {one: sum(1 / (constant + rank) for rank in places.values()) for one, places in ranks.items()}
    return best([hit.model_copy(update={"score": scores[i], "ranks": ranks[i]}) for i, hit in hits.items()], k)
