"""Which sampled texts a report shows: a bounded choice from samples.jsonl, read without holding the file."""

import json
import math
import statistics
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, TypeVar

MOST_SAMPLES = 600
MOST_BYTES = 4_000_000
PER_STEP = 20
"""With more samples than `MOST_SAMPLES`, a step shows about this many, so that about 30 steps are shown."""
LONGEST_TEXT = 20_000
"""Longer texts lose their middle, and are cut shorter still while the choice is over `MOST_BYTES`."""

TOKEN_CHARS = 5
"""A token with a value counts as at least so many characters: `LONGEST_TEXT` is 4,000 tokens at most."""
LARGEST_VALUE = 1e100
"""Beyond it a number is no score of a token; within it means and distances stay finite."""

Scalar = str | int | float | bool | None
Sample = dict[str, Scalar | list[str] | list[float | None] | list[bool | None]]
"""A row of the page. Only `tokens`, `values` and `marks` may be lists, and then they belong together."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Samples:
    """The chosen rows, in the order of the file, and what they were chosen from."""

    rows: list[Sample] = field(default_factory=list)
    total: int = 0
    steps: int = 0
    total_steps: int = 0
    unreadable: int = 0
    """Lines that are no JSON object; the last line of a killed run is one."""
    longest_text: int = LONGEST_TEXT
    """Texts of more characters than this are shown without their middle."""

    @property
    def json(self) -> str:
        """The rows as JSON that is safe inside a script element, whatever the texts contain."""
        text = json.dumps(self.rows, ensure_ascii=False, separators=(",", ":"))
        for char in "<>&\u2028\u2029":
            text = text.replace(char, f"\\u{ord(char):04x}")
        return text


@dataclass(frozen=True)
class TokenValues:
    """A reply in tokens with a value each, the lists equally long; no colour at `middle`, full at `scale` from it."""

    tokens: list[str]
    values: list[float | None]
    marks: list[bool | None] | None
    middle: float
    scale: float

    def fields(self, longest: int) -> Sample:
        """The page's fields: of a long reply without its middle, and none where even its ends are too long."""
        costs = [max(TOKEN_CHARS, len(token)) for token in self.tokens]
        if sum(costs) <= longest:
            head, tail = len(costs), 0
        else:
            head = bisect_right(list(accumulate(costs)), longest * 2 // 3)
            tail = bisect_right(list(accumulate(reversed(costs))), longest // 3)
        if not head + tail:
            return {}
        notice = f"\n[… {len(costs) - head - tail:,} tokens left out …]\n"
        marks: Sample = {} if self.marks is None else {"marks": _ends(self.marks, head, tail, None)}
        return marks | {
            "tokens": _ends(self.tokens, head, tail, notice),
            "values": _ends(self.values, head, tail, None),
            "middle": self.middle,
            "scale": self.scale,
        }


def token_values(row: dict[str, object]) -> TokenValues | None:
    """What a row says about its reply's tokens, or None where it says nothing or nothing sound.

    `tokens` [str] and `values` [number | null], a higher one being better, have to be of equal length; `marks`
    [bool | null] may be a third. `middle` is the mean of the values and `scale` their largest distance from it,
    unless the row holds finite numbers of these names. Numbers keep the seven digits of a 32-bit float.
    """
    tokens, given = row.get("tokens"), row.get("values")
    if not (isinstance(tokens, list) and isinstance(given, list) and len(tokens) == len(given)):
        return None
    values = [_number(value) for value in given]
    numbers = [value for value in values if value is not None]
    # NaN, an infinity or a text among the values is a fault of the run that a colour would hide.
    sound = len(numbers) == sum(value is not None for value in given)
    if not (numbers and sound and all(isinstance(token, str) for token in tokens)):
        return None
    middle = _number(row.get("middle"))
    if middle is None:
        # Rounded like the values: else the mean of equal ones may differ from them in its last bit.
        middle = _rounded(statistics.fmean(numbers))
    scale = _number(row.get("scale"))
    if scale is None or scale <= 0:
        scale = _rounded(max(abs(value - middle) for value in numbers))
    return TokenValues(tokens, values, _marks(row.get("marks"), len(tokens)), middle, scale)


def choose_samples(path: Path, most: int = MOST_SAMPLES, most_bytes: int = MOST_BYTES) -> Samples:
    """First and last step and evenly spaced ones between; of each step, questions with all their roles."""
    if not path.is_file():
        return Samples()
    with path.open("rb") as file:
        places, unreadable = _places(file)
        counts = {step: len(offsets) for step, offsets in places.items()}
        steps = _chosen_steps(counts, most)
        quota = most // max(1, len(steps)) if sum(counts.values()) > most else most
        rows = [row for step in steps for row in _chosen_rows(_read(file, places[step]), quota)]
    shown, longest = _fit(rows, most_bytes)
    return Samples(shown, sum(counts.values()), len(steps), len(counts), unreadable, longest)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _places(file: BinaryIO) -> tuple[dict[int, "array[int]"], int]:
    """Step -> where its lines begin; and the number of lines that cannot be read."""
    places: dict[int, array[int]] = {}
    unreadable = offset = 0
    for line in file:
        row = _parsed(line)
        if row is not None:
            step = row.get("step")
            places.setdefault(step if isinstance(step, int) else 0, array("q")).append(offset)
        elif line.strip():
            unreadable += 1
        offset += len(line)
    return places, unreadable


def _parsed(line: bytes) -> dict[str, object] | None:
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _read(file: BinaryIO, offsets: "array[int]") -> list[dict[str, object]]:
    rows = []
    for offset in offsets:
        file.seek(offset)
        row = _parsed(file.readline())
        if row is not None:
            rows.append(row)
    return rows


def _chosen_steps(counts: dict[int, int], most: int) -> list[int]:
    steps = sorted(counts)
    if sum(counts.values()) <= most:
        return steps
    typical = max(1, min(PER_STEP, round(statistics.median(counts.values()))))
    return spread(steps, max(2, most // typical))


def _chosen_rows(rows: list[dict[str, object]], quota: int) -> list[dict[str, object]]:
    """Up to `quota` rows of one step: of many questions few samples of each role, before more of the same."""
    order: dict[object, int] = {}
    seen: dict[tuple[object, object], int] = {}
    ranked = []
    for index, row in enumerate(rows):
        uid = str(row.get("uid", index))
        number = order.setdefault(uid, len(order))
        role = (uid, str(row.get("role")))
        seen[role] = seen.get(role, 0) + 1
        # Multiples of the golden ratio spread the questions over the step, however many are taken.
        ranked.append(((seen[role] - 1) // 2, number * 0.6180339887 % 1, index))
    return [rows[index] for index in sorted(index for _, _, index in sorted(ranked)[:quota])]


def _fit(rows: list[dict[str, object]], most_bytes: int) -> tuple[list[Sample], int]:
    """Shorten texts, then drop rows, until the JSON is small enough."""
    longest = LONGEST_TEXT
    parsed = [(row, token_values(row)) for row in rows]
    while True:
        clean = [_shown(row, reply, longest) for row, reply in parsed]
        if len(clean) < 2 or len(Samples(clean).json.encode("utf-8", errors="replace")) <= most_bytes:
            return clean, longest
        if longest > 500:
            longest //= 2
        else:
            parsed = parsed[::2]


def _shown(row: dict[str, object], reply: TokenValues | None, longest: int) -> Sample:
    sample: Sample = {key: _clean(value, longest) for key, value in row.items()}
    fields = reply.fields(longest) if reply else {}
    if reply and fields and row.get("output") is None:
        # The viewer searches this text, and puts the tokens in its place.
        sample["output"] = _clean("".join(reply.tokens), longest)
    return sample | fields


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return _rounded(value) if abs(value) <= LARGEST_VALUE else None


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def _marks(marks: object, count: int) -> list[bool | None] | None:
    if not isinstance(marks, list) or len(marks) != count:
        return None
    return marks if all(mark is None or isinstance(mark, bool) for mark in marks) else None


def _ends(items: list[Item], head: int, tail: int, between: Item) -> list[Item]:
    """The first and the last items, with one in place of those left out, if there are any."""
    if head + tail == len(items):
        return items
    return [*items[:head], between, *items[len(items) - tail :]]


def _clean(value: object, longest: int) -> Scalar:
    """A scalar that JSON knows; lists and objects become text, and long texts lose their middle."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest // 3
    return f"{text[:head]}\n[… {len(text) - head - tail:,} characters left out …]\n{text[-tail:]}"
