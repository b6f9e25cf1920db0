"""Text that is on every machine: what the Python standard library says of itself, and generated text.

The embedded model learns to copy from it. Generated words, names, numbers and tables keep it from leaning on
English that it knows, so that it also copies from text unlike the library's.
"""

import random
import re
import string
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FEWEST_WORDS = 12
HELD_OUT_SHARE = 10
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
_SOUNDS = (
    "b bl br c ch cl d dr f fl g gr h j k l m n p ph pl pr qu r s sc sh sl sp st t th tr v w y z",
    "a e i o u ai ea ee ie oa oo ou",
    "- - - b ck d g l ll m n nd ng nt p r rd s st t x",
)
_ONSETS, _VOWELS, _CODAS = (sounds.replace("-", "").split(" ") for sounds in _SOUNDS)
_COMMON = "the of and to a in is that for it was with as by on he"
_MONTHS = "January February March April May June July August September October November December"


@dataclass(frozen=True)
class Library:
    """Paragraphs by module, training and held-out modules apart, and every word of the former."""

    training: list[list[str]]
    heldout: list[list[str]]
    words: list[str]


@cache
def library() -> Library:
    """All documentation of the standard library's modules that is at least a short paragraph long."""
    training: list[list[str]] = []
    heldout: list[list[str]] = []
    for name, text in _modules():
        apart = zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0
        (heldout if apart else training).append(_paragraphs(text))
    seen = {paragraph for module in training for paragraph in module}
    heldout = [[paragraph for paragraph in module if paragraph not in seen] for module in heldout]
    words = sorted({word for paragraph in seen for word in paragraph.split()})
    return Library([module for module in training if module], [module for module in heldout if module], words)


def _modules() -> Iterator[tuple[str, str]]:
    """Name and documentation of every module, and of every help topic of pydoc."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if not _LEFT_OUT.intersection(relative.parts):
            yield str(relative), _documentation(file)
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from sorted(topics.items())


def _documentation(file: Path) -> str:
    """Docstrings and block comments of a source file, separated by empty lines."""
    try:
        source = file.read_text("utf-8")
    except (OSError, ValueError):
        return ""
    texts = [textwrap.dedent(text) for text in re.findall(r'(?m)^[ \t]*[rR]?"""((?s:.)+?)"""', source)]
    blocks = re.findall(r"(?:^[ \t]*#[^\n]*\n){2,}", source, re.MULTILINE)
    texts += [re.sub(r"(?m)^[ \t]*#+!? ?", "", block) for block in blocks]
    return "\n\n".join(texts)


def _paragraphs(text: str) -> list[str]:
    """Paragraphs that are prose and not too short, each on one line."""
    flat = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part for part in flat if len(part.split()) >= FEWEST_WORDS and _is_prose(part)]


def _is_prose(text: str) -> bool:
    return ">>>" not in text and sum(c.isalpha() or c.isspace() for c in text) > 0.85 * len(text)


def documents(rng: random.Random, count: int, longest: int, *, heldout: bool = False) -> list[str]:
    """Passages of up to `longest` words that could be one cluster; training ones are also generated."""
    draw = rng.random()
    if heldout or draw < 0.6:
        return _library_documents(rng, count, longest, heldout)
    make = rng.choice((sentences, table, jumble))
    return [make(rng, _length(rng, longest)) for _ in range(count)]


def _length(rng: random.Random, longest: int) -> int:
    return rng.randint(min(10, longest), longest)


def _library_documents(rng: random.Random, count: int, longest: int, heldout: bool) -> list[str]:
    """Windows of consecutive paragraphs of one module."""
    modules = library().heldout if heldout else library().training
    paragraphs = rng.choice(modules)
    start = rng.randrange(len(paragraphs))
    words = " ".join(paragraphs[start : start + 4 * count]).split()
    found = []
    for _ in range(count):
        length = _length(rng, longest)
        found.append(" ".join(words[:length]))
        words = words[length:]
    return [text for text in found if len(text.split()) >= min(8, longest)] or found[:1]


def invented_word(rng: random.Random) -> str:
    """A word that is none, of one to four syllables."""
    syllables = rng.choice((1, 2, 2, 2, 3, 3, 4))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def number(rng: random.Random) -> str:
    """A number as reports write it: plain, with decimals, with commas."""
    kind = rng.random()
    if kind < 0.35:
        return str(rng.randint(1, 10 ** rng.randint(1, 5)))
    if kind < 0.6:
        return f"{rng.uniform(0.1, 10 ** rng.randint(0, 3)):.{rng.randint(1, 2)}f}"
    if kind < 0.75:
        return str(rng.randint(1900, 2030))
    return f"{rng.randint(1000, 10 ** rng.randint(4, 7)):,}"


def _date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1900, 2030)
    name = _MONTHS.split()[month - 1]
    return rng.choice((f"{year}-{month:02}-{day:02}", f"{day} {name} {year}", f"{name} {day}, {year}"))


def _word(rng: random.Random) -> str:
    word = invented_word(rng) if rng.random() < 0.4 else rng.choice(library().words)
    return word.capitalize() if rng.random() < 0.15 else word


def _figure(rng: random.Random) -> str:
    """A number with what may stand around it."""
    figure = number(rng)
    return rng.choice((figure, figure, figure, f"${figure}", f"{figure}%", f"({figure})", f"{figure} million"))


def sentences(rng: random.Random, words: int) -> str:
    """Sentences of common and invented words, with names, numbers and dates in them."""
    parts: list[str] = []
    while len(parts) < words:
        length = rng.randint(5, 18)
        sentence = [_slot(rng) for _ in range(length)]
        sentence[0] = sentence[0][:1].upper() + sentence[0][1:]
        sentence[-1] = sentence[-1].rstrip(string.punctuation) + rng.choice(".......?!;:")
        parts.extend(" ".join(sentence).split())
    return " ".join(parts[:words])


def _slot(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(_COMMON.split())
    if kind < 0.8:
        return _word(rng) + ("," if rng.random() < 0.12 else "")
    if kind < 0.88:
        return invented_word(rng).capitalize() + " " + invented_word(rng).capitalize()
    return _figure(rng) if kind < 0.96 else _date(rng)


def table(rng: random.Random, words: int) -> str:
    """Rows of a name and figures, with ` | ` between cells, after a line of headings."""
    columns = rng.randint(2, 4)
    cells = [str(rng.randint(1990, 2030)) if rng.random() < 0.7 else _word(rng) for _ in range(columns)]
    text = " | ".join(["", *cells])
    while len(text.split()) < words:
        name = " ".join(_word(rng) for _ in range(rng.randint(1, 4))).capitalize()
        figures = [_cell(rng) for _ in range(columns)]
        text += " " + " | ".join([name, *figures])
    return " ".join(text.split()[:words])


def _cell(rng: random.Random) -> str:
    figure = number(rng)
    return rng.choice((figure, figure, figure, f"$ {figure}", f"({figure})", f"{figure}%", "—", "-"))


def jumble(rng: random.Random, words: int) -> str:
    """Words without any order."""
    return " ".join(_word(rng) for _ in range(words))
