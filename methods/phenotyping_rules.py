"""The baselines: logic rules on a patient's structured facts, and cue words around a mention."""

import re
from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatchcase
from typing import Literal, Self

from pydantic import Field, model_validator

from protocols.service import Message

FactKind = Literal["code", "drug", "measurement"]


class Fact(Message):
    """Something that is coded of a patient."""

    patient_id: str = Field(min_length=1)
    """Whose."""
    kind: FactKind
    """What it is."""
    code: str = Field(min_length=1)
    """Code of the diagnosis, name of the drug or of the measurement."""
    day: date | None = None
    """When."""
    value: float | None = Field(default=None, allow_inf_nan=False)
    """Of a measurement."""


class Rule(Message):
    """A tree: exactly one of any, all, codes, drugs and measurement. Codes and names may hold `*` and `?`."""

    any: list["Rule"] | None = Field(default=None, min_length=1)
    """One of them holds."""
    all: list["Rule"] | None = Field(default=None, min_length=1)
    """Each of them holds."""
    codes: list[str] | None = Field(default=None, min_length=1)
    """Diagnosis codes."""
    at_least: int = Field(default=1, ge=1)
    """Of codes: so many entries."""
    days_apart: int = Field(default=0, ge=0)
    """Of codes: the first and the last of them are at least so many days apart."""
    drugs: list[str] | None = Field(default=None, min_length=1)
    """Names of drugs."""
    measurement: str | None = None
    """Name of a measurement."""
    above: float | None = None
    """Of measurement: a value is higher than this."""
    below: float | None = None
    """Of measurement: a value is lower than this."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        kinds = ("any", "all", "codes", "drugs", "measurement")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"rules: got {' and '.join(given) or 'nothing'}, expected one of {', '.join(kinds)}")
        if (self.measurement is not None) != (self.above is not None or self.below is not None):
            raise ValueError("rules: measurement goes with above or below")
        if self.codes is None and (self.at_least, self.days_apart) != (1, 0):
            raise ValueError("rules: at_least and days_apart go with codes")
        return self

    def holds(self, facts: Sequence[Fact]) -> bool:
        """Whether it is so for a patient with these facts."""
        if self.any is not None:
            return any(rule.holds(facts) for rule in self.any)
        if self.all is not None:
            return all(rule.holds(facts) for rule in self.all)
        if self.codes is not None:
            found = [fact for fact in facts if fact.kind == "code" and matches(fact.code, self.codes)]
            return len(found) >= self.at_least and spread(found) >= self.days_apart
        if self.drugs is not None:
            return any(fact.kind == "drug" and matches(fact.code, self.drugs) for fact in facts)
        assert self.measurement is not None
        values = [
            fact.value
            for fact in facts
            if fact.kind == "measurement" and fact.value is not None and matches(fact.code, [self.measurement])
        ]
        low, high = self.above, self.below
        return any((low is None or value > low) and (high is None or value < high) for value in values)


def matches(code: str, wanted: Sequence[str]) -> bool:
    """Whether a code or name is one of those, in any case; `*` and `?` stand for any characters."""
    return any(fnmatchcase(code.casefold(), one.casefold()) for one in wanted)


def spread(facts: Sequence[Fact]) -> int:
    """Days from the first to the last dated fact; 0 without dates."""
    days = [fact.day for fact in facts if fact.day is not None]
    return (max(days) - min(days)).days if days else 0


def any_code(rule: Rule, facts: Sequence[Fact]) -> bool:
    """Whether a patient has one of the codes that occur anywhere in the rules: the simplest baseline."""
    return any(fact.kind == "code" and matches(fact.code, codes_of(rule)) for fact in facts)


def codes_of(rule: Rule) -> list[str]:
    """All diagnosis codes of a tree."""
    below = [code for inner in [*(rule.any or []), *(rule.all or [])] for code in codes_of(inner)]
    return [*(rule.codes or []), *below]


NEGATED = re.compile(
    r"\b(no|not|denies|denied|without|negative for|absence of|free of|ruled out|rule out|r/o|never had)\b", re.I
)
FAMILY = re.compile(
    r"\b(mother|father|brother|sister|son|daughter|aunt|uncle|grand\w+|family history|familial|relatives?)\b", re.I
)
POSSIBLE = re.compile(r"\b(possible|possibly|probable|suspected|suspicion|question of|versus|vs|concern for)\b", re.I)
RISK = re.compile(
    r"\b(risks?|prophyla\w+|prevent\w*|complications?|consent|screening|including but not limited)\b|\bif\b", re.I
)
CUES = {"negated": NEGATED, "family": FAMILY, "possible": POSSIBLE, "risk_or_prophylaxis": RISK}
"""Words in a mention's sentence that speak against it."""
SENTENCE_ENDS = re.compile(r"[.;!?](?=[\s,]|$)|\n")
BREAKS = re.compile(r"\b(but|however|although|except|now has)\b", re.I)
"""Words behind which a negation no longer holds."""


def cue(text: str, start: int, end: int) -> str:
    """By words alone, what a mention at [start, end) of a text is: present, or one of CUES.

    Looks at the mention's sentence; negations must stand before it, with none of BREAKS between.
    """
    begins = [match.end() for match in SENTENCE_ENDS.finditer(text, 0, start)]
    until = SENTENCE_ENDS.search(text, end)
    before = text[begins[-1] if begins else 0 : start]
    after = text[end : until.start() if until else len(text)]
    broken = list(BREAKS.finditer(before))
    near = before[broken[-1].end() :] if broken else before
    if NEGATED.search(near):
        return "negated"
    for status in ("family", "possible", "risk_or_prophylaxis"):
        if CUES[status].search(before) or CUES[status].search(after):
            return status
    return "present"
