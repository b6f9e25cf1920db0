"""Dates in clinical text, moved by a number of days; those that are not complete become a placeholder.

Patterns of RE2, so in linear time. Months come before days, as in the United States, unless only the other order is
a date. Years alone stay. Beside a whole date that was moved, one without a year would tell by how much.
"""

import re
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
LINE = rf"(?:{BLANK}|\r?\n)"
"""Between words, which may stand on two lines."""
START = r"(?:\b|_)"
WEEKDAY = (
    rf"(?:{START}(?P<w>mon|tues?|wed|thu(?:rs?)?|fri|(?-i:Sat)|sun|monday|tuesday|wednesday|thursday|friday|saturday|sunday)"
    rf"\.?,?{BLANK}{{1,2}})?"
)
YEAR = r"(?:(?:1[89]|2[01])[0-9]{2}|9999)"
NEVER = 9999
"""A year of days that never come: everybody knows the day that was meant, so it is not moved."""
DAY = r"(?P<d>[0-9]{1,2})(?P<o>st|nd|rd|th)?"
PLAIN_DAY = r"[0-9]{1,2}(?:st|nd|rd|th)?"
DASHES = r"-\x{2010}-\x{2015}\x{2212}"
HYPHENS = re.compile("[\u2010-\u2015\u2212]")
THEN = rf"(?:{LINE}{{0,2}}|[{DASHES}/.]|\sof\s)"
"""Between a day and a month."""
MARK = rf"{BLANK}?(?:[{DASHES}/]{LINE}?|\.{BLANK}?)"
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
        rf"(?i){WEEKDAY}(?P<y>[12][0-9]{{3}}|9999)(?P<s>[{DASHES}/.])(?P<n>[0-9]{{1,2}})(?P<t>[{DASHES}/.])"
        r"(?P<d>[0-9]{1,2})",
        rf"(?i){WEEKDAY}(?P<n>[0-9]{{1,2}})(?P<s>{MARK})(?P<d>[0-9]{{1,2}})(?P<t>{MARK})(?P<y>{YEAR}|[0-9]{{2}})",
        rf"(?i){START}{WEEKDAY}(?P<m>{MONTH})\.?(?:{LINE}{{0,2}}|[{DASHES}/])?{DAY}"
        rf"(?:(?:,?{LINE}{{0,3}}|[{DASHES}/.]|,?\s(?:of|in)\s)(?P<y>{YEAR})"
        rf"|(?:[{DASHES}/]|,? ?['\x{{2019}}])(?P<z>[0-9]{{2}}))",
        rf"(?i){WEEKDAY}{DAY}{THEN}(?P<m>{MONTH})(?:\.?,?{LINE}{{0,2}}|[{DASHES}/.]|,?\sof\s)(?P<y>{YEAR})",
        rf"(?i){WEEKDAY}{DAY}{THEN}(?P<m>{MONTH})(?:[{DASHES}/]|\.?,? ?['\x{{2019}}])(?P<z>[0-9]{{2}})",
        rf"(?i)(?P<y>{YEAR})[{DASHES}/ ](?P<m>{MONTH})[{DASHES}/. ]{DAY}",
        r"\b(?P<y>(?:19|20)[0-9]{2})(?P<n>0[1-9]|1[0-2])(?P<d>0[1-9]|[12][0-9]|3[01])(?:[0-9]{6}|[0-9]{4})?\b",
        rf"(?i){START}(?:dob|dos|date(?:{BLANK}of{BLANK}(?:birth|service))?|born):?{BLANK}{{0,3}}"
        r"(?P<n>0[1-9]|1[0-2])(?P<d>0[1-9]|[12][0-9]|3[01])(?P<y>(?:19|20)[0-9]{2})",
    )
)
"""Of a whole date: w weekday, y year or z year of two digits, m month or n its number, d day, o behind the day."""
FRACTION = re2.compile(
    r"(?i)^[ -]?(?:tab|pill|dose|strength|normal|ns\b|saline|m?c?g\b|m?l\b|cc\b|cups?\b|packs?\b|pts?\b|pints?\b|of\b"
    r"|occasion|scale|murmur|systolic|diastolic|inch|lit|lymph|node|core|bottle|culture|limb|criteri|point|day|week"
    r"|month|year|hour|wk|decreas|\+|sem\b|pain|patell|ankle|bilateral|throughout|gravity|beat|mm|cm|score|amp|vial)"
)
"""Behind two numbers that are a share, a grade or a dose."""
RATED = re.compile(
    r"\b(?:rat(?:ed|es|ing)|scor(?:ed?|es|ing)|scale|grad(?:ed?|ing)|stage)"
    r"(?: (?:it|is|was|of|as|at|an?|on|to|the|pain)){0,3}:?[ ~]{0,2}$",
    re.IGNORECASE,
)
"""Before a grade."""
GRADED = re.compile(
    r"\b(?:strength|power|motor|reflex(?:es)?|dtrs?|jerks?|pulses?|pain|murmur|apgars?|mmse|gcs|asa|nyha|vision|acuity"
    r"|v/?a|flexors?|extensors?|extension|flexion|biceps|triceps|deltoids?|quads?|quadriceps|hamstrings?|grip|iliopsoas"
    r"|dorsiflexion|plantar\s?flexion|extremit(?:y|ies)|intensity|severity|score[sd]?|reactive|ratio|patellar|achilles"
    r"|radial|pedal|dorsalis pedis|pedis|tibial|femoral|gleason|mallampati|tones?|nodes?|cycles?|level|pupils?"
    r"|patellae?|ankles?)"
    r"\b[^.;\n0-9]{0,40}(?:[0-9]/[0-9]\+?[^.;\n0-9]{0,30}){0,4}$",
    re.IGNORECASE,
)
"""Before a grade, perhaps with others in between, in a note that has whole dates."""
THIRDS = re.compile(
    r"\b(?:upper|lower|mid|middle|proximal|distal|anterior|posterior|lateral|medial|inner|outer)[ -]$", re.I
)
"""Before a share of an organ."""
SECONDARY = re.compile(r"2/2 (?:to )?[A-Za-z]")
"""Secondary to what follows."""
RATIO = re.compile(r"\bratios?(?: (?:of|is|was))?:? {1,2}$", re.IGNORECASE)
DOSE = re.compile(
    r"(?i)^[ -]?(?:tablets?|tabs?|caps?|capsules?|pills?|puffs?|drops?|gtts?|sprays?|doses?|times|amps?|vials?|g"
    r"|grams?|x)\b"
)
"""Behind a number that counts something, beside units."""
ON = (
    r"on|since|until|till|dated?|dates?|as of|effective|admitted|discharged|admit|discharge|d/c'?d|dos|dob|doa|dod"
    r"|visit of"
)
AROUND = r"in|since|on|until|till|around|from|late|early|mid|last|by|before|after|during|through|dated?"
WORD = re.compile("[A-Z][a-z]{2}")
"""Behind a date without a blank, as Time."""
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
BARE = re2.compile(rf"(?:\b|_)({PAIR})")
"""What is a day in a note that has whole dates with a slash."""
PAIRS: tuple[tuple[Any, Says], ...] = (
    # A fraction has no leading zero.
    (BARE, lambda a, b, one, other: has_zero(one, other) and (is_day(a, b) or (1 <= a <= 12 and b < 10))),
    # 9/94 is a month; 6/60 may be an acuity.
    (BARE, lambda a, b, one, other: 1 <= a <= 12 and b > 60 and b % 10 > 0),
    (
        re2.compile(rf"(?i)\b(?:{AROUND}){BLANK}{{1,2}}({PAIR})\b"),
        lambda a, b, one, other: 1 <= a <= 12 and b > 31,
    ),
    (re2.compile(rf"(?i)\b(?:{ON}):?{BLANK}{{1,2}}({PAIR})\b"), lambda a, b, one, other: is_day(a, b)),
)
"""Two numbers with a slash: of month and day, or month and year."""
JOIN = rf"{LINE}?(?:[{DASHES}]|,|&|,? ?(?:to|through|thru|and|until)(?: the)?\b){LINE}{{0,2}}"
"""Between the days of a range or a list."""
BEHIND = re2.compile(rf"(?i)^{JOIN}([0-9]{{1,2}}(?:[{DASHES}./][0-9]{{1,2}}|st|nd|rd|th))\b")
BEFORE = re2.compile(rf"(?i)\b([0-9]{{1,2}}[{DASHES}./][0-9]{{1,2}}|[0-9]{{1,2}}(?:st|nd|rd|th)){JOIN}$")
"""What belongs to a whole date that was moved, before it and behind."""
REACH = 24
NTH = re2.compile(r"(?i)\b(?:on|since|until|till|through|thru|to|from|by) the ([0-9]{1,2}(?:st|nd|rd|th))\b")
NTH_ENDS = re.compile(r"\s*(?:$|[.,;)])")
NAMED = r"January|February|March|April|June|July|August|September|October|November|December"
PARTIAL = tuple(
    re2.compile(pattern)
    for pattern in (
        rf"\b{CAPITAL}\.?{BLANK}{{1,2}}{PLAIN_DAY}(?:{BLANK}?(?:{DASH}|to|through|thru|and|&){BLANK}?{PLAIN_DAY})?"
        rf"(?:,?{BLANK}{{1,2}}{YEAR})?\b",
        rf"(?i)\b{MONTH}\.?{BLANK}{{1,2}}{PLAIN_DAY}(?:(?:,?{JOIN}){PLAIN_DAY}){{1,6}},?{LINE}{{1,2}}{YEAR}\b",
        rf"\b[0-9]{{1,2}}/[0-9]{{1,2}}{BLANK}?[{DASHES}]{BLANK}?[0-9]{{1,2}}/(?:{YEAR}|[0-9]{{2}})\b",
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
    whole = list(whole_dates(text, days))
    yield from whole
    slashes = any("/" in text[one.start : one.end] for one in whole)
    for regex, says in (*PAIRS, *([(BARE, days_of_year)] if slashes else [])):
        for match in regex.finditer(text):
            one, other = match.group(2), match.group(3)
            start, end = match.span(1)
            if not (says(int(one), int(other), one, other) and begins(text, start, "/.") and ends(text, end)):
                continue
            if has_zero(one, other) or not graded(text, start, end, far=says is days_of_year):
                yield Edit(start, end, KIND, placeholder(KIND))
    for regex in PARTIAL:
        for match in regex.finditer(text):
            start, end = match.span(min(regex.groups, 1))
            if begins(text, start, "/.-") and ends(text, end) and not counts(text, end):
                yield Edit(start, end, KIND, placeholder(KIND))
    for edit in whole:
        yield from beside(text, edit)
    for match in NTH.finditer(text) if whole else ():
        if NTH_ENDS.match(text, match.end()):
            yield Edit(match.start(1), match.end(1), KIND, placeholder(KIND))


def whole_dates(text: str, days: int) -> Iterator[Edit]:
    """Those with day, month and year."""
    for regex in COMPLETE:
        for match in regex.finditer(text):
            spans = [match.span(i) for i in match.re.groupindex.values() if match.group(i) is not None]
            start = min(one[0] for one in spans)
            if apart(text, match, start) and (told := moved(match, start, days)) is not None:
                yield Edit(start, match.end(), KIND, told)


def beside(text: str, whole: Edit) -> Iterator[Edit]:
    """The rest of a range or a list of which a whole date is a part, with the same mark or as 9th."""
    first = max(0, whole.start - REACH)
    for at, found in (
        (whole.end, BEHIND.match(text[whole.end : whole.end + REACH])),
        (first, BEFORE.search(text[first : whole.start])),
    ):
        if found is None:
            continue
        start, end = at + found.start(1), at + found.end(1)
        mark = found.group(1).strip("0123456789")
        if len(mark) > 1 and at == whole.end and not NTH_ENDS.match(text, end):
            continue
        if len(mark) == 1 and (mark not in text[whole.start : whole.end] or not ends(text, end) or counts(text, end)):
            continue
        if begins(text, start, "/.-"):
            yield Edit(start, end, KIND, placeholder(KIND))


def days_of_year(first: int, second: int, one: str, other: str) -> bool:
    """Whether two numbers are a day in a note that has whole dates with a slash."""
    return is_day(first, second)


def graded(text: str, start: int, end: int, *, far: bool) -> bool:
    """Whether two numbers are a share, a grade or a dose. `far`: by words farther before them as well."""
    before = text[max(0, start - 80) : start]
    if not begins(text, start, "-") or FRACTION.match(text[end : end + 12]) or RATED.search(before[-40:]):
        return True
    if not far:
        return False
    return bool(GRADED.search(before) or THIRDS.search(before[-12:]) or SECONDARY.match(text, start))


def counts(text: str, end: int) -> bool:
    """Whether a number that ends here is one of units, tablets or times."""
    after = text[end : end + 12]
    return text[end - 1 : end].isdigit() and (UNITS.match(after) is not None or DOSE.match(after) is not None)


def begins(text: str, start: int, marks: str) -> bool:
    """Whether no number goes on to here over one of these marks."""
    return not (start > 1 and text[start - 1] in marks and text[start - 2].isdigit())


def ends(text: str, end: int) -> bool:
    """Whether no number goes on from here."""
    after = text[end : end + 2]
    return after[:1] != "%" and not (after[:1].isalnum() or (after[:1] in ("/", ".", ":") and after[1:].isdigit()))


def apart(text: str, match: Any, start: int) -> bool:
    """Whether a whole date is no part of something longer and no dose, and its two marks are the same."""
    end = match.end()
    after, before = text[end : end + 2], text[max(0, start - 2) : start]
    goes_on = after[1:].isdigit()
    if before[-1:].isdigit() or after[:1].isdigit():
        return False
    if "s" not in match.re.groupindex:
        glued = after[:1].isalpha() and "z" in match.re.groupindex and match.group("z") is not None
        counted = glued or UNITS.match(text[end : end + 12]) is not None
        return not counted and begins(text, start, "/.") and not (after[:1] in ("/", ".") and goes_on)
    marks = [match.group(name) for name in ("s", "t")]
    mark, other = (HYPHENS.sub("-", one.strip(" \t\u00a0\r\n")) for one in marks)
    if mark != other or not begins(text, start, "/." if mark == "/" else f".{mark}"):
        return False
    if after[:1] == "%" or (after[:1] in (".", mark) and goes_on):
        return False
    if len(match.group("y")) == 4:
        # A time may follow, as in 2020-03-05T10:30, or a word without a blank.
        return True
    if max(map(len, marks)) > 1 or UNITS.match(text[end : end + 12]) or (after[:1] == "/" and goes_on):
        return False
    if RATIO.search(text[max(0, start - 16) : start]) or (after[:1].isalnum() and not WORD.match(text, end)):
        return False
    return not before[-1:].isalpha() or (mark == "/" and before.isalpha())


def moved(match: Any, start: int, days: int) -> str | None:
    """A date from its first part on, in its own form after so many days, a placeholder if there is no such day, None
    if it is no date."""
    places = {name: match.span(i) for name, i in match.re.groupindex.items() if match.group(i) is not None}
    parts = {name: match.string[start:end] for name, (start, end) in places.items()}
    year = parts.get("y") or parts["z"]
    first, second = month_of(parts), int(parts["d"])
    swapped = first > 12 >= second and "m" not in parts
    month, day = (second, first) if swapped else (first, second)
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return placeholder(KIND) if "m" in parts or (len(year) == 4 and year[:2] in ("19", "20")) else None
    if int(year) == NEVER:
        return placeholder(KIND)
    try:
        new = date(of_century(year), month, day) + timedelta(days=days)
    except (ValueError, OverflowError):
        return placeholder(KIND)
    dense = not any(mark.isspace() for mark in match.string[start : match.end()])
    told, at = [], start
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
