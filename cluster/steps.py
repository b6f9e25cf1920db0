"""The step iterator: everything set in a step commits together, or not at all."""

import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.run_directory import RunDirectory, read_manifest, write_atomically
from cluster.seeds import derive_seed
from protocols.errors import Corrupt
from protocols.service import CheckpointRequest, Service

State = TypeVar("State", bound="LoopState")


class LoopState(BaseModel):
    """What a loop carries from step to step beside its actors: cursors, counters, moving averages."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    def take(self, other: "LoopState") -> None:
        """Take over all fields of another state of the same class."""
        for name in type(self).model_fields:
            setattr(self, name, getattr(other, name))


class Step:
    """One step of a loop."""

    def __init__(self, index: int, seed: int, show: Callable[[str], None]) -> None:
        self.index = index
        self._seed = seed
        self._show = show
        self.metrics: dict[str, float] = {}
        self.timings: dict[str, float] = {}
        self.rows: list[Mapping[str, Any]] = []
        self.tokens = 0
        self.finished = ""

    def seed(self, *names: str | int) -> int:
        """A seed for this step and purpose, the same whenever the step is repeated."""
        return derive_seed(self._seed, "step", self.index, *names)

    def rng(self, *names: str | int) -> np.random.Generator:
        """A generator for this step and purpose."""
        return np.random.default_rng(self.seed(*names))

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add values to the step's one row in metrics.jsonl. Never a wall-clock value: see `time`."""
        self.metrics.update(metrics)

    def time(self, timings: Mapping[str, float]) -> None:
        """Add values that differ between equal runs; they go to timings.jsonl."""
        self.timings.update(timings)

    def sampled(self, tokens: int) -> None:
        """Count sampled tokens; the display shows them per second."""
        self.tokens += tokens

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to samples.jsonl."""
        self.rows.extend(rows)

    def activity(self, text: str) -> None:
        """Show what is going on inside the step."""
        self._show(text)

    def stop(self, reason: str) -> None:
        """End the run with this step, which is committed."""
        self.finished = reason


async def steps(
    directory: RunDirectory,
    actors: Mapping[str, Service],
    state: LoopState,
    *,
    first: int,
    total: int,
    seed: int,
    checkpoint_every: int,
    keep: int,
    show: Callable[[str], None],
    on_commit: Callable[[Step], None],
    begun: dict[int, Step] | None = None,
    commit_first: bool = False,
) -> AsyncGenerator[Step, None]:
    """Yield the steps that are left, committing each when the loop comes back for the next.

    `begun`: steps that some work was done for before their turn; they are taken out of it. `commit_first`: commit
    before the first step too.
    """
    directory.forget_ahead()
    done, finished = await restore(directory, actors, state, first)
    if commit_first and directory.latest() is None:
        await commit(directory, actors, state, done, "", keep)
    for index in range(done + 1, total + 1):
        if finished:
            return
        step = (begun or {}).pop(index, None) or Step(index, seed, show)
        started = time.monotonic()
        yield step
        seconds = time.monotonic() - started
        step.time({"seconds": seconds, "tokens": step.tokens})
        if step.tokens:
            step.time({"tokens_per_s": step.tokens / seconds})
        finished = step.finished
        directory.append("metrics.jsonl", [{"step": index, **step.metrics}])
        directory.append("samples.jsonl", ({"step": index, **row} for row in step.rows))
        directory.append("timings.jsonl", [{"step": index, **step.timings}])
        if index % checkpoint_every == 0 or index == total or finished:
            await commit(directory, actors, state, index, finished, keep)
        directory.forget_ahead(index)
        on_commit(step)


async def commit(
    directory: RunDirectory,
    actors: Mapping[str, Service],
    state: LoopState,
    step: int,
    finished: str,
    keep: int,
) -> None:
    """Write the state of all actors and of the loop, then make it the latest checkpoint."""
    staging = directory.begin_checkpoint()
    for name, actor in actors.items():
        earlier = directory.ahead(step) / name
        if earlier.is_dir():
            # The actor has been at work for later steps since.
            os.rename(earlier, staging / name)
        else:
            await actor.save(CheckpointRequest(path=str(staging / name)))
    write_atomically(staging / "loop.json", state.model_dump_json())
    directory.commit(staging, step, finished, keep)


async def restore(
    directory: RunDirectory, actors: Mapping[str, Service], state: LoopState, first: int
) -> tuple[int, str]:
    """Bring actors and loop to the last commit. Returns its step (before `first` if there is none), and why
    the run ended there, if it did.

    Raises Corrupt when the checkpoint is damaged.
    """
    checkpoint = directory.latest()
    if checkpoint is None:
        directory.rewind(None)
        return first - 1, ""
    manifest = read_manifest(checkpoint)
    state.take(_read_state(checkpoint / "loop.json", type(state)))
    for name, actor in actors.items():
        await actor.load(CheckpointRequest(path=str(checkpoint / name)))
    directory.rewind(manifest)
    return manifest.step, manifest.finished


def _read_state(file: Path, kind: type[State]) -> State:
    try:
        return kind.model_validate_json(file.read_text())
    except ValidationError as error:
        raise Corrupt(f"{file} is not a {kind.__name__}: {error}") from error
