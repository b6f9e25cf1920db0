"""Names of people in clinical text: those of a table, what stands after a title. There is no model of names: one
that stands in no table and after no title is not found."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import re2

from methods.phenotyping_identifiers import Edit, placeholder
from methods.phenotyping_notes import plain
from methods.phenotyping_tables import rows_of
from protocols.errors import BadInput

KIND = "name"
Spans = Sequence[tuple[int, int]]
"""First characters and the places behind the last, in order and apart."""
WORD = re.compile(r"[^\W\d_]+(?:[\u0300-\u036f]+[^\W\d_]*)*")
"""Letters, those of several characters too."""
LEAST = 3
"""Letters of a part of a name that is replaced where it stands alone."""
TITLE = re2.compile(
    r"\b(?:Mr|Mrs|Ms|Mx|Miss|Drs?|Prof|Professor)(?:\.[ \t\x{a0}]{0,2}|[ \t\x{a0}]{1,2})"
    r"|\b(?:DRS?|MRS|MISS|PROF|drs?|mrs|prof)\.[ \t\x{a0}]{0,2}"
    r"|(?:^|[.:;\n][ \t\x{a0}]{0,2}|,)(?:MR|MS|mr|ms)\.[ \t\x{a0}]{0,2}"
)
"""In capitals or small letters MR and MS are medicine as well, unless a sentence begins them."""
NAME_IS = re2.compile(
    r"(?im)\b(?:patient|pt)(?:'s)? (?:full )?name\s{0,2}[:=,]{1,2}[ \t\x{a0}]{0,3}"
    r"|^[ \t]{0,8}(?:name|patient|pt)[ \t]{0,2}:[ \t\x{a0}]{0,3}"
    r"|\b(?:signed|dictated|transcribed)[ \t]by[ \t]{0,2}:?[ \t\x{a0}]{0,3}"
    r"|\battending(?:[ \t]physician)?[ \t]{0,2}:[ \t\x{a0}]{0,3}"
)
"""What a name stands behind in the head or at the end of a note."""
LETTERS = r"\p{Lu}[\p{L}\p{M}'\x{2019}-]*"
SIGNED = re2.compile(
    rf"(?:^|[^\p{{L}}\p{{M}}])((?:{LETTERS}\.?[ \x{{a0}}]){{0,3}}{LETTERS}\.?)"
    r"(?:,[ \x{a0}]{0,2}(?:M\.?D|D\.?O|R\.?N|N\.?P|PA-C|Ph\.?D|LPN|CRNP|APRN|LCSW|PharmD)"
    r"|[ \x{a0}](?:M\.D|D\.O|MD|PA-C))"
    r"(?:\.|[^\p{L}\p{M}.-]|$)"
)
"""A name before what its bearer is."""
TOLD = re.compile(r"\W*(?:aware|notified|informed|made|paged|called|not|at|to|and|or)\b", re.IGNORECASE)
"""Behind somebody who is told of what stands before it."""
SENTENCE = re.compile(r"[^\W\d_]+ [a-z]")
"""One word with a capital, and more."""
VALVES = re.compile(r"\b(?:A[IRS]|M[RS]|T[RS]|P[IRS])\.\s*$")
"""Before MR. and MS. that are valves as well."""
AND = re.compile(r"(?:,| and| &) (?=[^\W\d_])")
"""Between the names of several doctors."""
TOKEN = re.compile(rf"{WORD.pattern}(?:['’-]{WORD.pattern})*")
BETWEEN = re.compile(r"\.?[ \u00a0]|\.(?=[^\W\d_])")
"""Between the words of a name that follows a title."""
HEADED = re.compile(r"\.?(?:,[ \u00a0]{0,2}|[ \u00a0]{1,2})")
"""Between those of one in the head of a note."""
MOST, MOST_HEADED, WORDS = 2, 3, 6
"""Full words of a name behind a title, those in the head of a note, and those with initials and particles."""
COLON = re.compile(r"[ \t\u00a0]?:")
PARTICLES = frozenset(
    ("van", "von", "der", "den", "de", "da", "di", "du", "del", "la", "le", "el", "al", "bin", "ibn", "ten")
)
NOT_NAMES = """
a about after again age alert all allergies also am an and any are as assessment at attending awake be been before
but by called came can care chief comments complains complaint consult could currently date dated denies diagnoses
diagnosis dictated did discussed dob does dose dr drs exam examination family feels female findings follow for from
had has have he her here him his history however i if impression in indication is it its labs last left male md
medications mild miss moderate mr mrn mrs ms my name negative no none normal not note now of on one only or our past
patient per physical physician plan please positive present presents primary procedure prof pt recommended reported
reports resident resting returned review right said saw seen severe sex she should signed since sitting sleeping so
social some stable stated states status than that the their them then there these they this those to today tomorrow
unchanged under unknown until was we well were what when where which while who will with without would yesterday you
your
"""
NO_NAME = frozenset(NOT_NAMES.split())
"""What stands behind a title without being a name."""
COMMON = """
ace april art august baker ball bank banks best bill bin black block blood bone bones born bow bright broad brown
burns bush cane case chance chase church clay close cold cook cope crane cross das day dean del den der des do dos
down early east english faith fall falls fish flood foot fox free french frost gamble game gates gay good grace gram
grant gray green grey hand hands hard hardy head heart high hill hood hope house hunt hurt ibn ice iii jack jan
jolly joy jr june key king knee lane large law leg less light little long love lump lung mace major man mark marks
may md mild minor moles moody moon more morning mouth neck need new night noble north oral orange pace page pain
parks pass pat peak penny phd pill pine place pool poor power price pride prior pulse quick rash ray read rice rich
ring rivers rod root rose rush salt sample san sands sharp ship short shot sick singer skin sky small smart snow
soft son sore south spear spring sr stack stage stay stern still stomach stone stool strain strange street strong
style summer sweet swift test tongue tooth true van vein von wall ward water waters way weeks weight well wells west
white wide wild will winter wise wood woods worth young
"""
EPONYMS = """
addison alzheimer apgar babinski baker barrett bell branch burkitt bypass charcot colles crohn cushing doppler down
drew dupuytren ewing fallot fields foley foster fournier fowler frank gleason glasgow gram graves guillain hartmann
hashimoto hickman hodgkin holter homan homans huntington kaposi kawasaki kussmaul lewy lyme mallory marfan meckel
miles murphy nissen paget parkinson raynaud romberg sjogren swan tanner trendelenburg turner valsalva vincent walker
wegener wernicke whipple wilms
"""
ALSO_WORDS = frozenset((*COMMON.split(), *EPONYMS.split()))
"""Parts of names that are everyday words, or diseases and tests are named by, as well: they are replaced beside
another part of the same name, and where they have a capital within a sentence."""
NO_PARTS = frozenset(("and", "or", "the", "for", "with"))
THINGS = re.compile(
    r"['’]?s?[ \u00a0-](?:disease|syndrome|sign|score|scale|criteria|catheter|cyst|fracture|disorder|lymphoma|sarcoma"
    r"|tumou?r|maneuver|manoeuvre|procedure|reflex|stain|palsy|chorea|contracture|thyroiditis|o?esophagus"
    r"|classification|phenomenon|murmur|dementia|ataxia|blocks?|stages?|staging|coma|granulomatosis|arteritis|fields?"
    r"|tests?|tube|line|grade|graft|bypass|operation|repair|law|index|ulcer|hernia|node|pump|valve|monitor|position"
    r"|gait|aid|exam|vein|artery|thyroid|anemia|anaemia|esophagitis|encephalopathy|contraction|paralysis)\b",
    re.IGNORECASE,
)
"""Behind somebody's name that a disease or a device has got."""
GAP = re.compile(r"[\s.,'’-]{1,3}")
"""Between two parts of one name."""


@dataclass
class Names:
    """Names by their parts, in small letters without accents."""

    parts: set[str] = field(default_factory=set)
    """Those that are replaced wherever they stand."""
    words: set[str] = field(default_factory=set)
    """Those that are everyday words as well."""
    every: set[str] = field(default_factory=set)
    """All parts, the shortest too."""
    pairs: set[tuple[str, str]] = field(default_factory=set)
    """Any two of one name, in either order."""

    def add(self, name: str) -> None:
        """One more name."""
        words = [word for match in WORD.finditer(name) if (word := folded(match.group())) not in NO_PARTS]
        self.every.update(words)
        long = {word for word in words if len(word) >= LEAST}
        self.parts |= long - ALSO_WORDS
        self.words |= long & ALSO_WORDS
        self.pairs.update((one, other) for one in words for other in words if one != other)


def read_names(path: str) -> dict[str, str]:
    """Names by patient, a line each, for sets of all of them would take a hundred times as much; those of nobody,
    such as of staff, count for all. Raises BadInput that names the line and shows no name."""
    found: dict[str, str] = {}
    for place, row in rows_of(path, "deidentify.names"):
        for column in ("patient_id", "name"):
            if column not in row:
                raise BadInput(f"deidentify.names: {place}: no column {column}; expected patient_id and name")
        name = " ".join(plain(row["name"]).split())
        if not WORD.search(name):
            raise BadInput(f"deidentify.names: {place}: name: expected letters")
        patient = plain(row["patient_id"]).strip()
        found[patient] = f"{found[patient]}\n{name}" if patient in found else name
    if not found:
        raise BadInput(f"deidentify.names: {path} holds no names; expected rows with patient_id and name")
    return found


@lru_cache(maxsize=64)
def names_of(told: str) -> Names:
    """Of names, a line each: a patient's notes mostly follow each other, and those of staff count for each."""
    names = Names()
    for name in told.split("\n"):
        names.add(name)
    return names


def folded(word: str) -> str:
    """In small letters, without accents."""
    if word.isascii():
        return word.lower()
    told = unicodedata.normalize("NFKD", word.casefold())
    return "".join(one for one in told if not unicodedata.combining(one))


Word = tuple[int, int, str]
"""First character and the place behind the last, and the word in small letters without accents."""


def names_in(text: str, known: Sequence[Names], kept: Spans = ()) -> Iterator[Edit]:
    """Names of tables, as whole words in any case; those of several parts as one piece. Nothing of what is kept."""
    words = [(match.start(), match.end(), folded(match.group())) for match in WORD.finditer(text)] if known else []
    for names in known:
        for i, (start, end, word) in enumerate(words):
            if word not in names.every or overlaps(kept, start, end):
                continue
            alone = word in names.parts or (word in names.words and within(text, start, end))
            if alone and not THINGS.match(text, end):
                yield Edit(start, end, KIND, placeholder(KIND))
            if (first := part_before(text, words, i, names)) is not None and not overlaps(kept, first, end):
                yield Edit(first, end, KIND, placeholder(KIND))


def overlaps(kept: Spans, start: int, end: int) -> bool:
    """Whether a piece of a text has a character in one of these."""
    i = bisect_right(kept, (start, 1 << 62))
    return (i > 0 and kept[i - 1][1] > start) or (i < len(kept) and kept[i][0] < end)


def part_before(text: str, words: Sequence[Word], i: int, names: Names) -> int | None:
    """Where another part of the same name begins before a word, perhaps with an initial between them."""
    for j in range(i - 1, max(-1, i - 3), -1):
        start, end, word = words[j]
        if not GAP.fullmatch(text, end, words[j + 1][0]):
            return None
        if (word, words[i][2]) in names.pairs:
            return start
        if len(word) > 1:
            return None
    return None


def within(text: str, start: int, end: int) -> bool:
    """Whether a word has a capital that no sentence and no title gives it."""
    before = text[max(0, start - 2) : start]
    return text[start:end].istitle() and before[1:] == " " and (before[0].islower() or before[0] == ",")


def titled(text: str, kept: Spans = ()) -> Iterator[Edit]:
    """What stands after a title, in the head of a note after `patient name:` and the like, or before MD. Nothing of
    what is kept."""
    for match in TITLE.finditer(text):
        title = match.group().strip(" \t\u00a0.,:;\n")
        if title.upper() in ("MR", "MS") and VALVES.search(text[max(0, match.start() - 8) : match.start() + 1]):
            continue
        at: int | None = match.end()
        while at is not None and (end := name_end(text, at, title, kept)) is not None:
            yield Edit(at, end, KIND, placeholder(KIND))
            more = AND.match(text, end) if title.lower() == "drs" else None
            at = more and more.end()
    for match in NAME_IS.finditer(text):
        end = name_end(text, match.end(), "", kept, HEADED)
        sure = " name" in match.group().lower()
        if end is not None and (sure or not SENTENCE.match(text, match.end(), end + 2)):
            yield Edit(match.end(), end, KIND, placeholder(KIND))
    for match in SIGNED.finditer(text):
        start, end = match.span(1)
        if (first := name_start(text, start, end, kept)) is not None and not TOLD.match(text, match.end() - 1):
            yield Edit(first, end, KIND, placeholder(KIND))


def name_start(text: str, start: int, end: int, kept: Spans) -> int | None:
    """Where a name begins that ends before what its bearer is, None if there is none; of capitals alone two words."""
    words: list[str] = []
    first = None
    for token in reversed(list(TOKEN.finditer(text, start, end))):
        word = token.group()
        known = len(word) > 1 and word.lower() in NO_NAME
        if known or overlaps(kept, *token.span()) or len(words) > MOST_HEADED:
            break
        words.append(word)
        first = token.start()
    loud = all(word.isupper() for word in words)
    alone = len(words) < 2 and (loud or not text[end:].startswith(","))
    return None if alone else first


def name_end(text: str, at: int, title: str, kept: Spans, between: re.Pattern[str] = BETWEEN) -> int | None:
    """Behind a name that begins here after a title, None if there is none.

    A title in capitals needs a name in capitals, and one in small letters has one word. In the head of a note a word
    with a colon begins something else.
    """
    end: int | None = None
    headed = between is HEADED
    full = 0
    for _ in range(WORDS):
        token = TOKEN.match(text, at)
        if token is None or overlaps(kept, *token.span()) or (headed and COLON.match(text, token.end())):
            break
        word = token.group().removesuffix("'s").removesuffix("’s")
        initial = (len(word) == 1 or word == "St") and text[token.end() : token.end() + 1] == "."
        if word not in PARTICLES:
            if not may_be_name(word, title, first=end is None, headed=headed, initial=initial):
                break
            end = token.start() + len(word)
            full += len(word) > 1 and not initial
            # Of capitals nobody can say where the name ends.
            if title.islower() or (not headed and word.isupper() and len(word) > 1):
                break
            if full == (MOST_HEADED if headed else MOST):
                break
        gap = between.match(text, token.end())
        if gap is None or (gap.group()[0] == "." and not initial):
            break
        at = gap.end()
    return end


def may_be_name(word: str, title: str, *, first: bool, headed: bool, initial: bool) -> bool:
    """Whether a word may be one of a name. `initial`: it is one letter with a point, or St."""
    if initial or (first and len(word) == 1):
        return word[0].isupper() or title.islower()
    if len(word) == 1:
        return headed and word.isupper()
    if word.lower() in NO_NAME:
        return False
    if title.islower() or title.isupper():
        return title.islower() or word.isupper()
    return word[0].isupper() and (first or headed or not word.isupper())
