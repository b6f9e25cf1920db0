import builtins
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from actors.actor import start
from cluster.inline import InlineTransport
from cluster.run_directory import RunDirectory, read_manifest
from cluster.steps import LoopState, Step, steps
from protocols.errors import Corrupt, RepertoryError
from protocols.handle import make_handle
from protocols.service import Empty
from tests.cluster.echo import EchoActor, EchoService, Text

CONFIG = {"method": "test", "seed": 7}
OPERATIONS = [
    *((builtins, "open"), (io, "open"), (os, "open"), (os, "mkdir"), (os, "rename"), (os, "replace")),
    *((os, "truncate"), (os, "unlink"), (os, "rmdir"), (os, "fsync")),
]


class State(LoopState):
    total: int = 0
    history: dict[str, int] = {}


class Stopped(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about what happens in which order, not about power cuts."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


async def play(
    path: Path,
    *,
    total: int = 5,
    every: int = 1,
    keep: int = 2,
    first: int = 1,
    body: Callable[[Step], None] = lambda step: None,
) -> list[int]:
    """Run a small loop to its end, or go on with it. Returns the steps that were done."""
    directory, state, actor = RunDirectory(path), State(), EchoActor()
    await start(actor)
    handle = make_handle(EchoService, InlineTransport("echo", actor))
    done = []
    try:
        directory.open(CONFIG, [])
        iterator = steps(
            directory,
            {"echo": handle},
            state,
            first=first,
            total=total,
            seed=7,
            checkpoint_every=every,
            keep=keep,
            show=lambda text: None,
            on_commit=lambda step: done.append(step.index),
        )
        async with aclosing(iterator):
            async for step in iterator:
                await turn(step, handle, state)
                body(step)
    finally:
        directory.close()
    return done


async def turn(step: Step, handle: EchoService, state: State) -> None:
    """A step whose rows depend on the loop's state, the actor's state and the step's seed."""
    drawn = int(step.rng("draw").integers(1000))
    state.total += drawn
    state.history[f"step {step.index}"] = drawn
    await handle.note(Text(text=str(state.total)))
    _, *notes = (await handle.notes(Empty())).text.split()
    step.log({"drawn": drawn, "total": state.total, "notes": len(notes)})
    step.samples({"text": note, "drawn": drawn} for note in notes[-2:])
    step.time({"late": 1.0})


def result(path: Path) -> dict[str, Any]:
    """All that an undisturbed and a disturbed run must have in common."""
    latest = RunDirectory(path).latest()
    return {
        "metrics": (path / "metrics.jsonl").read_bytes(),
        "samples": (path / "samples.jsonl").read_bytes(),
        "timed": [row["step"] for row in rows(path, "timings.jsonl")],
        "latest": latest and latest.name,
        "loop": latest and json.loads((latest / "loop.json").read_text()),
        "actor": latest and json.loads((latest / "echo" / "state.json").read_text()),
    }


def rows(path: Path, journal: str = "metrics.jsonl") -> list[dict[str, Any]]:
    file = path / journal
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@contextmanager
def failing(at: int, *, error: type[BaseException], after: bool, for_good: bool) -> Iterator[list[str]]:
    """Let the file operation number `at` fail, before or after it takes effect, alone or with all that follow."""
    seen: list[str] = []

    def faulty(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            number = len(seen)
            seen.append(f"{name} {arguments[0]}")
            if number == at and after:
                value = function(*arguments, **options)
                if isinstance(value, io.IOBase):
                    value.close()
                raise error(28, "No space left on device")
            if number == at or (number > at and for_good):
                raise error(28, "No space left on device")
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in OPERATIONS:
            patch.setattr(module, name, faulty(name, getattr(module, name)))
        yield seen


async def interrupted(path: Path, step: int, **options: Any) -> None:
    """Play until the body of a step fails."""

    def body(now: Step) -> None:
        if now.index == step:
            raise Stopped

    with pytest.raises(Stopped):
        await play(path, body=body, **options)


def tear(path: Path) -> None:
    """Leave half a line at the end of each journal that is there, as a killed writer does."""
    for journal in path.glob("*.jsonl"):
        with open(journal, "a") as file:
            file.write('{"step": 4, "dra')


async def test_every_step_has_one_row_and_the_last_state_is_kept(tmp_path: Path) -> None:
    assert await play(tmp_path / "run") == [1, 2, 3, 4, 5]
    got = rows(tmp_path / "run")
    assert [row["step"] for row in got] == [1, 2, 3, 4, 5]
    assert got[-1]["total"] == sum(row["drawn"] for row in got)
    assert [row["step"] for row in rows(tmp_path / "run", "samples.jsonl")] == [1, 2, 2, 3, 3, 4, 4, 5, 5]
    timings = rows(tmp_path / "run", "timings.jsonl")
    assert all(row["seconds"] > 0 and row["late"] == 1.0 for row in timings)
    assert await play(tmp_path / "run") == []


@pytest.mark.parametrize(("every", "keep", "begun"), [(1, 1, False), (2, 2, False), (2, 1, True)])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("error", "for_good"), [(OSError, False), (Stopped, True)], ids=["one failure", "the end of the process"]
)
async def test_a_failure_at_any_file_operation_costs_nothing(
    tmp_path: Path, every: int, keep: int, begun: bool, after: bool, error: type[BaseException], for_good: bool
) -> None:
    total = 3
    await play(tmp_path / "reference", total=total, every=every, keep=keep)
    reference = result(tmp_path / "reference")
    for at in range(1000):
        path = tmp_path / str(at)
        if begun:
            await interrupted(path, 3, every=every)
            tear(path)
        faults = failing(at, error=error, after=after, for_good=for_good)
        with faults as seen, suppress(OSError, RepertoryError, Stopped):
            await play(path, total=total, every=every, keep=keep)
        if len(seen) <= at:
            break
        tear(path)
        await play(path, total=total, every=every, keep=keep)
        assert result(path) == reference, f"after a failure at operation {at}: {seen[at]}"
        shutil.rmtree(path, ignore_errors=True)
    assert at > 30


@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
async def test_a_run_that_fails_in_a_step_goes_on_from_the_last_commit(tmp_path: Path, every: int, stop: int) -> None:
    await play(tmp_path / "reference", every=every)
    await interrupted(tmp_path / "run", stop, every=every)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, stop))
    last_commit = (stop - 1) // every * every
    assert await play(tmp_path / "run", every=every) == list(range(last_commit + 1, 6))
    assert result(tmp_path / "run") == result(tmp_path / "reference")


async def test_another_commit_rhythm_gives_the_same_rows(tmp_path: Path) -> None:
    await play(tmp_path / "reference", every=1)
    await interrupted(tmp_path / "run", 4, every=2)
    await play(tmp_path / "run", every=3)
    assert result(tmp_path / "run") == result(tmp_path / "reference")


async def test_the_last_step_is_committed_whatever_the_rhythm(tmp_path: Path) -> None:
    await play(tmp_path / "run", total=5, every=4, keep=9)
    assert committed(tmp_path / "run") == ["step-000004", "step-000005"]


def committed(path: Path) -> list[str]:
    return sorted(p.name for p in (path / "checkpoints").iterdir())


async def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    await play(tmp_path / "run", total=5, keep=3)
    assert committed(tmp_path / "run") == ["step-000003", "step-000004", "step-000005"]


async def test_a_run_may_begin_with_step_0(tmp_path: Path) -> None:
    assert await play(tmp_path / "run", first=0, total=2) == [0, 1, 2]
    assert await play(tmp_path / "run", first=0, total=2) == []
    assert await play(tmp_path / "short", first=0, total=0) == [0]
    assert await play(tmp_path / "nothing", first=1, total=0) == []


async def test_raising_the_steps_of_a_finished_run_lengthens_it(tmp_path: Path) -> None:
    await play(tmp_path / "reference", total=5)
    assert await play(tmp_path / "run", total=3) == [1, 2, 3]
    assert await play(tmp_path / "run", total=5) == [4, 5]
    assert result(tmp_path / "run") == result(tmp_path / "reference")


async def test_lowering_them_changes_nothing(tmp_path: Path) -> None:
    await play(tmp_path / "run", total=5)
    before = result(tmp_path / "run")
    assert await play(tmp_path / "run", total=3) == []
    assert result(tmp_path / "run") == before


async def test_a_step_may_end_the_run_and_is_committed(tmp_path: Path) -> None:
    def body(step: Step) -> None:
        if step.index == 3:
            step.stop("good enough")

    path = tmp_path / "run"
    assert await play(path, every=10, body=body) == [1, 2, 3]
    latest = RunDirectory(path).latest()
    assert latest is not None
    assert (read_manifest(latest).step, read_manifest(latest).finished) == (3, "good enough")
    # It stays ended, also when more steps are asked for.
    before = result(path)
    assert await play(path, total=9, every=10) == []
    assert result(path) == before


@pytest.mark.parametrize("name", ["loop.json", "echo/state.json", "manifest.json"])
async def test_a_damaged_checkpoint_is_corrupt_and_names_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run"
    await play(path, total=2, keep=2)
    latest = path / "checkpoints" / "step-000002"
    (latest / name).write_text('{"total": 3')
    before = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(Corrupt, match=f"step-000002/{name}"):
        await play(path, total=4)
    assert (path / "metrics.jsonl").read_bytes() == before


async def test_without_the_damaged_checkpoint_the_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "run"
    await play(tmp_path / "reference", total=4)
    await play(path, total=3, keep=2)
    latest = path / "checkpoints" / "step-000003"
    (latest / "loop.json").write_text("")
    with pytest.raises(Corrupt, match=f"remove the folder {latest} to continue from the one before"):
        await play(path, total=4)
    shutil.rmtree(latest)
    assert await play(path, total=4) == [3, 4]
    assert result(path) == result(tmp_path / "reference")


async def test_a_state_of_another_shape_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NewState(LoopState):
        total: int = 0

    await play(tmp_path / "run", total=1)
    monkeypatch.setitem(globals(), "State", NewState)
    with pytest.raises(Corrupt, match=r"loop\.json is not a NewState"):
        await play(tmp_path / "run", total=2)


async def test_committed_rows_that_were_deleted_are_missed(tmp_path: Path) -> None:
    await play(tmp_path / "run", total=2)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(Corrupt, match=r"metrics\.jsonl has 0 bytes"):
        await play(tmp_path / "run", total=4)


def test_seeds_of_a_step_depend_on_run_step_and_purpose_only() -> None:
    def seeds(index: int, run: int, *names: str | int) -> int:
        return Step(index, run, lambda text: None).seed(*names)

    assert seeds(3, 7, "batch") == seeds(3, 7, "batch")
    assert len({seeds(3, 7, "batch"), seeds(4, 7, "batch"), seeds(3, 8, "batch"), seeds(3, 7, "order", 0)}) == 4
    one, two = (Step(3, 7, lambda text: None).rng("batch") for _ in range(2))
    assert one.integers(1 << 60) == two.integers(1 << 60)


def test_a_step_collects_what_is_said_about_it() -> None:
    shown: list[str] = []
    step = Step(1, 0, shown.append)
    step.log({"reward": 0.5})
    step.log({"reward": 0.75, "loss": 1.0})
    step.samples([{"text": "a"}])
    step.samples([{"text": "b"}])
    step.sampled(3)
    step.sampled(4)
    step.activity("thinking")
    assert step.metrics == {"reward": 0.75, "loss": 1.0}
    assert [row["text"] for row in step.rows] == ["a", "b"]
    assert (step.tokens, shown, step.finished) == (7, ["thinking"], "")


async def test_tokens_per_second_are_timed(tmp_path: Path) -> None:
    await play(tmp_path / "run", total=2, body=lambda step: step.sampled(10 * (step.index - 1)))
    none, some = rows(tmp_path / "run", "timings.jsonl")
    assert (none["tokens"], "tokens_per_s" in none) == (0, False)
    assert some["tokens_per_s"] == pytest.approx(10 / some["seconds"])
