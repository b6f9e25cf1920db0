"""Votes of the verifier: reading them and counting them (SPELL sections 2.3 and 2.8)."""

import re
from collections.abc import Sequence

from actors.rules import after_thinking

YES, NO, INVALID = 1, 0, -1

_SIGNS = (
    (re.compile(r"\[\[YES\]\]"), re.compile(r"\[\[NO\]\]")),
    (re.compile(r"\bYES\b"), re.compile(r"\bNO\b")),
)


def parse_vote(text: str) -> int:
    """1 for YES, 0 for NO, -1 if it cannot be read (SPELL section 2.3, vote).

    The decision in double brackets counts if there is just one kind; else the bare capital words do, under
    the same condition. Thoughts are left out, and thoughts without an end are unreadable.
    """
    decision = after_thinking(text) or ""
    for yes, no in _SIGNS:
        said_yes, said_no = yes.search(decision), no.search(decision)
        if (said_yes is None) != (said_no is None):
            return YES if said_yes else NO
    return INVALID


def majority(votes: Sequence[int]) -> tuple[int | None, float | None]:
    """Strict majority of the valid votes and its share among them; (None, None) on a tie or without any.

    SPELL section 2.8: a tie rewards as NO and trains nothing, which is left to the caller.
    """
    valid = [vote for vote in votes if vote != INVALID]
    share = sum(valid) / len(valid) if valid else 0.5
    if share == 0.5:
        return None, None
    return (YES, share) if share > 0.5 else (NO, 1 - share)
