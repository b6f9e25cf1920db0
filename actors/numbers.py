"""Numbers in model text: their grammar, when two are the same, and what follows from the numbers of a text.

SPELL section 4, items 2 and 3: nothing is ever evaluated but one of + - * / between two numbers, in
Decimal arithmetic, and every input is bounded first, so that each call is done in well under 10 ms.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Context, Decimal, localcontext
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

MAX_CHARACTERS = 200
"""Longer texts are not numbers."""
RELATIVE_TOLERANCE = Decimal("0.0015")
"""How far an answer may be from the reference, as a share of the reference (SPELL section 2.3)."""
ABSOLUTE_TOLERANCE = Decimal("1e-9")
"""How far it may be from a reference of 0."""
LONGEST_RUN = 5
"""So many successive numbers of a text may be added up or averaged."""

_SCALES = {
    "hundred": 2, "thousand": 3, "k": 3, "lakh": 5, "million": 6, "mn": 6, "mm": 6, "m": 6,
    "crore": 7, "billion": 9, "bn": 9, "b": 9, "trillion": 12, "tn": 12,
}  # fmt: skip
_UNITS = (
    r"dollars?|euros?|pounds?|yen|rupees?|yuan|cents?|pence|usd|eur|gbp|jpy|inr|cny|rmb|us|"
    r"seconds?|minutes?|hours?|days?|weeks?|months?|quarters?|years?|times|shares?|units?|people|"
    r"employees|points?|basis|bps|per|p|x|[$€£¥₹]"
)
_SCALE = "|".join(f"{word}s?" for word in sorted(_SCALES, key=len, reverse=True))
_PERCENT = r"%|per ?cent(?:age)?(?![a-z])|pct(?![a-z])"
# Blanks are collapsed before matching and each pattern takes one at most: several optional runs side by
# side would take time that grows with a power of their length.
_TAIL = rf"(?: ?(?:{_PERCENT}|(?:{_SCALE}|{_UNITS})(?![a-z])))*"
_CURRENCY = r"(?:(?:(?:us|au|ca|nz|hk|[acs])?\$|[€£¥₹]|(?:usd|eur|gbp|jpy|inr|cny|rmb|rs\.?)(?![a-z])) ?)"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_PLAIN = rf"(?:{_DIGITS})(?:e[+-]?[0-9]{{1,2}}(?![0-9]))?"
_SIGN = r"(?:[+-] ?)"
_SIGNED = rf"(?:{_SIGN}?{_CURRENCY}?|{_CURRENCY}{_SIGN}){_PLAIN}{_TAIL}"
_ACCOUNTING = rf"{_CURRENCY}?\( ?(?:{_CURRENCY}?|-){_PLAIN}{_TAIL} ?\){_TAIL}"
_NUMBER = rf"(?:{_SIGNED}|{_ACCOUNTING})"
_OPERAND = rf"(?:{_SIGN}?{_CURRENCY}?{_PLAIN}|\( ?{_SIGN}?{_CURRENCY}?{_PLAIN} ?\))"
_FLAGS = re.ASCII | re.IGNORECASE

_SINGLE = re.compile(_NUMBER, _FLAGS)
_BINARY = re.compile(rf"(?P<left>{_OPERAND}) ?(?P<sign>[-+*/]) ?(?P<right>{_OPERAND})(?P<tail>{_TAIL})", _FLAGS)
_IN_TEXT = re.compile(rf"(?<![\w.,]){_NUMBER}(?!\w|[.,][0-9])", _FLAGS)
_NAMED = re.compile(rf"(?<![\w.,])(?:{_OPERAND} ?[-+*/] ?{_OPERAND}{_TAIL}|{_NUMBER})(?!\w|[.,][0-9])", _FLAGS)
_MORE_ARITHMETIC = re.compile(r" ?(?:[*/^]+|[-+]) ?[$(0-9.]")
_MAGNITUDE = re.compile(rf"({_PLAIN})", _FLAGS)
_PERCENT_SIGN = re.compile(_PERCENT, _FLAGS)
_SCALE_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SCALES)})s?(?![a-z])", _FLAGS)
_YEAR = re.compile(r"(?:19|20)[0-9]{2}")
_EQUALS = re.compile(r"[=≈]")

_ASCII = str.maketrans({
    "−": "-", "－": "-", "×": "*", "÷": "/", "％": "%", "＄": "$",
})  # fmt: skip
_LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
        (r"\\(?:times|cdot)(?![a-z])", "*"),
        (r"\\div(?![a-z])", "/"),
        (r"\\(?:left|right)(?![a-z])|\\[,;:! ()\[\]]", ""),
        (r"\{,\}", ","),
        (r"(?<![0-9)])\*\*|\*\*(?![0-9(])", ""),
        (r"\\([%$])", r"\1"),
        (r"^\s*[–‐‑](?=\s*[$€£0-9.])", "-"),
    ]
)
_MONTHS = [
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
]  # fmt: skip
_MONTH = "|".join(_MONTHS)
_DATES = (
    re.compile(r"(?<![\w-])(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})(?![\w-])", _FLAGS),
    re.compile(rf"\b(?P<day>[0-9]{{1,2}})\s+(?P<month>{_MONTH}),?\s+(?P<year>[0-9]{{4}})\b", _FLAGS),
    re.compile(rf"\b(?P<month>{_MONTH})\s+(?P<day>[0-9]{{1,2}}),?\s+(?P<year>[0-9]{{4}})\b", _FLAGS),
)

_OPERATIONS: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
    "+": Decimal.__add__, "-": Decimal.__sub__, "*": Decimal.__mul__, "/": Decimal.__truediv__,
}  # fmt: skip

# Enough digits for any sum of two numbers that the grammar lets through.
_EXACT = Context(prec=2 * MAX_CHARACTERS)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Number:
    """A number with what its unit says of its magnitude."""

    value: Decimal
    """As written, before percent sign and unit words."""
    percent: bool = False
    """Whether a percent sign or word follows."""
    scale: int = 0
    """Power of ten named by unit words such as thousand; 0 without any."""

    @property
    def bare(self) -> bool:
        """Whether nothing says of what magnitude it is."""
        return not self.percent and self.scale == 0

    @property
    def full(self) -> Decimal:
        """The value with percent and unit words applied: 12.5 % is 0.125, 2 thousand is 2000."""
        return self.value.scaleb(self.scale - 2 * self.percent, _EXACT)


def parse_number(text: str) -> Number | None:
    """Read a text that is one number, or two with one of + - * / between them; None if it is anything else.

    Knows signs, accounting parentheses, currency signs, thousands commas, decimals, exponents of at most two
    digits, percent and unit words, and the LaTeX that models put around numbers (SPELL section 4, item 2).
    """
    if len(text) > MAX_CHARACTERS:
        return None
    return _read(_plain(text))


def number_from(value: object) -> Number | None:
    """Read a JSON value: a text or a finite number. Anything else, a truth value too, is None."""
    if isinstance(value, str):
        return parse_number(value)
    # Python refuses to print very long integers.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 10**MAX_CHARACTERS:
        return None
    return parse_number(repr(value))


def number_text(text: str) -> str | None:
    """The number that an answer names, with its sign and unit: the whole text if it is one, else the first
    after the last equals sign, else the first. None without one, and if more arithmetic follows it.
    `parse_number` reads the result.
    """
    # A cut must not shorten a number.
    short = text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rpartition(" ")[0]
    plain = _plain(short)
    if _read(plain) is not None:
        return plain
    found = _NAMED.search(_EQUALS.split(plain)[-1]) or _NAMED.search(plain)
    if found is None or _MORE_ARITHMETIC.match(found.string, found.end()):
        return None
    named = _plain(found.group())
    return None if _read(named) is None else named


def numbers_match(answer: str, reference: str) -> bool:
    """Whether two texts are the same number, within 0.15 % of the reference (SPELL section 4, item 3).

    Signs count. If only one of them has a percent sign or unit words, the other may mean it with or without
    them: "12.5 %" is 0.125 and 12.5, but 12.5 is not 1250. Two bare years must be equal, for 2018 is within
    0.15 % of 2019. What is no number matches nothing. The reference code's "equal after rounding" is left
    out: it makes 0.0004 equal to 0.0001.
    """
    left, right = parse_number(answer), parse_number(reference)
    if left is None or right is None:
        return False
    if _YEAR.fullmatch(_plain(answer)) and _YEAR.fullmatch(_plain(reference)):
        return left == right
    return any(_close(a, b) for a, b in product(_readings(left, right), _readings(right, left)))


def find_numbers(text: str) -> list[Decimal]:
    """All numbers of a text in order; one with a percent sign or unit words as written, then in full."""
    plain = " ".join(text.translate(_ASCII).split())
    numbers = (_number(match.group()) for match in _IN_TEXT.finditer(plain))
    return [value for number in numbers for value in dict.fromkeys((number.value, number.full))]


def find_days(text: str) -> list[int]:
    """The dates of a text as day numbers, ascending: 2019-03-01, 1 March 2019 and March 1, 2019."""
    days = (_day(match) for pattern in _DATES for match in pattern.finditer(text))
    return sorted({day for day in days if day is not None})


def rounding(value: Decimal) -> Decimal:
    """Half a unit of the last decimal place: how far a rounded result may be from the exact one."""
    exponent = value.as_tuple().exponent
    return Decimal(5).scaleb(min(exponent, 0) - 1) if isinstance(exponent, int) else Decimal(0)


def computable(value: Decimal, numbers: Sequence[Decimal], tolerance: float) -> bool:
    """Whether a value is one of the numbers or follows from them, up to the absolute tolerance.

    Two numbers give sum, difference, product, quotient, mean, and quotient and relative change also in
    percent (SPELL section 4, collusion item 3); three to five successive ones, such as a table row, sum and
    mean. Signs of pairs are left out, since a text writes a loss without one, and so are zeros in pairs.
    O(M log M) for M numbers.
    """
    target, numbers_M = abs(float(value)), _floats(numbers)
    if not np.isfinite(target):
        return False
    slack = tolerance + 1e-9 * target
    low, high = max(target - slack, 0.0), target + slack
    values_M = np.sort(np.abs(numbers_M))
    if _any_within(values_M, low, high) or _any_run(numbers_M, low, high):
        return True
    values_M = values_M[values_M > 0]
    with np.errstate(all="ignore"):
        return any(_any_other(values_M, start_M, end_M) for start_M, end_M in _partners(values_M, low, high))


def days_apart(value: Decimal, days: Sequence[int]) -> bool:
    """Whether a value is the number of days between two dates, given as day numbers."""
    known = set(days)
    return value != 0 and any(day + abs(value) in known for day in days)


def _plain(text: str) -> str:
    """The text without LaTeX, emphasis and full stop, blanks collapsed."""
    plain = text.translate(_ASCII)
    for pattern, replacement in _LATEX:
        plain = pattern.sub(replacement, plain)
    return " ".join(plain.split()).lstrip(" *_`").rstrip(" *_`.$")


def _read(plain: str) -> Number | None:
    if _SINGLE.fullmatch(plain):
        return _number(plain)
    binary = _BINARY.fullmatch(plain)
    if binary is None:
        return None
    value = _operate(_value(binary["left"]), binary["sign"], _value(binary["right"]))
    return None if value is None else _with_units(value, binary["tail"])


def _number(matched: str) -> Number:
    """The number in a text that the grammar has accepted; parentheses make it negative."""
    head, _, tail = _MAGNITUDE.split(matched, maxsplit=1)
    value = _value(matched)
    return _with_units(-abs(value) if "(" in head else value, tail)


def _value(operand: str) -> Decimal:
    """The signed value of one operand; parentheses only group."""
    head, digits, _ = _MAGNITUDE.split(operand, maxsplit=1)
    value = Decimal(digits.replace(",", ""))
    return value.copy_negate() if "-" in head else value


def _with_units(value: Decimal, tail: str) -> Number:
    scale = sum(_SCALES[word.lower()] for word in _SCALE_WORD.findall(tail))
    return Number(value, percent=_PERCENT_SIGN.search(tail) is not None, scale=scale)


def _operate(left: Decimal, sign: str, right: Decimal) -> Decimal | None:
    if sign == "/" and not right:
        return None
    with localcontext(_EXACT):
        return _OPERATIONS[sign](left, right)


def _readings(number: Number, other: Number) -> tuple[Decimal, ...]:
    """What a number may mean beside another: without its unit only if the other has none."""
    return (number.full, number.value) if other.bare else (number.full,)


def _close(answer: Decimal, reference: Decimal) -> bool:
    with localcontext(_EXACT):
        allowed = RELATIVE_TOLERANCE * abs(reference) if reference else ABSOLUTE_TOLERANCE
        return abs(answer - reference) <= allowed


def _day(match: re.Match[str]) -> int | None:
    month = match["month"].lower()
    number = _MONTHS.index(month) + 1 if month in _MONTHS else int(month)
    try:
        return date(int(match["year"]), number, int(match["day"])).toordinal()
    except ValueError:
        return None


def _floats(numbers: Sequence[Decimal]) -> Floats:
    """The numbers that a float can hold, float64[M]."""
    numbers_M = np.array([float(number) for number in numbers], dtype=np.float64)
    finite: Floats = numbers_M[np.isfinite(numbers_M)]
    return finite


def _any_within(values_M: Floats, low: float, high: float) -> bool:
    return bool(np.any((values_M >= low) & (values_M <= high)))


def _any_run(numbers_M: Floats, low: float, high: float) -> bool:
    """Whether the sum or the mean of a few successive numbers lies in low..high, up to the sign."""
    for length in range(3, min(LONGEST_RUN, numbers_M.size) + 1):
        sums_M = np.abs(sliding_window_view(numbers_M, length).sum(axis=1))
        if _any_within(sums_M, low, high) or _any_within(sums_M / length, low, high):
            return True
    return False


def _partners(values_M: Floats, low: float, high: float) -> Iterator[tuple[Floats, Floats]]:
    """Per operation, where a second number would have to lie to give low..high: float64[M] twice."""
    yield low - values_M, high - values_M
    yield values_M + low, values_M + high
    yield low / values_M, high / values_M
    yield 2 * low - values_M, 2 * high - values_M
    for unit in (1.0, 100.0):
        yield values_M * (low / unit), values_M * (high / unit)
        yield values_M * (1 + low / unit), values_M * (1 + high / unit)
        yield values_M * (1 - high / unit), values_M * (1 - low / unit)


def _any_other(values_M: Floats, start_M: Floats, end_M: Floats) -> bool:
    """Whether any interval holds a number other than the one that it was made from."""
    count_M = np.searchsorted(values_M, end_M, "right") - np.searchsorted(values_M, start_M, "left")
    own_M = (start_M <= values_M) & (values_M <= end_M)
    return bool(np.any(count_M - own_M > 0))
