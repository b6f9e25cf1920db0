"""Preferences and prompts: read from files, with one clear error for each bad row, or made of sampled replies."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field

from methods.worlds.documents import read_rows
from protocols.errors import BadInput
from protocols.messages import ChatMessage, Prompt
from protocols.reward_model import Preference, Reply
from protocols.service import Message

EXCERPT = 80
Row = TypeVar("Row")


class Span(Message):
    """A place in a reply that is known to be right or wrong."""

    start: int = Field(ge=0)
    """First character."""
    end: int = Field(ge=0)
    """One after the last."""
    right: bool
    """Which of both."""


class Pair(Message):
    """Two replies to one instruction."""

    uid: str
    """Leads back to the file and its line."""
    instruction: str
    """What was asked."""
    chosen: str
    """The better reply."""
    rejected: str
    """The worse one."""
    spans_chosen: list[Span] = []
    """Known places of the better one."""
    spans_rejected: list[Span] = []
    """Known places of the worse one."""

    def preference(self) -> Preference:
        """As the reward model takes it."""
        chosen, rejected = (
            Reply(uid=f"{self.uid} {side}", prompt=prompt_of(self.instruction), text=text)
            for side, text in (("chosen", self.chosen), ("rejected", self.rejected))
        )
        return Preference(uid=self.uid, chosen=chosen, rejected=rejected)


class Task(Message):
    """One prompt of the policy, and what is right."""

    uid: str
    """Leads back to the file and its line."""
    instruction: str
    """What is asked."""
    reference: str
    """The right answer."""


@dataclass
class Rows(Generic[Row]):
    """Rows of a file, and how many were left out for which reason."""

    rows: list[Row] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def prompt_of(instruction: str, seed: int | None = None, uid: str = "") -> Prompt:
    """An instruction as a conversation."""
    return Prompt(messages=[ChatMessage(role="user", content=instruction)], seed=seed, uid=uid)


def read_pairs(path: Path) -> Rows[Pair]:
    """Pairs of a .jsonl or .jsonl.gz file.

    Rows whose replies are empty or equal are left out and counted. Raises BadInput that names file, line and field.
    """
    found = Rows[Pair]()
    for place, row in read_rows(path.expanduser(), "pairs"):
        chosen, rejected = (_first(row, name, place) for name in ("chosen", "rejected"))
        instruction = _text(row, "instruction", place)
        if not chosen.strip() or not rejected.strip():
            found.dropped["empty reply"] += 1
        elif chosen == rejected:
            found.dropped["chosen equals rejected"] += 1
        else:
            spans = {f"spans_{side}": _spans(row, f"eq_spans_{side}", place) for side in ("chosen", "rejected")}
            pair = Pair(uid=place, instruction=instruction, chosen=chosen, rejected=rejected, **spans)
            found.rows.append(pair)
    if not found.rows:
        raise BadInput(f"pairs: {path} holds no pair of two different replies")
    return found


def read_tasks(path: Path) -> Rows[Task]:
    """Prompts of a .jsonl or .jsonl.gz file, each once; those without an instruction or a label are left out.

    Raises BadInput that names file, line and field.
    """
    found, seen = Rows[Task](), set[str]()
    for place, row in read_rows(path.expanduser(), "prompts"):
        instruction, label = _text(row, "instruction", place), _text(row, "label", place)
        if not instruction.strip() or not label.strip():
            found.dropped["no instruction or label"] += 1
        elif instruction in seen:
            found.dropped["repeated"] += 1
        else:
            seen.add(instruction)
            found.rows.append(Task(uid=place, instruction=instruction, reference=label))
    if not found.rows:
        raise BadInput(f"prompts: {path} holds no prompt with a label")
    return found


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    if name not in row:
        raise BadInput(f"{place}: field {name}: required, but missing")
    value = row[name]
    if not isinstance(value, str):
        raise BadInput(f"{place}: field {name}: got {_short(value)}, expected text")
    return value


def _first(row: Mapping[str, Any], name: str, place: str) -> str:
    """A text, or the first of a list of texts."""
    value = row.get(name)
    if isinstance(value, list) and value:
        return _text({name: value[0]}, name, place)
    return _text(row, name, place)


def _spans(row: Mapping[str, Any], name: str, place: str) -> list[Span]:
    try:
        return [Span(start=start, end=end, right=right) for start, end, right in row.get(name) or []]
    except (TypeError, ValueError) as error:
        raise BadInput(f"{place}: field {name}: expected [start, end, right] for each place") from error


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as `read_pairs` reads them."""
    rows = (pair.model_dump(include={"instruction", "chosen", "rejected"}) for pair in pairs)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
