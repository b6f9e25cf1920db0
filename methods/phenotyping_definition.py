"""What a disease is to the program: a small YAML file per phenotype, checked, versioned by its content."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.configure import read_yaml
from methods.phenotyping_reduce import ReduceConfig
from methods.phenotyping_rules import Rule
from protocols.errors import BadInput, describe_validation_error
from protocols.retriever import Pattern, PatternSet
from protocols.service import Message

NOT_COUNTING = (
    "it is negated",
    "it is a relative's",
    "it is only possible, suspected or to be ruled out",
    "it is a risk, counselling or prophylaxis",
    "the words mean something else here",
)
"""Mentions that are no evidence, in the words of the prompt (specification 2.5)."""


class Definition(Message):
    """One phenotype."""

    phenotype_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Its name in all files."""
    version: str
    """Whatever tells versions apart; decisions also carry a digest of the content."""
    name: str = Field(min_length=1)
    """Name of the disease."""
    description: str = Field(min_length=1)
    """One sentence: what counts."""
    question: str = ""
    """What is asked of each snippet; empty: whether the snippet says that the description holds."""
    not_counting: list[str] = list(NOT_COUNTING)
    """What does not count."""
    terms: list[str] = []
    """Words and phrases of any case, with any blanks between them."""
    abbreviations: list[str] = []
    """Words whose case counts, as PH and not pH."""
    include: list[Pattern] = []
    """Regular expressions (RE2) beside the terms; a group in one is the match, and the rest its context."""
    exclude_match: list[Pattern] = []
    """A match that overlaps one of these does not count."""
    ever_or_current: Literal["ever", "current"] = "ever"
    """Whether a past disease counts; a model is told so."""
    lookback_days: int | None = Field(default=None, ge=0)
    """Only notes of so many days before the patient's last one; null: all."""
    note_types: list[str] = []
    """Only notes of these types; empty: all."""
    skip_sections: list[str] = []
    """Snippets under headers that contain one of these, in any case, are left out, such as `allergies`."""
    skip_family: bool = False
    """Whether snippets under a family history are left out; else a model decides."""
    rules: Rule | None = None
    """Logic rules on structured facts, the baseline."""
    reduce: ReduceConfig = ReduceConfig()
    """How a patient's snippets become a decision."""
    approved_by: str = ""
    """Who has read it."""
    enabled: bool = True
    """false: nothing is decided by it any more."""

    @field_validator("version", mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        return str(given) if isinstance(given, int | float) and not isinstance(given, bool) else given

    @field_validator("include", "exclude_match", mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        """A text alone is an expression whose case does not count."""
        if not isinstance(given, list):
            return given
        return [{"expression": one} if isinstance(one, str) else one for one in given]

    @model_validator(mode="after")
    def _finds_something(self) -> Self:
        blank = [one for one in [*self.terms, *self.abbreviations] if not one.strip()]
        if blank:
            raise ValueError("terms, abbreviations: got an empty one; expected words")
        if not (self.terms or self.abbreviations or self.include):
            raise ValueError("expected at least one of terms, abbreviations and include")
        return self

    @property
    def digest(self) -> str:
        """Of everything that a decision depends on."""
        told = self.model_dump(mode="json", exclude={"approved_by", "enabled"})
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def pattern_set(self) -> PatternSet:
        """What a retriever looks for: terms, abbreviations, expressions, in this order."""
        words = [Pattern(expression=expression_of(term)) for term in self.terms]
        words += [Pattern(expression=expression_of(one), case_sensitive=True) for one in self.abbreviations]
        return PatternSet(id=self.phenotype_id, include=[*words, *self.include], exclude=self.exclude_match)

    def skips(self, section: str) -> bool:
        """Whether snippets under this header are left out."""
        header = section.casefold()
        if self.skip_family and "family" in header:
            return True
        return any(one.casefold() in header for one in self.skip_sections)


def expression_of(term: str) -> str:
    """A term as an expression: any blanks between its words, and no letter or digit directly around it.

    RE2's own blanks and word boundaries know ASCII alone, so the group is the match and what is around it context.
    """
    words = r"[\s\p{Z}]+".join(re.escape(word) for word in term.split())
    first, last = term.strip()[0], term.strip()[-1]
    before = r"(?:^|[^\p{L}\p{M}\p{N}_])" if first.isalnum() else ""
    return f"{before}({words})" + (r"(?:[^\p{L}\p{M}\p{N}_]|$)" if last.isalnum() else "")


def read_definitions(paths: Sequence[str]) -> list[Definition]:
    """Definitions of files and folders of .yaml, by id. Raises BadInput that names the file, field and value."""
    files: list[Path] = []
    for path in paths:
        where = Path(path).expanduser()
        found = sorted([*where.glob("*.yaml"), *where.glob("*.yml")]) if where.is_dir() else [where]
        if not found:
            raise BadInput(f"definitions: no .yaml in {path}")
        files += found
    known: dict[str, Path] = {}
    definitions = []
    for file in files:
        one = read_definition(file)
        if one.phenotype_id in known:
            raise BadInput(
                f"{file}: phenotype_id: {one.phenotype_id!r} is that of {known[one.phenotype_id]} too; expected each"
                " once"
            )
        known[one.phenotype_id] = file
        definitions.append(one)
    kept = sorted((one for one in definitions if one.enabled), key=lambda one: one.phenotype_id)
    if not kept:
        raise BadInput("definitions: expected at least one file of a phenotype that is enabled")
    return kept


def read_definition(file: Path) -> Definition:
    """One file. Raises BadInput."""
    values = read_yaml(file, "definitions")
    try:
        return Definition.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{file}: {describe_validation_error(error)}") from error
