"""Text around matches: windows, their edges at ends of sentences, and cuts between matches."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from actors.retriever.pattern import merged
from protocols.retriever import Match, Window

ENDS = re.compile(r"[.!?\n](?:(?<=\n)|(?=[\s,]|\Z))[\s,]*")
"""The end of a sentence or line, and what stands before the next one. Some notes have commas for line breaks."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Edges:
    """Where the sentences and lines of a text begin and end; found with the first question, in one pass."""

    text: str

    @cached_property
    def _places(self) -> tuple[list[int], list[int]]:
        found = list(ENDS.finditer(self.text))
        return [0, *(match.end() for match in found)], [*(_end(match) for match in found), len(self.text)]

    def snapped(self, span: Span, most: int) -> Span:
        """The span with its edges moved outward to the next end of a sentence or line, if that is so near."""
        if not most:
            return span
        starts, ends = self._places
        start = starts[bisect_right(starts, span[0]) - 1]
        end = ends[bisect_left(ends, span[1])]
        return start if span[0] - start <= most else span[0], end if end - span[1] <= most else span[1]


def _end(match: re.Match[str]) -> int:
    """Behind a full stop, before a line break."""
    if match[0][0] != "\n":
        return match.start() + 1
    return match.start() - match.string.startswith("\r", max(0, match.start() - 1))


def windows(edges: Edges, matches: Sequence[Match], window: Window) -> list[tuple[Span, list[Match]]]:
    """Spans of a text around all matches, which come in order of their places, and the matches in each."""
    n, w = len(edges.text), window.characters
    around = merged(sorted((max(0, m.start - w), min(n, m.end + w)) for m in matches), touching=True)
    spans = merged(sorted(edges.snapped(span, window.snap) for span in around), touching=True)
    return [
        part
        for span, inside in zip(spans, _within(spans, matches), strict=True)
        for part in cut(span, inside, window.max_characters)
    ]


def cut(span: Span, matches: Sequence[Match], most: int) -> list[tuple[Span, list[Match]]]:
    """A span in parts of at most so many characters, cut between matches; what is too far from one is left out."""
    if span[1] - span[0] <= most:
        return [(span, list(matches))]
    cores: list[Span] = []
    # Matches that overlap stay together; neighbours do as long as there is room.
    for start, end in merged([(match.start, match.end) for match in matches]):
        if cores and end - cores[-1][0] <= most:
            cores[-1] = cores[-1][0], end
        else:
            cores.append((start, end))
    borders = [span[0], *((left[1] + right[0]) // 2 for left, right in pairwise(cores)), span[1]]
    parts = zip(pairwise(borders), cores, _within(cores, matches), strict=True)
    return [(_trimmed(room, core, most), inside) for room, core, inside in parts]


def _within(spans: Sequence[Span], matches: Sequence[Match]) -> list[list[Match]]:
    """The matches that begin in each span; spans and matches come in order of their places."""
    borders = [bisect_left(matches, start, key=lambda match: match.start) for start, _ in spans]
    return [list(matches[first:last]) for first, last in pairwise([*borders, len(matches)])]


def _trimmed(room: Span, core: Span, most: int) -> Span:
    """As much of the room as is allowed, its core in the middle of it if there is enough on both sides."""
    spare = max(0, most - (core[1] - core[0]))
    left, right = core[0] - room[0], room[1] - core[1]
    before = min(left, max(spare // 2, spare - right))
    return core[0] - before, core[1] + min(right, spare - before)
