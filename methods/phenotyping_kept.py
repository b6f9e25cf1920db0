"""Matches of the phenotypes' patterns in a text that is about to be de-identified: no name is looked for in them.

They are looked for once more by a retriever, which is the one to refuse a pattern.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import re2

from protocols.retriever import PatternSet

Spans = Sequence[tuple[int, int]]
"""First characters and the places behind the last, in order and apart."""
Finder = Callable[[str], Spans]
MEMORY = 64 << 20
"""Bytes of the automaton of all patterns."""
REACH = 4096
"""Bytes of the longest match that is looked for."""
SHARED = 256
"""Bytes of context behind a match that may be the context of the next one as well."""


def finder(sets: Sequence[PatternSet]) -> Finder:
    """What finds the matches of what the sets include."""
    regexes: list[Any] = []
    options, quiet = re2.Options(), re2.Options()
    options.max_mem, options.log_errors = MEMORY, False
    quiet.log_errors = False
    every = re2.Set.SearchSet(options)
    for pattern in (pattern for one in sets for pattern in one.include):
        expression = f"{'' if pattern.case_sensitive else '(?i)'}{pattern.expression}".encode()
        try:
            regexes.append(re2.compile(expression, options=quiet))
        except re2.error:
            continue
        every.Add(expression)
    # Always matches: where it is missing from an answer the automaton has run out of memory.
    every.Add(b"")
    try:
        every.Compile()
    except re2.error:
        return lambda text: spans_of(text, text.encode("utf-8", "replace"), regexes)

    def found(text: str) -> Spans:
        data = text.encode("utf-8", "replace")
        present = set(every.Match(data) or ())
        whole = len(regexes) in present
        return spans_of(text, data, [one for i, one in enumerate(regexes) if i in present or not whole])

    return found


def spans_of(text: str, data: bytes, regexes: Sequence[Any]) -> Spans:
    """Of a text and its bytes: what the patterns match, or their first groups."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(span for regex in regexes for span in matches(regex, data)):
        if joined and start < joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    if len(data) == len(text):
        return joined
    told, at, places = 0, 0, []
    for start, end in joined:
        first = told + len(data[at:start].decode("utf-8", "ignore"))
        told, at = first + len(data[start:end].decode("utf-8", "ignore")), end
        places.append((first, told))
    return places


def matches(regex: Any, data: bytes, reach: int = REACH) -> Iterator[tuple[int, int]]:
    """Bytes of each match from left to right, of `reach` bytes at most, so that one step of `a.*b|a` does not read a
    line of megabytes."""
    group, at = min(regex.groups, 1), 0
    while at < len(data):
        match = regex.search(data, at, at + 2 * reach)
        if match is None or (match.start() > at + reach and at + 2 * reach < len(data)):
            at += reach
            continue
        start, end = match.span(group)
        if 0 <= start < end:
            yield start, end
        at = max(match.start() + 1, end, match.end() - SHARED)


def overlaps(kept: Spans, start: int, end: int) -> bool:
    """Whether a piece of a text has a character in one of these."""
    i = bisect_right(kept, (start, 1 << 62))
    return (i > 0 and kept[i - 1][1] > start) or (i < len(kept) and kept[i][0] < end)
