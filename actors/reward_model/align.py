"""Scores of one tokenizer's tokens for another's, by the characters that both cover.

A token is a span [start, end) of the text; spans follow each other, and special tokens are empty ones.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Spans = Sequence[tuple[int, int]]


def values_at(spans: Spans, scored: Spans, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values, float64[S] of the `scored` tokens, for the tokens at `spans`: float64[T].

    A value is of all that was read up to a token, so a token takes that of the last scored token that ends inside
    of it, or else of the first that covers it; an empty one that of the last that ends at its place. Raises
    ValueError when nothing is scored.
    """
    if not len(scores):
        raise ValueError("expected at least one scored token")
    scored_S2 = np.asarray(scored, dtype=np.int64)
    every = np.arange(len(scores))
    # What an end token is worth is not that of the word before it.
    of_text = every[scored_S2[:, 0] < scored_S2[:, 1]]
    chosen = [
        _chosen(every if start == end or not len(of_text) else of_text, scored_S2[:, 1], start, end)
        for start, end in spans
    ]
    return np.asarray(scores[chosen], dtype=np.float64) if chosen else np.zeros(0)


def _chosen(candidates: NDArray[np.int64], ends_S: NDArray[np.int64], start: int, end: int) -> int:
    """Which candidate's value the token takes."""
    ends = ends_S[candidates]
    last = int(np.searchsorted(ends, end, side="right")) - 1
    inside = last >= 0 and (ends[last] > start or ends[last] == end)
    return int(candidates[last if inside else min(last + 1, len(ends) - 1)])


def sums_over(spans: Spans, scored: Spans, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rewards, float64[S] of the `scored` tokens, for the tokens at `spans`: float64[T], with the same sum.

    Rewards add up, so one of a scored token that several tokens share is divided by length. That of an empty token
    goes to an empty token at its place if there is one, else to the token that ends there or covers it. Raises
    ValueError when there is no token to give to.
    """
    if not len(spans):
        raise ValueError("expected at least one token")
    total_T = np.zeros(len(spans))
    ends = np.asarray([end for _, end in spans])
    for (start, end), score in zip(scored, scores, strict=True):
        first = int(np.searchsorted(ends, start, side="right"))
        shares: list[tuple[int, int]] = []
        for t in range(first, len(spans)):
            if spans[t][0] >= end:
                break
            shares.append((t, min(end, spans[t][1]) - max(start, spans[t][0])))
        whole = sum(length for _, length in shares)
        if not whole:
            total_T[_place(spans, ends, start)] += score
        for t, length in shares if whole else []:
            total_T[t] += score * length / whole
    return total_T


def _place(spans: Spans, ends: NDArray[np.int64], at: int) -> int:
    """The token that what happens between two characters belongs to."""
    before = int(np.searchsorted(ends, at, side="right")) - 1
    if before >= 0 and ends[before] == at:
        return before
    return min(before + 1, len(spans) - 1)
