"""Headers of the sections of a text, as clinical notes have them."""

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

CAPITALS = r"[A-Z0-9][A-Z0-9/&'()# -]{1,60}"
TITLE = r"[A-Z][a-z]+(?:[ /-](?:[A-Z][a-z]+|of|and|the|in|for|on)){0,6}"
IN_CAPITALS = rf"(?:^|(?<=,))[ \t]{{0,8}}({CAPITALS})(?=[:,]|\r?$)"
IN_TITLE_CASE = rf"(?:^|(?<=[.:],)|(?<=[.:] ,))[ \t]{{0,8}}({TITLE})(?=[ \t]{{0,8}}:)"
HEADER = re.compile(f"{IN_CAPITALS}|{IN_TITLE_CASE}", re.MULTILINE)
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
        found = [match for match in HEADER.finditer(self.text) if self._is_header(match)]
        return [match.start() for match in found], [(match[1] or match[2]).strip() for match in found]

    def _is_header(self, match: re.Match[str]) -> bool:
        if match[2] or self.text[match.end() : match.end() + 1] == ":":
            return sum(map(str.isalpha, match[0])) > 1
        # Behind a colon or another word in capitals it is an item of a list.
        before = self.text[max(0, match.start() - 2) : match.start()]
        begins = not before.endswith(",") or before[0] in ".!?)" or before[0].islower() or before[0].isdigit()
        return begins and sum(map(str.isalpha, match[1])) >= LEAST

    def at(self, place: int) -> str:
        """Header of the section around a character; empty before the first one."""
        starts, names = self._headers
        index = bisect_right(starts, place) - 1
        return names[index] if index >= 0 else ""
