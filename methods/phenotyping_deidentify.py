"""The optional stage that takes identifiers out of notes before anything is cut from them (specification 3).

Patterns and lists, no model of names: docs/methods/phenotyping.md says what is left.
"""

import hashlib
import hmac
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from methods.phenotyping_fhir import raw_place
from methods.phenotyping_identifiers import Edit, identifiers, placeholder
from methods.phenotyping_names import Names, Spans, names_in, names_of, read_names, titled
from methods.phenotyping_notes import Note
from methods.phenotyping_shift import NEVER, dates
from protocols.errors import BadInput
from protocols.service import Message

LEAST_BYTES = 16
"""Of a secret."""
Places = tuple[tuple[int, int, int], ...]


class DeidentifyConfig(Message):
    """Whether identifiers are taken out of notes, and with what."""

    secret: str = ""
    """File of at least 16 random bytes, from which each patient's shift of dates is drawn. A run keeps a digest that
    tells secrets apart, never the secret."""
    names: str = ""
    """.csv or .jsonl with patient_id and name of people whose names are replaced in that patient's notes; without a
    patient_id, as of staff, in all."""
    days: int = Field(default=365, ge=1, le=36500)
    """Most days by which dates are moved, to either side; never by none."""

    @model_validator(mode="after")
    def _has_a_secret(self) -> Self:
        if not self.secret:
            raise ValueError("secret: missing; expected a file of random bytes")
        return self


@dataclass(frozen=True)
class Stage:
    """What notes are de-identified with."""

    days: int
    secret: bytes = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    """By patient, a line each."""
    digests: Mapping[str, str]
    """Of the secret, and of the table of names if there is one; made with the secret, so that they tell nothing of
    it or of names."""

    def days_of(self, patient_id: str) -> int:
        """By how many days the dates of a patient are moved."""
        drawn = int.from_bytes(keyed(self.secret, "days", patient_id.encode("utf-8", "surrogatepass")), "big")
        drawn %= 2 * self.days
        return drawn - self.days if drawn < self.days else drawn - self.days + 1

    def known(self, patient_id: str) -> list[Names]:
        """Names that are replaced in a patient's notes."""
        # Keys of the table are without blanks around them.
        return [names_of(self.names[key]) for key in dict.fromkeys(("", patient_id.strip())) if key in self.names]


def stage_of(config: DeidentifyConfig) -> Stage:
    """Read the secret and the names. Raises BadInput that names the field and the file."""
    secret = read_secret(config.secret)
    digests = {"secret": keyed(secret, "secret", b"").hex()[:16]}
    names: dict[str, str] = {}
    if config.names:
        names = read_names(config.names)
        digests["names"] = keyed(secret, "names", Path(config.names).expanduser().read_bytes()).hex()[:16]
    return Stage(config.days, secret, names, digests)


def read_secret(path: str) -> bytes:
    """The bytes of a file, without the end of its line. Raises BadInput."""
    try:
        secret = Path(path).expanduser().read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise BadInput(f"deidentify.secret: cannot read {path}: {error.strerror}") from error
    if len(secret) < LEAST_BYTES:
        got = f"has {len(secret)} bytes" if secret else "is empty"
        raise BadInput(f"deidentify.secret: {path} {got}; expected at least {LEAST_BYTES} random ones")
    return secret


def keyed(secret: bytes, what: str, told: bytes) -> bytes:
    """A digest that nobody can make without the secret; each use of it has a name."""
    return hmac.new(secret, what.encode() + b"\0" + told, hashlib.sha256).digest()


@lru_cache(maxsize=2)
def _stage(told: str) -> Stage:
    return stage_of(DeidentifyConfig.model_validate_json(told))


def kept_stage(config: DeidentifyConfig, digests: Mapping[str, str]) -> Stage:
    """The stage of a run, read once in each process that reads notes. Raises BadInput if its files are not those that
    the run began with."""
    stage = _stage(config.model_dump_json())
    if stage.digests != digests:
        _stage.cache_clear()
        stage = _stage(config.model_dump_json())
    for what in digests:
        if stage.digests.get(what) != digests[what]:
            raise BadInput(f"deidentify.{what}: {getattr(config, what)} has changed since the run began")
    return stage


def deidentified(note: Note, stage: Stage, replaced: Counter[str], kept: Spans = ()) -> Note:
    """The note without identifiers, which are counted. Its ids stay, and `raw_places` lead to where things stood.
    `kept`: where no name is looked for."""
    days = stage.days_of(note.patient_id)
    edits = edits_of(note.text, days, stage.known(note.patient_id), kept)
    replaced.update(edit.kind for edit in edits)
    text, places = edited(note.text, edits)
    return replace(
        note,
        text=text,
        date=moved_date(note.date, days),
        raw_places=composed(places, note.raw_places) if edits else note.raw_places,
    )


def moved_date(day: str, days: int) -> str:
    """YYYY-MM-DD, perhaps with a time, after so many days; empty where there is none, or no such day."""
    try:
        before = date.fromisoformat(day[:10])
        return "" if before.year == NEVER else (before + timedelta(days=days)).isoformat() + day[10:]
    except (ValueError, OverflowError):
        return ""


def edits_of(text: str, days: int, known: Sequence[Names], kept: Spans = ()) -> list[Edit]:
    """What is replaced, in order and apart."""
    return apart([*dates(text, days), *identifiers(text), *titled(text, kept), *names_in(text, known, kept)])


def apart(found: Iterable[Edit]) -> list[Edit]:
    """Those that begin first, the longest of them; what of others sticks out is replaced as well."""
    kept: list[Edit] = []
    end = 0
    for edit in sorted(found, key=lambda one: (one.start, -one.end)):
        if edit.start >= end:
            kept.append(edit)
        elif edit.end > end and kept[-1].text == placeholder(edit.kind):
            kept[-1] = replace(kept[-1], end=edit.end)
        elif edit.end > end:
            kept.append(Edit(end, edit.end, edit.kind, placeholder(edit.kind)))
        end = max(end, edit.end)
    return kept


def edited(text: str, edits: Sequence[Edit]) -> tuple[str, Places]:
    """The text after edits, and of each piece where it begins in it and in the text before, and where it ends there
    if it was replaced, or 0."""
    pieces: list[str] = []
    places: list[tuple[int, int, int]] = []
    length = at = 0
    for edit in [*edits, Edit(len(text), len(text), "", "")]:
        for piece, start, end in ((text[at : edit.start], at, 0), (edit.text, edit.start, edit.end)):
            if piece:
                places.append((length, start, end))
                pieces.append(piece)
                length += len(piece)
        at = edit.end
    return "".join(pieces), tuple(places)


def composed(outer: Places, inner: Places) -> Places:
    """Places of a text in a raw document by way of a text between them: `outer` leads to it, `inner` on from it."""
    if not inner:
        return outer
    found: list[tuple[int, int, int]] = []
    for i, (start, middle, end) in enumerate(outer):
        if end:
            found.append((start, raw_place(inner, middle), raw_place(inner, end, last=True)))
        else:
            behind = middle + outer[i + 1][0] - start if i + 1 < len(outer) else None
            found += [(start + at - middle, raw, last) for at, raw, last in cut(inner, middle, behind)]
    return tuple(found)


def cut(places: Places, start: int, end: int | None) -> Iterator[tuple[int, int, int]]:
    """The pieces of a text from a place to another, or to the end."""
    first = bisect_right(places, (start, 1 << 62, 0)) - 1
    for at, raw, last in places[first:]:
        if end is not None and at >= end:
            return
        begin = max(at, start)
        yield begin, raw if last else raw + begin - at, last
