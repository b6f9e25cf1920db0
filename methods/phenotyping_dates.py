"""Dates of notes."""

import re
from datetime import date, time

DAY = re.compile(r"([0-9]{4})(-?)([0-9]{2})\2([0-9]{2})(?:[Tt ](.+))?")


def iso_date(text: str) -> str | None:
    """The date as YYYY-MM-DD, with T and the time if it has one; empty for an empty text, None if it is no date."""
    given = text.strip()
    if not given:
        return ""
    if (found := DAY.fullmatch(given)) is None:
        return None
    try:
        day = date(int(found[1]), int(found[3]), int(found[4])).isoformat()
        if found[5] is None:
            return day
        time.fromisoformat(found[5])
    except ValueError:
        return None
    return f"{day}T{found[5]}"
