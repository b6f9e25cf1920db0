"""Headers of the sections of a text, as clinical notes have them."""

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

CAPITALS = r"[A-Z0-9][A-Z0-9/&'()# -]{1,60}"
TITLE = r"[A-Z][a-z]+(?:[ /-](?:[A-Z][a-z]+|of|and|the|in|for|on)){0,6}"
HEADER = re.compile(rf"[\n,][ \t]{{0,8}}(?:({CAPITALS})(?=[:,]|\r?$)|({TITLE})(?=[ \t]{{0,8}}:))", re.MULTILINE)
"""Words in capitals before a colon, a comma or the end of the line; words with a capital each before a colon. They
stand at the beginning of a line, or behind a comma without a space: some notes have commas for line breaks."""
LEAST = 4
"""Letters of a header in capitals that has no colon; shorter ones are abbreviations."""


@dataclass(frozen=True)
class Sections:
    """The headers of a text, found with the first question, in one pass."""

    text: str

    @cached_property
    def _headers(self) -> tuple[list[int], list[str]]:
        # The first line begins behind a line break too, so places in it are those behind theirs in the text.
        lines = f"\n{self.text}"
        found = [match for match in HEADER.finditer(lines) if is_header(match)]
        return [match.start() for match in found], [(match[1] or match[2]).strip() for match in found]

    def at(self, place: int) -> str:
        """Header of the section around a character; empty before the first one."""
        starts, names = self._headers
        index = bisect_right(starts, place) - 1
        return names[index] if index >= 0 else ""


def is_header(match: re.Match[str]) -> bool:
    """Whether what looks like a header is one, and not an item of a list."""
    colon, begins_line = match.string.startswith(":", match.end()), match[0][0] == "\n"
    before = match.string[max(0, match.start() - 2) : match.start()].rstrip()[-1:]
    if match[2]:
        return begins_line or before in (".", ":")
    letters = sum(map(str.isalpha, match[1]))
    if colon:
        return letters > 1
    # Behind a colon, a space or another word in capitals it is an item.
    behind_text = before in (".", "!", "?", ")") or before.islower() or before.isdigit()
    return letters >= LEAST and (begins_line or (behind_text and not match[0][1].isspace()))
