"""Identifiers in clinical text that have a form: numbers, addresses, ages. Patterns of RE2, so in linear time.

What a pattern finds is looked at once more where medicine writes the like (ranges, doses, ratios).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import re2

BLANK = r"[ \t\x{a0}]"
DASH = r"[-\x{2010}-\x{2013}]"
EXTENSION = rf"(?:,?{BLANK}{{0,2}}(?:(?i)x|ext\.?|extension)[ :.]{{0,2}}[0-9]{{1,6}}\b)?"
NUMBER = rf"\(?[0-9]{{3}}\)?[-. ]{{0,2}}[0-9]{{3}}[-. ]?[0-9]{{4}}{EXTENSION}|[0-9]{{3}}[-. ]?[0-9]{{4}}{EXTENSION}"
"""A number of a telephone behind a word that says so."""
NUMBERED = rf"(?:{BLANK}{{1,2}}(?:numbers?|num|no|id|is|at|to)\b|{BLANK}?[.:#=-]){{0,3}}{BLANK}{{0,3}}"
"""What may stand between such a word and the number."""
CODE = r"([0-9]{2,4}(?: [0-9]{2,4}){1,3}|[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?)\b"
"""A number of a record, which may hold letters; its digits are counted behind."""
ALWAYS = r"m\.?r\.?n|mr ?#|dl ?#|acct|npi|dea|vin|hicn|csn"
"""Words that stand before a number of a record and nothing else."""
OFTEN = (
    r"medical rec(?:ord)?|health rec(?:ord)?|hospital|patient|pt|chart|record|account|billing|health plan|insurance"
    r"|policy|member(?:ship)?|subscriber|beneficiary|group|medicare|medicaid|(?:driver'?s )?licen[cs]e|lic"
    r"|certificate|passport|device|serial|accession|case|encounter|visit|specimen|claim|invoice|job|document"
    r"|dictation|confirmation|reference|registration|employee|badge"
)
"""Words that do so where `number`, `no.`, `#` or `id` follows."""
STATES = (
    "A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|P[AR]|RI|S[CD]|T[NX]|UT|V[AT]"
    "|W[AIVY]|Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho"
    "|Illinois|Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|Mississippi"
    "|Missouri|Montana|Nebraska|Nevada|New Hampshire|New Jersey|New Mexico|New York|North Carolina|North Dakota|Ohio"
    "|Oklahoma|Oregon|Pennsylvania|Rhode Island|South Carolina|South Dakota|Tennessee|Texas|Utah|Vermont|Virginia"
    "|Washington|West Virginia|Wisconsin|Wyoming"
)
ZIP = r"[0-9]{5}(?:-[0-9]{4})?"
TAIL = rf"\.?,?\s{{1,2}}(?:{STATES})\.?,?\s{{1,2}}{ZIP}\b"
ZIPPED = re2.compile(rf"^{TAIL.replace(ZIP, f'({ZIP})')}")
WORD = r"(?:[A-Z][A-Za-z'\x{2019}-]*\.?|[0-9]{1,3}(?:st|nd|rd|th))"
WAYS = r"Street|Avenue|Ave|Boulevard|Blvd|Road|Rd|Drive|Lane|Ln|Court|Place|Terrace|Circle|Highway|Hwy|Parkway|Pkwy"
SHORT_WAYS = r"St|Dr|Ct|Pl|Way|Cir|Ter|Trl|Trail|Square|Sq"
"""Those that mean other things as well when they are in capitals."""
FLAT = (
    rf"(?:\.?,?{BLANK}{{1,2}}(?:(?i)apt|apartment|suite|ste|unit|floor|#)\.?{BLANK}?#?[A-Za-z]?[0-9]{{1,5}}[A-Za-z]?"
    r"\b)?"
)
NINETY = r"(9[0-9]|1[0-2][0-9])"
GROUND = re2.compile(
    r"(?i)^,?[ \t]{0,2}(?:with|w/|who|presents?|presenting|p/w|h/o|hx|history|known|pmhx?|c/o|s/p|here|from|admitted"
    r"|adm|found|brought|seen|status|transferred|complain)"
)
"""Behind somebody's age and sex."""
WARM = re2.compile(r"(?i)\b(?:temp[a-z]*|t|tm|tmax|tc|fever[a-z]*|febrile)\b[^.;\n]{0,16}$")
"""Before degrees of Fahrenheit."""
BEGUN = re2.compile(r"(?i)(?:^|[\r\n]|\b(?:an?|this)|pt|patient:?)[ \t]{0,2}$")
"""Before somebody's age."""
UNITS = re2.compile(
    r"(?i)^[ \t]?-?(?:%|m?c?k?g|mcg|m?d?l|cc|units?|u|iu|meq|mmol|mm|cm|cells?|copies|cal|calories|kcal|hz|days?"
    r"|hours?|hrs?|minutes?|beats?|steps|feet|ft|meters?|psi|ng|pg)\b"
)
SPANS = re2.compile(
    r"(?i)^[ -]?(?:months?|mos?|weeks?|wks?|days?|hours?|hrs?|minutes?|mins?|%|mg|pounds|lbs?|kg"
    r"|y[ -](?:micro|ibri|radio|sirt|dota|resin|glass|spher|label|zeval|ttrium|therap|treat)[a-z]*)\b"
)
"""Behind a number that is no age, as of yttrium."""
NO_STREET = re2.compile(
    r"(?i)^\.?[ -]?(?:elevation|depression|segment|change|wave|abnormal|deviation|scan|angio|chest|head|abdom|with)"
)
"""Behind `St` of an electrocardiogram and `Ct` of a tomography."""
COUNTED = re2.compile(
    r"(?i)^[0-9]+ +(?:units?|u|mg|mcg|ml|cc|mm|cm|fr|french|g|ga|gauge|leads?|tabs?|caps?|puffs?|drops?)\b"
)
"""A number of something, no house."""
IN_PLACE = re2.compile(r"(?i)\b(?:in|of|to|into) +place$")
LOUD = frozenset(
    ("LEAD", "LEADS", "MM", "WITH", "AND", "OR", "OF", "IN", "NO", "MG", "SHOWS", "SHOWED", "NEW", "FOR", "THE")
)
"""Words that are no part of a street's name, and ST behind them no street."""
STREET_ENDS = re2.compile(r"^(?:[.,;]|[ \t]*(?:$|[\r\n]))")
LABS = re2.compile(r"\b(?:[A-Z][a-z]?|[A-Z]{2,5}|[Rr]ange|[Rr]anged|[Ff]rom|[Bb]etween)[ :=]{1,2}$")
"""Before a value, as WBC or Cr."""
RANGE = re2.compile(r"(?i)^ ?(?:range|ref)")
DOSED = re2.compile(r"(?i)^[0-9]+ ?(?:mg|mcg|ml|cc|units?|g|kg|mm|cm|meq|iu)$")


@dataclass(frozen=True)
class Edit:
    """A piece of a text that something else is written for."""

    start: int
    """First character."""
    end: int
    """Behind its last."""
    kind: str
    """What it is; it stands in brackets where nothing better is written."""
    text: str
    """What is written."""


def placeholder(kind: str) -> str:
    """What is written for something of a kind."""
    return f"[{kind}]"


Guard = Callable[[str, int, int], bool]
"""Of a text and the first character and the place behind the last of what was found: whether it is one."""


@dataclass(frozen=True)
class Rule:
    """A pattern of identifiers of one kind."""

    kind: str
    regex: Any
    """The first group is the identifier, or all of it if there is none."""
    guard: Guard
    text: str
    """What is written."""


def alone(text: str, start: int, end: int) -> bool:
    """Whether it is no part of a longer number, ratio or range."""
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    if before[-1:] in ("-", "/", "+") or (before[-1:] in (".", ",", ":") and before[:-1].isdigit()):
        return False
    return not (after[:1] == "%" or (after[:1] in ("-", "/", ".", ",", ":") and after[1:].isdigit()))


def anything(text: str, start: int, end: int) -> bool:
    """Whatever the pattern finds."""
    return True


def digits(least: int) -> Guard:
    """Whether it has so many digits."""
    return lambda text, start, end: sum(one.isdigit() for one in text[start:end]) >= least


def short_number(text: str, start: int, end: int) -> bool:
    """Of a telephone without an area, and no range such as 500-1000 mg."""
    if text[end - 2 : end] == "00" or UNITS.match(text[end : end + 12]) or RANGE.match(text[end : end + 12]):
        return False
    return alone(text, start, end) and not LABS.search(text[max(0, start - 12) : start])


def numbered(text: str, start: int, end: int) -> bool:
    """Of a record: three digits, or four behind a bare `no`, which denies as well, and no dose."""
    bare = text[max(0, start - 4) : start].lower() == " no "
    return digits(4 if bare else 3)(text, start, end) and not (bare and DOSED.match(text[start:end]))


def long_number(text: str, start: int, end: int) -> bool:
    """A long one that counts nothing."""
    return alone(text, start, end) and text[end - 3 : end] != "000"


def network(text: str, start: int, end: int) -> bool:
    """Four numbers of a byte each."""
    return alone(text, start, end) and all(int(one) < 256 for one in text[start:end].split("."))


def house(text: str, start: int, end: int) -> bool:
    """No number of units, and nothing that is in place."""
    return not COUNTED.match(text[start:end]) and not IN_PLACE.search(text[start:end])


def street(text: str, start: int, end: int) -> bool:
    """No lead of an electrocardiogram, no tomography, and no `Dr` before somebody's name."""
    after = text[end : end + 16]
    if text[start:end].endswith("Dr"):
        return after[:1] != "." and not (after[:1] == " " and after[1:2].isupper())
    return house(text, start, end) and not NO_STREET.match(after)


def loud_street(text: str, start: int, end: int) -> bool:
    """One in capitals, with nothing of an electrocardiogram in it."""
    return not LOUD.intersection(text[start:end].split()) and STREET_ENDS.match(text[end : end + 16]) is not None


def zipped(text: str, start: int, end: int) -> bool:
    """No dose behind OR or IN."""
    return alone(text, start, end) and not UNITS.match(text[end : end + 12])


def city(text: str, start: int, end: int) -> bool:
    """What stands before a state and its ZIP code."""
    found = ZIPPED.match(text[end : end + 40])
    return found is not None and zipped(text, end + found.start(1), end + found.end(1))


def aged(text: str, start: int, end: int) -> bool:
    """Years, no part of a longer number."""
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    if before[-1:] in (".", "/") and before[:-1].isdigit():
        return False
    if after[:1] in ("%", "+") or (after[:1] in (".", "/") and after[1:].isdigit()):
        return False
    return not SPANS.match(text[end : end + 24])


def sexed(text: str, start: int, end: int) -> bool:
    """Years before F or M: what is told of people follows, or nothing that is warm or many is before them."""
    sex, told = text[end : end + 24].lstrip(" \t\u00a0-")[:1], text[end : end + 24].lstrip(" \t\u00a0-")[1:]
    before = text[max(0, start - 32) : start]
    if not aged(text, start, end) or WARM.search(before):
        return False
    return GROUND.match(told) is not None or (
        int(text[start:end]) < 110
        and not told[:1].isalnum()
        and not UNITS.match(told)
        and (sex == "M" or (sex == "F" and BEGUN.search(before) is not None))
    )


def rule(kind: str, pattern: str, guard: Guard = anything, text: str = "") -> Rule:
    """One of the rules below."""
    return Rule(kind, re2.compile(pattern), guard, text or placeholder(kind))


PHONED = (
    r"tele?phone|tel|phone|fax|facsimile|cell(?: ?phone)?|mobile|pager|beeper|ph|call(?:ed)?|contact|home|work|office"
)
RULES = (
    rule("email", r"[\pL\pN._%+-]+@[\pL\pN-]+(?:\.[\pL\pN-]+)+"),
    rule("url", r"""(?i)\b(?:(?:https?|s?ftps?)://|www\.)[^\s<>",]*[^\s<>",.;:!?'()\[\]]"""),
    rule("url", r"(?i)\b(?:[a-z0-9-]{1,63}\.){1,4}(?:com|org|net|edu|gov)\b"),
    rule("ip", r"\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b", network),
    rule("ip", r"(?i)\b(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}\b|\b[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){1,6}::[0-9a-f:]{0,30}"),
    rule("id", r"(?i)\b[0-9a-f]{2}(?:[:-][0-9a-f]{2}){5}\b", alone),
    rule("ssn", r"\b[0-9]{3}-[0-9]{2}-[0-9]{4}\b", alone),
    rule("ssn", r"(?i)\b[x*#]{3}-[x*#]{2}-[0-9]{4}\b"),
    rule(
        "ssn",
        rf"(?i)\b(?:ssn|ss ?#|social security){NUMBERED}([0-9]{{3}}[- ]?[0-9]{{2}}[- ]?[0-9]{{4}}|[0-9]{{4}})\b",
    ),
    rule("phone", rf"(?:\+?1[-. ]{{0,2}})?\([0-9]{{3}}\){BLANK}?[-. ]?[0-9]{{3}}[-. ]?[0-9]{{4}}\b{EXTENSION}"),
    rule("phone", rf"\b(?:1[-. ])?[0-9]{{3}}(?:{DASH}|[./])[0-9]{{3}}(?:{DASH}|\.)[0-9]{{4}}\b{EXTENSION}", alone),
    rule("phone", rf"\b(?:1 )?[2-9][0-9]{{2}} [2-9][0-9]{{2}}[- ][0-9]{{4}}\b{EXTENSION}", alone),
    rule("phone", r"\+[0-9]{1,3}[-. (]{1,2}[0-9](?:[-0-9. ()]{5,16})[0-9]\b|\+[0-9]{8,15}\b", digits(8)),
    rule("phone", rf"(?i)\b(?:{PHONED}){NUMBERED}({NUMBER})\b"),
    rule("phone", rf"(?i)\b(?:pager|beeper){NUMBERED}([0-9]{{3,7}}(?:-[0-9]{{4}})?)\b"),
    rule("phone", rf"\b[2-9][0-9]{{2}}-[0-9]{{4}}\b{EXTENSION}", short_number),
    rule("id", rf"(?i)\b(?:{ALWAYS}){NUMBERED}{CODE}", digits(2)),
    rule(
        "id",
        rf"(?i)\b(?:{OFTEN})(?: (?:record|plan|account|plate))?{BLANK}{{0,2}}"
        rf"(?:numbers?\b|num\b|no\b|nr\b|#|id\b|identifier\b){NUMBERED}{CODE}",
        numbered,
    ),
    rule("id", rf"(?i)\b(?:medical record|account|licen[cs]e|serial|s/n|passport):{BLANK}{{0,3}}{CODE}", digits(4)),
    rule(
        "id",
        rf"(?i)\blicen[cs]e plate{NUMBERED}([a-z0-9]{{2,4}}[- ]?[a-z0-9]{{2,4}})\b",
        digits(1),
    ),
    rule("id", r"\b[0-9]{9,}\b", long_number),
    rule(
        "address",
        rf"\b[0-9]{{1,6}}[A-Za-z]?{BLANK}{{1,2}}(?:{WORD}{BLANK}{{1,2}}){{1,4}}(?:(?:{WAYS})\b|(?i:STREET|AVENUE|AVE|"
        rf"BOULEVARD|BLVD|ROAD|LANE|HIGHWAY|PARKWAY)\b){FLAT}",
        house,
    ),
    rule(
        "address",
        rf"\b[0-9]{{1,6}}[A-Za-z]?{BLANK}{{1,2}}(?:{WORD}{BLANK}{{1,2}}){{1,4}}(?:{SHORT_WAYS})\b{FLAT}",
        street,
    ),
    rule("address", rf"\b[0-9]{{1,6}}{BLANK}{{1,2}}(?:[A-Z]{{3,20}}{BLANK}{{1,2}}){{1,2}}ST\b{FLAT}", loud_street),
    rule("address", rf"\b[0-9]{{1,6}} [a-z]+ (?:street|avenue|boulevard)\b{FLAT}"),
    rule("address", r"(?i)\b(?:p\.? ?o\.?|post office) box:? {0,2}#?[0-9]{1,7}\b"),
    rule("address", rf"\b([A-Z][A-Za-z.'-]*(?: [A-Z][A-Za-z.'-]*){{0,2}}){TAIL}", city),
    rule("zip", rf"\b(?:{STATES})\.?,?\s{{1,2}}({ZIP})\b", zipped),
    rule("zip", rf"(?i)\bzip(?: ?code)?{NUMBERED}({ZIP})\b"),
    rule(
        "age",
        rf"(?i)\bage[ds]?(?:/sex)?(?:\s{{0,2}}[:=,]{{1,2}}|\s(?:of|is|was))?\s{{0,2}}{NINETY}(?:y?[fm])?\b",
        aged,
        "90+",
    ),
    rule(
        "age",
        rf"(?i)\b{NINETY}[\s-]{{0,2}}(?:(?:years?|yrs?)(?:\.?[\s-]{{1,2}}(?:old|of\sage|young))?|y\.?{BLANK}?/?{BLANK}?o|y"
        r"|y?/?o?[ -]?(?:female|male|woman|man|lady|gentleman))\b",
        aged,
        "90+",
    ),
    rule("age", rf"(?i)\b{NINETY}{BLANK}?-?[fm]\b", sexed, "90+"),
    rule(
        "age",
        r"(?i)\b((?:ninety|(?:one|a) hundred)(?:[\s-](?:one|two|three|four|five|six|seven|eight|nine))?)"
        r"[\s-](?:years?|yrs?)[\s-](?:old|of\sage)\b",
        text="90+",
    ),
    rule("age", rf"(?i)\b({NINETY}(?:st|nd|rd|th))\sbirthday\b", text="90+"),
)
"""In order: of two that begin and end at the same place the first counts."""


def identifiers(text: str) -> Iterator[Edit]:
    """What the rules find; pieces may overlap."""
    for one in RULES:
        group = min(one.regex.groups, 1)
        for match in one.regex.finditer(text):
            start, end = match.span(group)
            if one.guard(text, start, end):
                yield Edit(start, end, one.kind, one.text)
