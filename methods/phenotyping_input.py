"""What a run was begun with: the same command goes on with the same notes, definitions and model only."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.run_directory import write_atomically
from methods.phenotyping_decide import Origin
from methods.phenotyping_definition import Definition
from methods.phenotyping_parts import Part, files_in
from protocols.errors import BadInput

FILE = "input.json"


def input_of(parts: Sequence[Part], definitions: Sequence[Definition], origin: Origin) -> dict[str, dict[str, Any]]:
    """Size and time of the files, of many small ones a digest; digests of all else."""
    return {
        "notes": dict(map(pin_of, parts)),
        "definitions": {one.phenotype_id: one.digest for one in definitions},
        "policy.model": {origin.model: True},
        "deidentify": dict(origin.deidentified),
    }


def pin_of(part: Part) -> tuple[str, list[int] | str]:
    """Name of a part's notes, and what changes with them."""
    files = [one.file for one in files_in(part)]
    pins = [[one.st_size, one.st_mtime_ns] for one in map(os.stat, files)]
    if not part.others:
        return part.file, pins[0]
    digest = hashlib.sha256(json.dumps([files, pins]).encode()).hexdigest()
    return f"{files[0]} to {files[-1]} ({len(files)} files)", digest


def check_input(folder: Path, now: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise BadInput if the run in a folder was begun with something else."""
    if not (folder / FILE).is_file():
        return
    before = json.loads((folder / FILE).read_text(encoding="utf-8"))
    for what, values in now.items():
        # Runs from before there was such a part of the input had none of it.
        old = before.get(what, {})
        changed = [name for name in dict.fromkeys([*old, *values]) if old.get(name) != values.get(name)]
        if changed:
            raise BadInput(f"{what}: {changed[0]} has changed since the run began; choose another run=")


def keep_input(folder: Path, now: Mapping[str, Mapping[str, Any]]) -> None:
    """Write it down, if that has not been done."""
    if not (folder / FILE).is_file():
        write_atomically(folder / FILE, json.dumps({"id": uuid4().hex, **now}))


def id_of(folder: Path) -> str:
    """What tells a run from all others, also from one of the same name that is gone: answers say who asked."""
    return str(json.loads((folder / FILE).read_text(encoding="utf-8"))["id"])
