"""The folder of a run: configuration, metrics, samples, checkpoints.

A commit is one rename. Rows are appended to metrics and samples as steps end; a checkpoint records how long
those files were, and whoever continues the run cuts them back to that length first. So a process may be
killed at any moment, and every step is in metrics.jsonl once.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from protocols.errors import BadInput, Corrupt
from protocols.service import Message

JOURNALS = ("metrics.jsonl", "samples.jsonl", "timings.jsonl")


class Manifest(Message):
    """What a checkpoint holds, written last."""

    step: int
    """The step that it was made after."""
    finished: str = ""
    """Why the run ended with this step, if it did so early."""
    journals: dict[str, int]
    """Length of each journal in bytes, as of this step."""
    files: dict[str, str]
    """SHA-256 of every other file, by relative path."""


class RunDirectory:
    """One run on disk. Only one process at a time may hold it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: TextIO | None = None

    def claim(self, config: Mapping[str, Any], may_change: Iterable[str]) -> None:
        """Hold the folder if there is one already; a new one is not made yet.

        Raises BadInput if it belongs to another configuration, is no run, is held by another process or cannot
        be written to.
        """
        nearest = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise BadInput(f"runs_dir: {nearest} is not a folder that can be written to")
        file = self.path / "config.yaml"
        if file.is_file():
            check_same_config(file, config, may_change)
            self._acquire()
        # Hidden files are what a run leaves that was killed before it had its config.yaml.
        elif nearest == self.path and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise BadInput(f"run: {self.path} exists and is not a run (no config.yaml); choose another run=")

    def open(self, config: Mapping[str, Any], may_change: Iterable[str]) -> bool:
        """Create the folder, or take over one with the same configuration. Returns whether it is new.

        Raises BadInput as `claim` does.
        """
        self.claim(config, may_change)
        new = not (self.path / "config.yaml").is_file()
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        write_atomically(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        return new

    def _acquire(self) -> None:
        if self._lock is not None:
            return
        lock = open(self.path / ".lock", "w")  # noqa: SIM115  held as long as the run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise BadInput(f"run: {self.path} is in use by another process; choose another run=") from None
        self._lock = lock

    def discard(self) -> None:
        """Remove the folder of a run that could not start."""
        self.close()
        shutil.rmtree(self.path)

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append(self, journal: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a journal, one JSON object per line."""
        # A lone surrogate in some text has no UTF-8 form, but a JSON escape, which is the backslash's.
        with open(self.path / journal, "a", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows:
                file.write(json.dumps(_finite(row), ensure_ascii=False) + "\n")

    def latest(self) -> Path | None:
        """The last complete checkpoint."""
        complete = [p for p in self._all() if (p / "manifest.json").is_file()]
        return complete[-1] if complete else None

    def _all(self) -> list[Path]:
        """The folders of checkpoints in order of steps, also of one that was being removed."""
        found = [p for p in self.checkpoints.glob("step-*") if p.name.removeprefix("step-").lstrip("-").isdecimal()]
        return sorted(found, key=step_of)

    def begin_checkpoint(self) -> Path:
        """An empty folder to write a checkpoint into; what an interrupted one left behind is removed."""
        staging = self.checkpoints / ".staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        return staging

    def ahead(self, step: int) -> Path:
        """Where actors write down what they were when the rollouts of a step were done; may not exist."""
        return self.checkpoints / ".ahead" / f"step-{step}"

    def forget_ahead(self, step: int | None = None) -> None:
        """Remove what is there for a step, or for all: then rollouts that were never trained on have left it."""
        all_of_them = self.checkpoints / ".ahead"
        shutil.rmtree(all_of_them if step is None else self.ahead(step), ignore_errors=True)
        with contextlib.suppress(OSError):  # others are there still, or none ever were
            all_of_them.rmdir()

    def commit(self, staging: Path, step: int, finished: str, keep: int) -> Path:
        """Make a written checkpoint the latest, in one rename, and remove all but the last `keep`."""
        journals = {name: self._flushed_size(name) for name in JOURNALS}
        files = {str(p.relative_to(staging)): _digest(p) for p in sorted(staging.rglob("*")) if p.is_file()}
        manifest = Manifest(step=step, finished=finished, journals=journals, files=files)
        write_atomically(staging / "manifest.json", manifest.model_dump_json(indent=1))
        target = self.checkpoints / f"step-{step:06d}"
        os.rename(staging, target)
        _sync(self.checkpoints)
        for old in self._all()[:-keep]:
            shutil.rmtree(old)
        return target

    def _flushed_size(self, journal: str) -> int:
        file = self.path / journal
        if not file.exists():
            return 0
        _sync(file)
        return file.stat().st_size

    def rewind(self, manifest: Manifest | None) -> None:
        """Cut the journals back to a checkpoint, or to nothing. Raises Corrupt if one lacks committed rows."""
        lengths = manifest.journals if manifest else {}
        for journal in JOURNALS:
            file, length = self.path / journal, lengths.get(journal, 0)
            found = file.stat().st_size if file.exists() else 0
            if found < length:
                raise Corrupt(
                    f"{file} has {found} bytes, but {length} are committed; restore it, or choose another run="
                )
            if found > length:
                os.truncate(file, length)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises Corrupt that names the damaged file.
    """
    try:
        manifest = Manifest.model_validate_json((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise Corrupt(f"{checkpoint}/manifest.json is damaged: {error}") from error
    for name, digest in manifest.files.items():
        file = checkpoint / name
        if not file.is_file() or _digest(file) != digest:
            raise Corrupt(
                f"{file} is damaged or missing; remove the folder {checkpoint} to continue from the one before"
            )
    return manifest


def held(folder: Path) -> bool:
    """Whether some process holds the run in a folder."""
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def check_same_config(file: Path, config: Mapping[str, Any], may_change: Iterable[str]) -> None:
    """Raise BadInput that names the first key in which the configuration differs from the saved one."""
    free = tuple(f"{name}." for name in may_change)
    old, new = flatten(_read_config(file)), flatten(dict(config))
    for key in sorted(old.keys() | new.keys()):
        if not f"{key}.".startswith(free) and old.get(key) != new.get(key):
            raise BadInput(
                f"run: {file.parent} was made with {key}={old.get(key)!r}, now it is {new.get(key)!r};"
                " choose another run=, or give it the old value"
            )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Corrupt(f"{file} is damaged: {error}") from error
    except yaml.YAMLError as error:
        raise Corrupt(f"{file} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(saved, dict):
        raise Corrupt(f"{file} is damaged: expected keys with values")
    return saved


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    parts = (flatten(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, file)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity; they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
