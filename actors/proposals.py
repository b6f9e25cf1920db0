"""What a questioner wrote, read as a question with a reference answer (SPELL section 2.3, parsing)."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from actors.numbers import number_from, number_text, parse_number
from actors.rules import after_thinking, parse_answer, reference_sentence
from protocols.questions import LETTERS, ProposalStatus, Task

SENTINEL = 999999999
"""The reference code's sign for "not a number"; as an answer it is refused."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_LABEL = re.compile(r"\s*(?:json\b)?\s*", re.IGNORECASE)
# A string that never ends is taken to the end of the text, so that the scan stays linear.
_STRING_OR_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+(?:"|\\?\Z))|,(?=\s*[}\]])', re.DOTALL)
_LABELLED = r"(?s)(?:\({letter}\)|{letter}[).:])\s+(\S.*)"


@dataclass(frozen=True)
class ParsedProposal:
    """What became of one text: usable if the status is ok, else `reason` says what was wrong."""

    status: ProposalStatus
    reason: str = ""
    question: str = ""
    options: list[str] = field(default_factory=list)
    """Texts of A, B, C, D; for multiple choice only."""
    answer: str = ""
    """Text, number or letter, as `parse_answer` gives it."""


class _Refused(Exception):
    """Ends the parsing of one text."""

    def __init__(self, status: ProposalStatus, reason: str) -> None:
        super().__init__(reason)
        self.outcome = ParsedProposal(status, reason)


def parse_proposal(task: Task, text: str) -> ParsedProposal:
    """Read a questioner's output (SPELL section 2.3, parsing). Never raises.

    The caller checks what this text alone cannot show: the length of a free answer in policy tokens,
    duplicates and support.
    """
    rest = after_thinking(text)
    if rest is None:
        return ParsedProposal(ProposalStatus.TRUNCATED, "the thinking does not end")
    try:
        return _read(task, _CONTROL.sub("", rest))
    except _Refused as refused:
        return refused.outcome


def _read(task: Task, text: str) -> ParsedProposal:
    written = next(_objects(text), None)
    if written is None:
        raise _Refused(ProposalStatus.BAD_FORMAT, "no JSON object" if text.strip() else "nothing was written")
    question = _text(written, "question")
    if not any(map(str.isalpha, question)):
        raise _unexpected("question", question, "a question in words")
    options = _options(written.get("options")) if task is Task.CHOICE else []
    answer = _answer(task, written, options)
    return ParsedProposal(ProposalStatus.OK, question=question, options=options, answer=answer)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects that stand alone between code fences, last first; then the whole text."""
    for part in [*reversed(text.split("```")), text]:
        bare = _LABEL.sub("", part, count=1)
        if bare.startswith("{") and (found := _object(bare)) is not None:
            yield found


def _object(text: str) -> dict[str, Any] | None:
    """One JSON object, with raw line breaks in its strings and trailing commas if need be."""
    for candidate in (text, _STRING_OR_COMMA.sub(r"\1", text)):
        # Nesting too deep and integers too long are errors of their own kind.
        with suppress(ValueError, RecursionError):
            found = json.loads(candidate, strict=False)
            return found if isinstance(found, dict) else None
    return None


def _answer(task: Task, written: dict[str, Any], options: list[str]) -> str:
    if task is Task.MATH:
        return _number(_value(written, "answer"))
    text = _text(written, "answer")
    if len(text) > 1 and text in options:
        return LETTERS[options.index(text)]
    answer = parse_answer(task, reference_sentence(task, text))
    if answer is None:
        raise _unexpected("answer", text, "one letter of A to D" if options else "an answer")
    return answer


def _number(value: str | int | float) -> str:
    """The number that a reference names, if it can be one: neither 0 nor the sentinel."""
    text = str(value) if number_from(value) else parse_answer(Task.MATH, str(value)) or ""
    number = parse_number(text)
    if number is None or number.value in (0, SENTINEL):
        raise _unexpected("answer", value, "a number other than 0", ProposalStatus.BAD_ANSWER)
    return number_text(text) or text


def _options(value: object) -> list[str]:
    """Texts of A to D, from an object or a list of four; letters in front of all of them are dropped."""
    if isinstance(value, list) and len(value) == len(LETTERS):
        value = dict(zip(LETTERS, value, strict=True))
    if not isinstance(value, dict):
        raise _unexpected("options", value, "an object with A, B, C and D")
    named = {key.strip(" ().:").upper(): option for key, option in value.items()}
    options = _unlabelled([_text(named, letter) for letter in LETTERS])
    if len({" ".join(option.casefold().split()) for option in options}) < len(LETTERS):
        raise _unexpected("options", options, "four different texts")
    return options


def _unlabelled(options: list[str]) -> list[str]:
    """Options are shuffled before they are shown, so that letters of their own would mislead."""
    found = [re.match(_LABELLED.format(letter=letter), o) for letter, o in zip(LETTERS, options, strict=True)]
    return [match[1] for match in found if match] if all(found) else options


def _text(written: dict[str, Any], name: str) -> str:
    """A field as text, not empty."""
    text = str(_value(written, name))
    if not text:
        raise _unexpected(name, text, "a text that is not empty")
    return text


def _value(written: dict[str, Any], name: str) -> str | int | float:
    """A field that is a text, a number, or a list of just one of them."""
    value = written.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _unexpected(name, value, "a text or a number")
    # Escapes in JSON bring back what was dropped from the text around it.
    return _CONTROL.sub("", value).strip() if isinstance(value, str) else value


def _unexpected(
    name: str, value: object, expected: str, status: ProposalStatus = ProposalStatus.BAD_FORMAT
) -> _Refused:
    shown = repr(value)
    return _Refused(status, f"{name}: got {shown if len(shown) <= 80 else shown[:77] + '...'}; expected {expected}")
