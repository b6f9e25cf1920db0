"""Final answers: finding them in replies, scoring them by rule, and checking them against the documents.

SPELL section 2.3 (parsers, rule score) with the repairs of section 4, items 3 to 5, and the third guard
against collusion of the same section: a check of references that does not use the weights.
"""

import re
import string
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cached_property
from typing import Literal

from actors.numbers import (
    Number,
    computable,
    days_apart,
    find_days,
    find_numbers,
    number_text,
    numbers_match,
    parse_number,
    rounding,
)
from protocols.questions import LETTERS, Task

Cover = Literal["tokens", "characters"]

MAX_EXTRA_WORDS = 20
"""A free answer may have this many words more than its reference (SPELL section 4, item 4)."""
FEWEST_QUOTED_WORDS = 3
"""Shorter quotations in a question need not stand in the documents."""

_MARKER = re.compile(r"\banswer\s+is\b[\s*]*:?", re.IGNORECASE)
_BOXED = re.compile(r"\bboxed\s*\{")
_DISPLAY = re.compile(r"(?:\s|\$\$|\\\[)*")
_BRACE = re.compile(r"[{}]")
_OPENERS = r"""[\s*_:"'“‘(\[{$\\]*+"""
_LETTER = re.compile(
    rf"(?:(?i:\banswer\s+is)\b|\bboxed\s*\{{){_OPENERS}"
    rf"(?:(?i:the|option|choice|letter|text|textbf|mathrm|mathbf)\b{_OPENERS}){{0,3}}"
    r"([A-D])(?![\w+#&/'’-])(?!\.[A-Za-z])"
)
_OUTER = string.whitespace + ".*`\"'“”‘’"
_PLACEHOLDER = re.compile(
    r"X(?:\W+where\b.*)?|(?i:[\[<{]+[^\[\]<>{}]*\b(?:answer|x|placeholder)\b[^\[\]<>{}]*[\]>}]+)"
)
_SENTENCE = {
    Task.GENERAL: "The correct answer is {answer}.",
    Task.MATH: "Therefore, the answer is {answer}.",
    Task.CHOICE: "The correct answer is {answer}.",
}

_ARTICLES = frozenset({"a", "an", "the"})
_TYPOGRAPHIC = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "‐": "-", "‑": "-", "–": "-", "−": "-", "—": " "}
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION = re.compile(
    r"\.(?![0-9])|(?<=[^\W0-9_])\.|-(?![0-9.$€£])|(?<=[\w)])-|"
    + "|".join(re.escape(mark) for mark in string.punctuation if mark not in ".-")
)
_NEGATIONS = frozenset({
    "not", "no", "never", "neither", "nor", "without", "except", "cannot", "cant", "isnt", "arent", "wasnt",
    "werent", "dont", "doesnt", "didnt", "wont", "wouldnt", "couldnt", "shouldnt", "hasnt", "havent",
    "hadnt",
})  # fmt: skip
_PREPOSITIONS = frozenset({
    "in", "on", "at", "by", "of", "from", "to", "for", "with", "about", "during",
})  # fmt: skip
_UNCHECKABLE = frozenset({
    "yes", "no", "true", "false", "none", "all", "both", "neither", "either", "same", "equal", "equally",
    "unchanged", "different", "higher", "lower", "more", "less", "greater", "smaller", "larger", "bigger",
    "fewer", "better", "worse", "longer", "shorter", "earlier", "later", "before", "after", "increase",
    "increased", "increases", "decrease", "decreased", "decreases", "rise", "rose", "fall", "fell", "up",
    "down", "of", "above", "it", "is", "was", "they", "them", "were", "than",
})  # fmt: skip
_QUOTED = re.compile(r'"(?!\s)([^"]+)(?<!\s)"')
_ENUMERATION = re.compile(r"[,;]\s|\s(?:and|or)\s")


def after_thinking(text: str) -> str | None:
    """What follows the last closing think tag; None if one was opened and not closed."""
    rest = text.rpartition("</think>")[2]
    return None if "<think>" in rest else rest


def parse_answer(task: Task, reply: str) -> str | None:
    """The final answer of a reply, or None (SPELL section 2.3; section 4, item 5).

    The last "answer is" counts, in any case and with or without a colon. Numbers are looked for in the last
    box first and keep their sign and unit, so that `parse_number` reads them. Letters must be capital and
    stand alone; a box counts like the sentence. A free answer is the first line after the sentence, without
    outer dots, blanks and quotes; a placeholder that nobody filled is none.
    """
    text = after_thinking(reply)
    if text is None:
        return None
    return {Task.GENERAL: _free, Task.MATH: _numeric, Task.CHOICE: _letter}[task](text)


def reference_sentence(task: Task, answer: str) -> str:
    """The sentence in which a reference is kept, so that `parse_answer` reads it like a reply.

    A reference that contains the answer sentence itself is read as what follows there, on both sides.
    """
    return _SENTENCE[task].format(answer=" ".join(answer.split()))


def normalize(text: str) -> str:
    """Lower case, without punctuation, the words a, an and the, and extra blanks (SPELL section 2.3, CEM).

    Typographic quotes, hyphens and minus signs count as their ASCII forms.
    """
    bare = text.translate(_TYPOGRAPHIC).translate(_NO_PUNCTUATION)
    return " ".join(word for word in bare.lower().split() if word not in _ARTICLES)


def covers(answer: str, reference: str, mode: Cover = "tokens") -> bool:
    """Whether an answer contains the reference; never the other way round (SPELL section 4, item 4).

    `characters` is the reference code's way: any substring of the normalised text. `tokens` wants a run of
    whole words, at most 20 words in the answer beyond it, and no negation right before it, be it with a
    preposition between ("not in Paris"). There decimal points and minus signs are kept, for 3.5 is not 35.
    """
    if mode == "characters":
        return bool(normalize(reference)) and normalize(reference) in normalize(answer)
    words, wanted = _words(answer), _words(reference)
    if not wanted or len(words) > len(wanted) + MAX_EXTRA_WORDS:
        return False
    return any(not _negated(words, start) for start in _runs(words, wanted))


def rule_score(task: Task, answer: str | None, reference: str, cover: Cover = "tokens") -> float:
    """R_rule of SPELL section 2.3: 1.0 if the rule of the task accepts a parsed answer, else 0.0."""
    if answer is None:
        return 0.0
    if task is Task.MATH:
        return float(numbers_match(answer, reference))
    if task is Task.CHOICE:
        return float(answer in LETTERS and answer == reference)
    return float(covers(answer, reference, cover))


def is_supported(task: Task, answer: str, paragraphs: Sequence[str]) -> bool:
    """Whether a reference occurs in the documents or follows from their numbers or dates by one step.

    SPELL section 4, collusion, item 3; `computable` lists the steps, and days between two dates are one
    more. Multiple choice passes the text of the right option. A free answer may also be a list whose parts
    are each supported. Yes, both, higher and the like cannot be checked so: they count as supported. The
    more numbers there are, the less this refuses; three digits follow from almost any 200 of them.
    """
    evidence = _Evidence(paragraphs)
    if evidence.supports(answer):
        return True
    if task is Task.MATH:
        return False
    parts = [part for part in _ENUMERATION.split(answer) if _words(part)]
    return _uncheckable(answer) or (len(parts) > 1 and all(map(evidence.supports, parts)))


def misquoted(question: str, paragraphs: Sequence[str]) -> list[str]:
    """Quotations in a question that stand in none of the documents: what it asks about is not there.

    Like `is_supported`, a check that does not use the weights. Only quotations of at least three words count,
    for shorter ones are often names or words in an unusual sense.
    """
    texts = [_joined(paragraph) for paragraph in paragraphs]
    quoted = _QUOTED.findall(question.translate(_TYPOGRAPHIC))
    long = [words for words in quoted if len(words.split()) >= FEWEST_QUOTED_WORDS]
    return [words for words in long if not any(_joined(words) in text for text in texts)]


class _Evidence:
    """Documents, read as words, numbers and dates when they are first asked for."""

    def __init__(self, paragraphs: Sequence[str]) -> None:
        self._paragraphs = paragraphs

    @cached_property
    def _texts(self) -> list[str]:
        return [_joined(paragraph) for paragraph in self._paragraphs]

    @cached_property
    def _numbers(self) -> list[Decimal]:
        return [number for paragraph in self._paragraphs for number in find_numbers(paragraph)]

    @cached_property
    def _days(self) -> list[int]:
        return [day for paragraph in self._paragraphs for day in find_days(paragraph)]

    def supports(self, answer: str) -> bool:
        """Whether it stands there, word by word, or is a number that follows."""
        words = _joined(answer)
        if words.strip() and any(words in text for text in self._texts):
            return True
        number = parse_number(answer)
        return number is not None and self._computes(number)

    def _computes(self, number: Number) -> bool:
        """Under each magnitude that its unit allows, exact to the last decimal place given."""
        half = rounding(number.value)
        return days_apart(number.full, self._days) or any(
            computable(number.value.scaleb(shift), self._numbers, float(half.scaleb(shift)))
            for shift in _shifts(number)
        )


def _shifts(number: Number) -> set[int]:
    """Powers of ten between a number as written and as a document may write it.

    Beside with and without its unit: a table in thousands has 1,234 where the answer is 1.234 million.
    """
    return {0, -2 * number.percent + number.scale, *range(0, number.scale, 3)}


def _joined(text: str) -> str:
    """The words between single blanks, with one at either end, so that `in` finds whole words only."""
    return f" {' '.join(_words(text))} "


def _words(text: str) -> list[str]:
    """Words as `normalize` has them, but with decimal points and minus signs of numbers."""
    bare = _PUNCTUATION.sub("", text.translate(_TYPOGRAPHIC))
    return [word for word in bare.lower().split() if word not in _ARTICLES]


def _runs(words: list[str], wanted: list[str]) -> Iterator[int]:
    """Where the wanted words start."""
    starts = range(len(words) - len(wanted) + 1)
    return (start for start in starts if words[start : start + len(wanted)] == wanted)


def _negated(words: list[str], start: int) -> bool:
    """Whether a negation stands before a word, up to prepositions between them."""
    before = start - 1
    while before >= 0 and words[before] in _PREPOSITIONS:
        before -= 1
    # "No. 5" is a name, not a negation.
    if before < 0 or (words[before] == "no" and words[start][0].isdigit()):
        return False
    return words[before] in _NEGATIONS


def _uncheckable(answer: str) -> bool:
    return bool(_words(answer)) and _UNCHECKABLE.issuperset(_words(answer))


def _tails(text: str) -> list[str]:
    """What follows each answer marker, up to the next."""
    return _MARKER.split(text)[1:]


def _free(text: str) -> str | None:
    lines = [line for tail in _tails(text)[-1:] for line in tail.strip(_OUTER).splitlines()]
    answer = lines[0].lstrip(_OUTER + ":").rstrip(_OUTER) if lines else ""
    return None if not answer or _PLACEHOLDER.fullmatch(answer) else answer


def _letter(text: str) -> str | None:
    letters = _LETTER.findall(text)
    return letters[-1] if letters else None


def _numeric(text: str) -> str | None:
    tails = [_DISPLAY.sub("", tail, count=1).partition("\n")[0] for tail in reversed(_tails(text))]
    found = (number_text(candidate) for candidate in [*_last_box(text), *tails])
    return next((number for number in found if number is not None), None)


def _last_box(text: str) -> list[str]:
    """What the last box holds, up to the brace that closes it; empty if there is none."""
    depth, boxes = 1, _BOXED.split(text)[1:]
    for brace in _BRACE.finditer(boxes[-1] if boxes else ""):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return [boxes[-1][: brace.start()]]
    return []
