"""Patterns of a search: compiled once, found in bounded time, their places counted in characters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise

import numpy as np
import re2
from numpy.typing import NDArray

from protocols.errors import BadInput
from protocols.retriever import Match, Pattern, PatternSet

ONE, TOGETHER = 4 << 20, 64 << 20
"""Bytes that the automata of a pattern may take, and those of a set; a pattern that needs more is refused."""
PROBES = (b"", b"a", b"-", b"aa  aa", b"a\na", b"-\n-", b"-\na\n-")
"""Texts with a place of each kind at which an empty match might be found."""
SHARED = 256
"""Bytes of context behind a match that may be the context of the next one as well."""
FREE = 64
"""Matches of a pattern in a text that may have any length."""
MOST = 4096
"""Bytes of each further match of it, context included."""
KEPT = 32
"""Lists of sets whose automata are kept for the next call."""


@dataclass(frozen=True)
class Compiled:
    """One set, ready to be looked for."""

    id: str
    include: tuple[re2._Regexp, ...]
    exclude: tuple[re2._Regexp, ...]


class Searcher:
    """Several sets, and one automaton that says in a single pass which of their patterns a text has at all."""

    def __init__(self, sets: Sequence[PatternSet]) -> None:
        """Raises BadInput, naming set and pattern, for one that cannot be looked for."""
        for one, next_one in pairwise(sorted(sets, key=lambda one: one.id)):
            if one.id == next_one.id:
                raise BadInput(f"sets: got {one.id!r} twice, expected each id once")
        self.sets = [
            Compiled(
                one.id,
                tuple(compiled(one.id, f"include.{i}", pattern) for i, pattern in enumerate(one.include)),
                tuple(compiled(one.id, f"exclude.{i}", pattern) for i, pattern in enumerate(one.exclude)),
            )
            for one in sets
        ]
        self._owners = [(s, i) for s, one in enumerate(self.sets) for i in range(len(one.include))]
        every = [regex for one in self.sets for regex in one.include]
        self._filters = [(part, _filter([every[i] for i in part])) for part in _parts(len(every))]

    def found(self, text: str) -> dict[int, list[Match]]:
        """The matches that count in a text, in order of their places, by the place of their set."""
        data = text.encode("utf-8", "replace")
        present: dict[int, list[int]] = {}
        for part, automaton in self._filters:
            for owner in sorted(part if automaton is None else _present(automaton, part, data)):
                s, i = self._owners[owner]
                present.setdefault(s, []).append(i)
        if not present:
            return {}
        places = None if len(data) == len(text) else characters(data)
        found = {}
        for s, which in sorted(present.items()):
            spans = counted(self.sets[s], which, data)
            matches = [_match(start, end, i, places) for start, end, i in spans]
            if kept := [match for match in matches if match.start < match.end]:
                found[s] = kept
        return found


def compiled(set_id: str, field: str, pattern: Pattern) -> re2._Regexp:
    """A pattern's automaton. Raises BadInput for one that RE2 refuses, or that matches the empty string."""
    where = f"sets: {set_id!r}: {field}: got {pattern.expression[:200]!r}"
    flags = "" if pattern.case_sensitive else "(?i)"
    try:
        regex = re2.compile(f"{flags}{pattern.expression}".encode(), options=_options(ONE))
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace")
        raise BadInput(f"{where}, expected a regular expression in RE2's syntax: {reason}") from error
    for probe in PROBES:
        if any(match.start() == match.end() for match in regex.finditer(probe)):
            raise BadInput(f"{where}, which matches the empty string; expected a pattern that needs a character")
    return regex


def _options(memory: int) -> re2.Options:
    options = re2.Options()
    options.max_mem = memory
    options.log_errors = False
    return options


def _parts(count: int, size: int = 256) -> Iterator[range]:
    return (range(first, min(count, first + size)) for first in range(0, count, size))


def _filter(patterns: Sequence[re2._Regexp]) -> re2.Set | None:
    """One automaton of several patterns, None where it would be too large: then each is looked for on its own."""
    together = re2.Set.SearchSet(_options(TOGETHER))
    for pattern in patterns:
        together.Add(pattern.pattern)
    # Always matches: where it is missing from an answer the automaton has run out of memory.
    together.Add(b"")
    try:
        together.Compile()
    except re2.error:
        return None
    return together


def _present(automaton: re2.Set, part: range, data: bytes) -> list[int]:
    """Which of a part's patterns a text has."""
    found = automaton.Match(data) or []
    return [part[i] for i in found if i < len(part)] if len(part) in found else list(part)


def spans(regex: re2._Regexp, data: bytes) -> Iterator[tuple[int, int]]:
    """Bytes of each match from left to right: of its first group if it has one that takes part.

    RE2 may read to the end of the text to find a match of a single byte: of `a.*b|a` in a line without b. So only the
    first FREE are looked for in all of it; further ones span at most MOST bytes, context included. What is read is
    then FREE times the text and some MOST bytes for each match, and for each place at which only a longer one begins.
    """
    group, at = min(regex.groups, 1), 0
    for number in count():
        match = regex.search(data, at) if number < FREE else short(regex, data, at, MOST)
        if match is None:
            return
        start, end = match.span(group)
        if 0 <= start < end:
            yield start, end
        at = match.end() if group == 0 or start < 0 else max(end, match.end() - SHARED)
        at = max(at, match.start() + 1)


def short(regex: re2._Regexp, data: bytes, at: int, most: int) -> re2._Match | None:
    """The first match from a byte on, if none may span more than `most` bytes: at the first place at which there is
    one, the one that the expression prefers. Word boundaries and ends of lines are those of the text.

    Windows of the text are searched, which grow until there is a match that can be judged.
    """
    width = 2 * most
    while at < len(data):
        end = at + width
        # All `most` bytes of what begins no later than here are in the window.
        sure = len(data) if end >= len(data) else end - most
        match = regex.search(data, at, end)
        start, behind = match.span() if match is not None else (len(data) + 1, 0)
        if start > sure:
            at, width = sure + 1, 2 * width
            continue
        if behind - start > most:
            # A shorter one may begin here too, which the expression prefers less.
            match = regex.match(data, start, start + most)
        if match is not None:
            return match
        at, width = start + 1, 2 * most
    return None


def counted(one: Compiled, which: Sequence[int], data: bytes) -> list[tuple[int, int, int]]:
    """Start, end and pattern of the matches of a set that overlap no match of what it excludes, in bytes."""
    found = sorted((start, end, i) for i in which for start, end in spans(one.include[i], data))
    if not found or not one.exclude:
        return found
    barred = merged(sorted(span for regex in one.exclude for span in spans(regex, data)))
    ends = np.array([end for _, end in barred], np.int64)
    # The first barred span that ends behind the match's start is the only one that may overlap it.
    first = np.searchsorted(ends, [start for start, _, _ in found], side="right")
    return [match for match, i in zip(found, first, strict=True) if i == len(barred) or barred[i][0] >= match[1]]


def merged(spans: Sequence[tuple[int, int]], *, touching: bool = False) -> list[tuple[int, int]]:
    """Sorted spans, those joined that overlap, and those that touch if that counts."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and start < joined[-1][1] + touching:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def characters(data: bytes) -> NDArray[np.int64]:
    """For each byte of UTF-8, and for the end, how many characters begin before it."""
    begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    return np.concatenate([[0], np.cumsum(begins)])


def _match(start: int, end: int, pattern: int, places: NDArray[np.int64] | None) -> Match:
    if places is not None:
        start, end = int(places[start]), int(places[end])
    return Match(start=start, end=end, pattern=pattern)


def searcher(sets: Sequence[PatternSet]) -> Searcher:
    """What looks for these sets; the same one for the same sets, as callers send them again with other texts."""
    return _searcher(tuple(one.model_dump_json() for one in sets))


@lru_cache(maxsize=KEPT)
def _searcher(sets: tuple[str, ...]) -> Searcher:
    return Searcher([PatternSet.model_validate_json(one) for one in sets])
