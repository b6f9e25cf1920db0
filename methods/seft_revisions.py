"""Revisions whose edits people accepted or rejected, as examples for SEFT's reviser (specification 5.2)."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from methods.seft_triples import Triple, words_of
from methods.worlds.documents import read_rows
from protocols.errors import BadInput, describe_validation_error
from protocols.messages import ChatMessage
from protocols.reviser import Label

WHAT = "revisions"
ASKED = "Improve this text."
"""What the user is taken to say: the rows have a text, and no prompt."""
NOBODY = "none"
"""The annotator of a run without a person: all of its edits count as accepted, and nobody judged them."""
MINOR_SHARE = 0.2
"""Up to this share of words in accepted edits a revision is minor."""


class Edit(BaseModel):
    """One proposed edit, and what the person said."""

    model_config = ConfigDict(extra="ignore", strict=True)

    before: str
    after: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)
    verdict: Literal["Accept", "Reject"]

    @property
    def accepted(self) -> bool:
        """Whether it became part of the text."""
        return self.verdict == "Accept"


class JudgedRevision(BaseModel):
    """{doc_id, annotator, depth, before, proposed, after_accepted, edits}: a row of the human-judged revisions."""

    model_config = ConfigDict(extra="ignore", strict=True)

    place: str = ""
    """File and line."""
    doc_id: str = Field(min_length=1)
    """The document; its rows are revised further and further, by several people."""
    annotator: str
    depth: int = Field(ge=1)
    before: str
    proposed: str
    after_accepted: str
    edits: list[Edit]

    @model_validator(mode="after")
    def _edits_lead_to_the_text(self) -> Self:
        if not self.before.strip():
            raise ValueError(f"before: got {self.before!r}; expected a text")
        text, behind = self.before, len(self.before)
        for i, edit in sorted(enumerate(self.edits), key=lambda one: (one[1].start, one[1].end), reverse=True):
            found = self.before[edit.start : edit.end]
            if edit.end > behind or found != edit.before:
                told = f"got {edit.start} to {edit.end}, where the text is {found[:40]!r}"
                expected = f"expected the place of {edit.before[:40]!r}, apart from other edits"
                raise ValueError(f"edits.{i}.start, end: {told}; {expected}")
            behind = edit.start
            if edit.accepted:
                text = text[: edit.start] + edit.after + text[edit.end :]
        if text != self.after_accepted:
            at = next(i for i in range(len(text) + 1) if text[: i + 1] != self.after_accepted[: i + 1])
            got, expected = self.after_accepted[at : at + 40], text[at : at + 40]
            raise ValueError(
                f"after_accepted: got {got!r} at character {at}; accepted edits lead to {expected!r} there"
            )
        return self


def read_revisions(files: Sequence[str]) -> Iterator[JudgedRevision]:
    """The rows of files, one by one. Raises BadInput that names file, line and field."""
    for file in files:
        for place, row in read_rows(Path(file).expanduser(), WHAT):
            try:
                yield JudgedRevision.model_validate(row | {"place": place})
            except ValidationError as error:
                raise BadInput(f"{WHAT}: {place}: {describe_validation_error(error)}") from error


def judged_by_people(rows: Iterable[JudgedRevision], dropped: Counter[str]) -> Iterator[JudgedRevision]:
    """Those that say what a person thinks and leave a text; the others are counted."""
    for row in rows:
        if row.annotator == NOBODY:
            # They would teach that whatever is proposed is right.
            dropped[f"{WHAT}: judged by nobody"] += 1
        elif not row.edits:
            dropped[f"{WHAT}: nothing was proposed"] += 1
        elif not row.after_accepted.strip():
            dropped[f"{WHAT}: nothing is left of the text"] += 1
        elif row.before == row.after_accepted and any(edit.accepted for edit in row.edits):
            dropped[f"{WHAT}: what was accepted changes nothing"] += 1
        else:
            yield row


def label_of(edits: Sequence[Edit], words: int) -> Label:
    """`no` if nothing was accepted; `minor` if the accepted edits are at most a fifth of a text of so many words.

    An edit is as long as the longer of what it takes out and puts in.
    """
    accepted = [max(len(words_of(edit.before)), len(words_of(edit.after))) for edit in edits if edit.accepted]
    if not accepted:
        return "no"
    return "minor" if sum(accepted) <= MINOR_SHARE * words else "major"


def triple_of(row: JudgedRevision) -> Triple:
    """The text as it was, to become what the person accepted.

    Each row is a source of its own, since what is best of a text is what this person made of it.
    """
    label = label_of(row.edits, len(words_of(row.before)))
    return Triple(
        id=row.place,
        source_id=row.place,
        messages=[ChatMessage(role="user", content=ASKED)],
        reply=row.before,
        label=label,
        target=row.after_accepted,
    )
