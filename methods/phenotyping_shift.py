"""Dates in clinical text, moved by a number of days; those that are not complete become a placeholder.

Patterns of RE2, so in linear time. Months come before days, as in the United States, unless only the other order is
a date. Years alone stay.
"""

from collections.abc import Callable, Iterator
from datetime import date, timedelta
from operator import itemgetter
from typing import Any

import re2

from methods.phenotyping_identifiers import BLANK, DASH, UNITS, Edit, placeholder

KIND = "date"
MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july"),
    *("august", "september", "october", "november", "december"),
)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTH = (
    "(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    "|nov(?:ember)?|dec(?:ember)?)"
)
WEEKDAY = (
    rf"(?:(?P<w>mon|tues?|wed|thu(?:rs?)?|fri|(?-i:Sat)|sun|monday|tuesday|wednesday|thursday|friday|saturday|sunday)"
    rf"\.?,?{BLANK}{{1,2}})?"
)
YEAR = r"(?:1[89]|2[01])[0-9]{2}"
DAY = r"(?P<d>[0-9]{1,2})(?P<o>st|nd|rd|th)?"
PLAIN_DAY = r"[0-9]{1,2}(?:st|nd|rd|th)?"
THEN = rf"(?:{BLANK}{{0,2}}|[-/.]|\sof\s)"
"""Between a day and a month."""
MARK = rf"{BLANK}?[-/.]{BLANK}?"
"""Between the numbers of a date."""
PIVOT = 69
"""Years of two digits from here on are of the last century; it matters to leap days alone."""
CAPITAL = (
    "(?:J(?:an(?:uary)?|AN(?:UARY)?|une?|UNE?|uly?|ULY?)|F(?:eb(?:ruary)?|EB(?:RUARY)?)|M(?:ar(?:ch)?|AR(?:CH)?|ay|AY)"
    "|A(?:pr(?:il)?|PR(?:IL)?|ug(?:ust)?|UG(?:UST)?)|S(?:ept?(?:ember)?|EPT?(?:EMBER)?)|O(?:ct(?:ober)?|CT(?:OBER)?)"
    "|N(?:ov(?:ember)?|OV(?:EMBER)?)|D(?:ec(?:ember)?|EC(?:EMBER)?))"
)
COMPLETE = tuple(
    re2.compile(pattern)
    for pattern in (
        rf"(?i)\b{WEEKDAY}(?P<y>[12][0-9]{{3}})(?P<s>[-/.])(?P<n>[0-9]{{1,2}})(?P<t>[-/.])(?P<d>[0-9]{{1,2}})",
        rf"(?i)\b{WEEKDAY}(?P<n>[0-9]{{1,2}})(?P<s>{MARK})(?P<d>[0-9]{{1,2}})(?P<t>{MARK})(?P<y>{YEAR}|[0-9]{{2}})",
        rf"(?i)\b{WEEKDAY}(?P<m>{MONTH})\.?(?:{BLANK}{{0,2}}|[-/])?{DAY}"
        rf"(?:(?:,?{BLANK}{{0,3}}|,\s{{1,3}}|[-/.]|,?\s(?:of|in)\s)(?P<y>{YEAR})"
        rf"|(?:[-/]|,? ?['\x{{2019}}])(?P<z>[0-9]{{2}}))\b",
        rf"(?i)\b{WEEKDAY}{DAY}{THEN}(?P<m>{MONTH})(?:\.?,?{BLANK}{{0,2}}|[-/.]|,?\sof\s)(?P<y>{YEAR})\b",
        rf"(?i)\b{WEEKDAY}{DAY}{THEN}(?P<m>{MONTH})(?:[-/]|\.?,? ?['\x{{2019}}])(?P<z>[0-9]{{2}})\b",
        rf"(?i)\b(?P<y>{YEAR})[-/ ](?P<m>{MONTH})[-/. ]{DAY}\b",
        r"\b(?P<y>(?:19|20)[0-9]{2})(?P<n>0[1-9]|1[0-2])(?P<d>0[1-9]|[12][0-9]|3[01])(?:[0-9]{4}|[0-9]{6})?\b",
    )
)
"""Of a whole date: w weekday, y year or z year of two digits, m month or n its number, d day, o behind the day."""
FRACTION = re2.compile(
    r"(?i)^[ -]?(?:tab|pill|dose|strength|normal|ns\b|saline|m?c?g\b|m?l\b|cc\b|cups?\b|packs?\b|pts?\b|pints?\b|of\b"
    r"|occasion|scale|murmur|systolic|diastolic|inch|lit|lymph|node|core|bottle|culture|limb|criteri|point|day|week"
    r"|month|year|hour|wk|bilateral|throughout|gravity|beat|mm|cm|score|amp|vial)"
)
"""Behind two numbers that are a share, a grade or a dose."""
ON = (
    r"on|since|until|till|dated?|dates?|as of|effective|admitted|discharged|admit|discharge|d/c'?d|dos|dob|doa|dod"
    r"|visit of"
)
AROUND = r"in|since|on|until|till|around|from|late|early|mid|last|by|before|after|during|through|dated?"
Says = Callable[[int, int, str, str], bool]
"""Of two numbers, and of how they are written: whether they are a date."""


def is_day(first: int, second: int) -> bool:
    """Whether two numbers may be month and day in either order."""
    low, high = sorted((first, second))
    return 1 <= low <= 12 and high <= 31


def has_zero(one: str, other: str) -> bool:
    """Whether a number is written with a leading zero."""
    return any(len(number) == 2 and number[0] == "0" for number in (one, other))


PAIR = r"([0-9]{1,2})/([0-9]{1,2})"
PAIRS: tuple[tuple[Any, Says], ...] = (
    # A fraction has no leading zero.
    (
        re2.compile(rf"\b({PAIR})\b"),
        lambda a, b, one, other: has_zero(one, other) and (is_day(a, b) or (1 <= a <= 12 and b < 10)),
    ),
    # 9/94 is a month; 6/60 may be an acuity.
    (re2.compile(rf"\b({PAIR})\b"), lambda a, b, one, other: 1 <= a <= 12 and b > 60 and b % 10 > 0),
    (
        re2.compile(rf"(?i)\b(?:{AROUND}){BLANK}{{1,2}}({PAIR})\b"),
        lambda a, b, one, other: 1 <= a <= 12 and b > 31,
    ),
    (re2.compile(rf"(?i)\b(?:{ON}):?{BLANK}{{1,2}}({PAIR})\b"), lambda a, b, one, other: is_day(a, b)),
    (
        re2.compile(
            rf"(?i)\b({PAIR})\s?(?:{DASH}|to|through|thru|and)\s?[0-9]{{1,2}}/[0-9]{{1,2}}/(?:{YEAR}|[0-9]{{2}})\b"
        ),
        lambda a, b, one, other: is_day(a, b),
    ),
)
"""Two numbers with a slash: of month and day, or month and year."""
NAMED = r"January|February|March|April|June|July|August|September|October|November|December"
PARTIAL = tuple(
    re2.compile(pattern)
    for pattern in (
        rf"\b{CAPITAL}\.?{BLANK}{{1,2}}{PLAIN_DAY}(?:{BLANK}?(?:{DASH}|to|through|thru|and|&){BLANK}?{PLAIN_DAY})?"
        rf"(?:,?{BLANK}{{1,2}}{YEAR})?\b",
        rf"(?i)\b(?:{NAMED}){BLANK}{{1,2}}{PLAIN_DAY}\b",
        rf"\b(?:jan|feb|apr|jun|jul|aug|sept|nov)\.?{BLANK}{PLAIN_DAY}\b",
        rf"\b{PLAIN_DAY}{THEN}{CAPITAL.replace('|AY', '')}(?:['\x{{2019}}]?[0-9]{{2}})?\b",
        rf"\b{PLAIN_DAY}[-/]?MAY(?:['\x{{2019}}]?[0-9]{{2}})?\b",
        rf"(?i)\b{PLAIN_DAY}(?:{BLANK}{{1,2}}|\sof\s)(?:{NAMED})\b",
        rf"(?i)\b{MONTH}(?:\.?,?{BLANK}{{1,2}}|[-/.]|,?\sof\s)(?:{YEAR}|['\x{{2019}}][0-9]{{2}})\b",
        rf"\b{CAPITAL}-[0-9]{{2}}\b",
        r"\b(?:0?[1-9]|1[0-2])/(?:19|20)[0-9]{2}\b",
        r"\b0[1-9]-(?:19|20)[0-9]{2}\b",
        r"\b(?:19|20)[0-9]{2}[-/](?:0[1-9]|1[0-2])\b",
        rf"\b(?:{NAMED}|{NAMED.upper()})\b",
        rf"(?i)\b(?:{AROUND}|of|this|next)[ -]({NAMED})\b",
        # May is a verb as well, and so are some of the short names something else.
        r"\b(?:[Ii]n|[Ss]ince|[Oo]f|[Uu]ntil|[Ll]ast|[Dd]uring|[Ll]ate|[Ee]arly|[Mm]id)[ -](May)\b",
        r"\b(?:IN|SINCE|OF|UNTIL|LAST|DURING|LATE|EARLY|MID)[ -](MAY)\b",
        r"\b(?:[Ii]n|[Ss]ince|[Uu]ntil|[Ll]ast|[Ll]ate|[Ee]arly|[Mm]id)[ -]"
        r"(Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b",
    )
)
"""Of dates without a year or a day: the first group is the date, or all of it if there is none. MAY behind a number
may be a verb."""


def dates(text: str, days: int) -> Iterator[Edit]:
    """Whole dates moved by so many days, and placeholders for those of which a part is missing or impossible."""
    for regex in COMPLETE:
        for match in regex.finditer(text):
            if apart(text, match) and (told := moved(match, days)) is not None:
                yield Edit(match.start(), match.end(), KIND, told)
    for regex, says in PAIRS:
        for match in regex.finditer(text):
            one, other = match.group(2), match.group(3)
            start, end = match.span(1)
            if not (says(int(one), int(other), one, other) and begins(text, start, "/.") and ends(text, end)):
                continue
            if has_zero(one, other) or (begins(text, start, "-") and not FRACTION.match(text[end : end + 12])):
                yield Edit(start, end, KIND, placeholder(KIND))
    for regex in PARTIAL:
        for match in regex.finditer(text):
            start, end = match.span(min(regex.groups, 1))
            if begins(text, start, "/.-") and ends(text, end):
                yield Edit(start, end, KIND, placeholder(KIND))


def begins(text: str, start: int, marks: str) -> bool:
    """Whether no number goes on to here over one of these marks."""
    return not (start > 1 and text[start - 1] in marks and text[start - 2].isdigit())


def ends(text: str, end: int) -> bool:
    """Whether no number goes on from here."""
    after = text[end : end + 2]
    return after[:1] != "%" and not (after[:1] in ("/", ".", ":") and after[1:].isdigit())


def apart(text: str, match: Any) -> bool:
    """Whether a whole date is no part of something longer and no dose, and its two marks are the same."""
    start, end = match.span()
    after = text[end : end + 2]
    if "s" not in match.re.groupindex:
        return begins(text, start, "/.") and not (after[:1] in ("/", ".") and after[1:].isdigit())
    mark, four = match.group("s"), len(match.group("y")) == 4
    if mark != match.group("t") or not begins(text, start, "/." if mark == "/" else f".{mark}"):
        return False
    if after[:1] == "%" or (after[:1] in (".", mark) and after[1:].isdigit()):
        return False
    if not four and (
        len(mark) > 1 or UNITS.match(text[end : end + 12]) or (after[:1] == "/" and after[1:].isdigit())
    ):
        return False
    # A time may follow, as in 2020-03-05T10:30, or a word without a blank.
    return not after[:1].isalnum() or (four and after[:1].isalpha())


def moved(match: Any, days: int) -> str | None:
    """A date in its own form after so many days, a placeholder if there is no such day, None if it is no date."""
    places = {name: match.span(i) for name, i in match.re.groupindex.items() if match.group(i) is not None}
    parts = {name: match.string[start:end] for name, (start, end) in places.items()}
    year = parts.get("y") or parts["z"]
    first, second = month_of(parts), int(parts["d"])
    swapped = first > 12 >= second and "m" not in parts
    month, day = (second, first) if swapped else (first, second)
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return placeholder(KIND) if "m" in parts or (len(year) == 4 and year[:2] in ("19", "20")) else None
    try:
        new = date(of_century(year), month, day) + timedelta(days=days)
    except (ValueError, OverflowError):
        return placeholder(KIND)
    dense = not any(mark.isspace() for mark in match.group())
    told, at = [], match.start()
    for name, (start, end) in sorted(places.items(), key=itemgetter(1)):
        told += [match.string[at:start], written_as(name, new, parts, swapped=swapped, dense=dense)]
        at = end
    return "".join([*told, match.string[at : match.end()]])


def of_century(year: str) -> int:
    """A year of four digits."""
    return int(year) if len(year) == 4 else int(year) + (1900 if int(year) >= PIVOT else 2000)


def month_of(parts: dict[str, str]) -> int:
    """The number of a month."""
    if "n" in parts:
        return int(parts["n"])
    return next(i for i, name in enumerate(MONTHS, start=1) if name.startswith(parts["m"][:3].lower()))


def written_as(name: str, new: date, parts: dict[str, str], *, swapped: bool, dense: bool) -> str:
    """A part of a date as it was written: so many digits, short or long, in such letters. `dense`: it has no blanks,
    and so May is short in it, and days have two digits as far as one can see."""
    old = parts[name]
    if name in ("s", "t"):
        return old
    if name in ("y", "z"):
        return f"{new.year:04d}"[-len(old) :]
    if name == "w":
        return named(WEEKDAYS[new.weekday()], old, short=not old.lower().endswith("day"))
    if name == "m":
        return named(
            MONTHS[new.month - 1],
            old,
            short=old.lower() == "sept" or (len(old) == 3 and (dense or old.lower() != "may")),
        )
    if name == "o":
        return named(ordinal(new.day), old, short=False)
    value = new.month if (name == "n") != swapped else new.day
    others = [parts[one] for one in ("n", "d") if one in parts]
    # 1/12 tells that zeros are left out, and 12 March nothing.
    padded = all(len(one) == 2 for one in others) and (len(others) == 2 or dense or old.startswith("0"))
    return f"{value:02d}" if padded else str(value)


def named(word: str, old: str, *, short: bool) -> str:
    """A word in the letters of the old one."""
    told = word[:3] if short else word
    if old.isupper():
        return told.upper()
    return told if old.islower() else told.capitalize()


def ordinal(day: int) -> str:
    """What stands behind a day's number."""
    return "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
