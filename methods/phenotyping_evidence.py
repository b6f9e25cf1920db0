"""From a patient's notes to the questions that are asked: filters, copies put together, a cap (2.3 and 2.4)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date

from pydantic import Field

from methods.phenotyping_definition import Definition
from methods.phenotyping_scan import Finding, Scanned
from protocols.service import Message

MARKS = re.compile(r"[\W_]+")
ENDS = re.compile(r"[.!?\n]")
STOPS = re.compile(r"[,;:]")
"""Marks that may be told apart by nobody; a sign such as (+) says something."""


class EvidenceConfig(Message):
    """Which snippets are asked about."""

    jaccard: float = Field(default=0.9, gt=0)
    """Snippets of a patient whose sets of three words in a row overlap by this share are one; above 1: none are,
    exact copies included."""
    most: int = Field(default=64, ge=1)
    """Most questions per patient and phenotype: from each note one first, the latest notes before others."""
    letters: int = Field(default=20, ge=0)
    """Snippets of fewer letters are not asked about."""


@dataclass
class Group:
    """Copies of one snippet in a patient's notes; the earliest stands for all."""

    note: Scanned
    finding: Finding
    also_in: list[tuple[Scanned, Finding]] = field(default_factory=list)
    days_before: int | None = None
    """Days from its note to the patient's last one; unknown without dates."""

    @property
    def day(self) -> str:
        """Of the earliest copy."""
        return self.note.date


@dataclass(frozen=True)
class Evidence:
    """What there is about one patient and phenotype."""

    groups: list[Group]
    """Oldest first."""
    found: int
    """Snippets before filters, copies included."""
    dropped: dict[str, int]
    """Snippets that were left out, by reason, copies included."""
    different: int
    """Groups, those beyond the cap included."""


def current(notes: Sequence[Scanned]) -> tuple[list[Scanned], set[str]]:
    """A patient's notes without replaced and repeated ones, and ids that stand for different texts, all of which are
    kept."""
    replaced = {name for note in notes for name in note.replaces}
    seen: dict[str, set[str]] = {}
    kept = []
    # Of equal notes the first of the order stays, in whichever order they were read.
    for note in sorted(notes, key=order_of):
        digests = seen.setdefault(note.note_id, set())
        if note.note_id in replaced or note.digest in digests:
            continue
        digests.add(note.digest)
        kept.append(note)
    return kept, {name for name, digests in seen.items() if len(digests) > 1}


def evidence_of(notes: Sequence[Scanned], definition: Definition, config: EvidenceConfig) -> Evidence:
    """What is asked about a patient; the order of notes does not matter."""
    last = max((day for note in notes if (day := day_of(note.date))), default=None)
    dropped: dict[str, int] = {}
    kept: list[tuple[Scanned, Finding]] = []
    found = 0
    for note in sorted(notes, key=order_of):
        for finding in note.findings:
            if finding.set != definition.phenotype_id:
                continue
            found += 1
            reason = refusal(note, finding, definition, last, config.letters)
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
            else:
                kept.append((note, finding))
    groups = grouped(kept, config.jaccard)
    for group in groups:
        own = day_of(group.note.date)
        group.days_before = (last - own).days if last and own else None
    sent = capped(groups, config.most)
    if len(groups) > len(sent):
        dropped["beyond the cap"] = snippets_in(groups) - snippets_in(sent)
    return Evidence(sent, found, dropped, len(groups))


def snippets_in(groups: Sequence[Group]) -> int:
    """How many snippets groups stand for."""
    return sum(1 + len(group.also_in) for group in groups)


def order_of(note: Scanned) -> tuple[str, ...]:
    """Oldest first; undated notes at the beginning."""
    return note.date, note.note_id, note.digest, note.note_type, note.encounter_id


def day_of(text: str) -> date | None:
    """The day of a date or time; None if it is none."""
    try:
        return date.fromisoformat(text[:10])
    except ValueError:
        return None


def refusal(note: Scanned, finding: Finding, definition: Definition, last: date | None, letters: int) -> str:
    """Why a snippet is not asked about; empty if it is."""
    day = day_of(note.date)
    if definition.lookback_days is not None and day and last and (last - day).days > definition.lookback_days:
        return "before the lookback"
    if definition.note_types and note.note_type not in definition.note_types:
        return "note type"
    if definition.skips(finding.section):
        return "section"
    if sum(letter.isalpha() for letter in finding.text) < letters:
        return "too short"
    return ""


def normalised(text: str) -> str:
    """In small letters, with single blanks for white space and punctuation; digits stay."""
    return MARKS.sub(" ", text.casefold()).strip()


def trigrams(text: str) -> frozenset[tuple[str, ...]]:
    """Three words in a row, of a text that is normalised; a shorter one as a whole."""
    words = text.split()
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Size of the intersection over that of the union."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def grouped(snippets: Iterable[tuple[Scanned, Finding]], least: float) -> list[Group]:
    """Each snippet joins the first group whose own one it nearly repeats, under the same header as far as headers are
    known, and with the same words in the sentences of its matches: a single `no` is no near copy. With `least` above
    1 all stay apart."""
    groups: list[tuple[Group, str, frozenset[tuple[str, ...]]]] = []
    exact: dict[tuple[str, ...], list[tuple[Group, str, frozenset[tuple[str, ...]]]]] = {}
    for note, finding in snippets:
        header, shape = normalised(finding.section), trigrams(normalised(finding.text))
        same = exact.setdefault(sentences_of(finding), [])
        home = None
        if least <= 1:
            home = next((g for g, h, s in same if same_header(h, header) and alike(s, shape, least)), None)
        if home is None:
            home = Group(note, finding)
            groups.append((home, header, shape))
            same.append(groups[-1])
        else:
            home.also_in.append((note, finding))
    return [group for group, _, _ in groups]


def sentences_of(finding: Finding) -> tuple[str, ...]:
    """The sentence of each match as far as the snippet has it, in small letters, with its signs and single blanks."""
    found = []
    for start, end in finding.matches:
        before = ENDS.split(finding.text[: start - finding.start])[-1]
        after = ENDS.split(finding.text[end - finding.start :])[0]
        told = f"{before}{finding.text[start - finding.start : end - finding.start]}{after}".casefold()
        found.append(" ".join(STOPS.sub(" ", told).split()))
    return tuple(found)


def same_header(one: str, other: str) -> bool:
    """Whether two normalised headers may be the same; an unknown one may be any."""
    return not one or not other or one == other


def alike(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]], least: float) -> bool:
    """Whether two sets overlap by `least`; sizes tell most pairs apart."""
    small, large = sorted((len(one), len(other)))
    return small >= least * large and jaccard(one, other) >= least


def capped(groups: Sequence[Group], most: int) -> list[Group]:
    """At most so many groups, oldest first: the latest group of each note before others of the same note."""
    ranks: list[tuple[int, int]] = []
    taken: dict[str, int] = {}
    for place in range(len(groups) - 1, -1, -1):
        name = groups[place].note.note_id
        taken[name] = taken.get(name, 0) + 1
        ranks.append((taken[name], -place))
    return [groups[place] for place in sorted(-place for _, place in sorted(ranks)[:most])]
