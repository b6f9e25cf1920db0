import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import pytest

import cluster.cluster
from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.steps import LoopState
from cluster.summary import Summary, SummaryRow, show_summary
from cluster.tracking import Tracker
from protocols.errors import BadInput, Internal, Unavailable
from protocols.placement import Resources
from protocols.policy import PolicyConfig
from protocols.service import CheckpointRequest, CheckpointResponse, Empty
from tests.cluster.echo import EchoActor, EchoService, Text

ONE = Resources()


class State(LoopState):
    turns: int = 0


def company(folder: Path, **config: Any) -> Cluster:
    values = {"runs_dir": str(folder), "wandb": "disabled", "steps": 3, "checkpoint_every": 1} | config
    return Cluster(MethodConfig.model_validate(values), method="test", run="one", headline=("reward",))


async def spawn(
    members: Cluster, name: str = "echo", build: Any = EchoActor, resources: Resources = ONE, **options: Any
) -> EchoService:
    return await members._spawn(EchoService, name, build, resources, **options)


async def play(members: Cluster, echo: EchoService, *, fail: int = -1, stop: int = -1) -> list[int]:
    state, done = State(), []
    async for step in members.steps(state):
        state.turns += 1
        await echo.note(Text(text=str(step.seed("note") % 100)))
        _, *notes = (await echo.notes(Empty())).text.split()
        step.log({"reward": state.turns / 10, "notes": len(notes)})
        if step.index == fail:
            raise KeyError("in the loop")
        if step.index == stop:
            step.stop("good enough")
        done.append(step.index)
    return done


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


async def test_a_run_leaves_its_folder_and_can_be_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with company(tmp_path) as members:
        assert await play(members, await spawn(members)) == [1, 2, 3]
        rows = members.metrics()
        assert members.finished() == ""
    assert [(row["step"], row["reward"], row["notes"]) for row in rows] == [(1, 0.1, 1), (2, 0.2, 2), (3, 0.3, 3)]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split("  ETA")[0] for line in shown.err.splitlines()] == [
        "test one: 3 steps",
        "step 1/3  reward 0.10",
        "step 2/3  reward 0.20",
        "step 3/3  reward 0.30",
    ]
    async with company(tmp_path, steps=4) as members:
        assert await play(members, await spawn(members)) == [4]
        assert [row["notes"] for row in members.metrics()] == [1, 2, 3, 4]
    assert "test one: 4 steps, 3 done" in capsys.readouterr().err


async def test_time_spent_in_calls_is_kept_by_actor_and_method(tmp_path: Path) -> None:
    async with company(tmp_path, steps=1) as members:
        await play(members, await spawn(members))
    (row,) = [json.loads(line) for line in (tmp_path / "one" / "timings.jsonl").read_text().splitlines()]
    assert {"step", "seconds", "echo.note", "echo.notes"} <= set(row)
    assert row["seconds"] >= row["echo.note"] > 0


async def test_an_actor_that_is_not_committed_has_no_state_in_the_checkpoint(tmp_path: Path) -> None:
    async with company(tmp_path, steps=1) as members:
        echo = await spawn(members)
        await spawn(members, "frozen", commit=False)
        await play(members, echo)
    checkpoint = tmp_path / "one" / "checkpoints" / "step-000001"
    assert {path.name for path in checkpoint.iterdir()} == {"echo", "loop.json", "manifest.json"}


async def test_why_a_run_ended_itself_is_kept(tmp_path: Path) -> None:
    for expected in ([1, 2], []):
        async with company(tmp_path) as members:
            assert await play(members, await spawn(members), stop=2) == expected
            assert members.finished() == "good enough"


async def test_an_error_in_the_loop_closes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Told(Tracker):
        def close(self) -> None:
            closed.append("tracker")

    class Closing(EchoActor):
        async def close(self) -> None:
            await super().close()
            closed.append("actor")

    monkeypatch.setattr(cluster.cluster, "open_tracker", lambda *_: Told())
    members = company(tmp_path)
    with pytest.raises(KeyError, match="in the loop"):
        async with members:
            await play(members, await spawn(members, build=Closing), fail=2)
    assert closed == ["tracker", "actor"]
    # The folder is free again, and the failed step is not in it.
    async with company(tmp_path) as again:
        assert await play(again, await spawn(again)) == [2, 3]


async def test_a_failure_while_closing_spares_nobody(tmp_path: Path) -> None:
    closed: list[str] = []

    class Closing(EchoActor):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        async def close(self) -> None:
            closed.append(self.name)
            raise OSError(f"{self.name} does not close")

    members = company(tmp_path)
    async with members:
        for name in "abc":
            await spawn(members, name, functools.partial(Closing, name))
        members.directory.open(members.saved_config, [])
        with pytest.raises(OSError, match="a does not close"):
            await members.__aexit__()
    assert closed == ["c", "b", "a"]
    async with company(tmp_path):
        pass


async def test_a_failed_set_up_gives_back_what_it_took(tmp_path: Path) -> None:
    closed: list[str] = []

    class Broken(EchoActor):
        def __init__(self, text: str) -> None:
            super().__init__(broken=text)

        async def close(self) -> None:
            closed.append("closed")

    async with company(tmp_path) as members:
        with pytest.raises(BadInput, match="no model"):
            await spawn(members, build=functools.partial(Broken, "BadInput: no model"))
        assert closed == ["closed"]
        # The name is free again.
        await spawn(members)
    assert tree(tmp_path) == set()


async def test_when_one_replica_cannot_start_the_others_end(tmp_path: Path) -> None:
    alive: list[EchoActor] = []

    def build() -> EchoActor:
        actor = EchoActor(broken="Unavailable: no memory" if len(alive) == 2 else "")
        alive.append(actor)
        return actor

    async with company(tmp_path) as members:
        with pytest.raises(Unavailable, match="no memory"):
            await spawn(members, build=build, resources=Resources(replicas=3))
        assert [actor._ready for actor in alive] == [False, False, False]
        assert not members._started


async def test_bad_input_is_found_before_anything_is_made(tmp_path: Path) -> None:
    async with company(tmp_path, steps=1) as members:
        await play(members, await spawn(members))
    before = tree(tmp_path)
    with pytest.raises(BadInput, match="was made with seed=0, now it is 1"):
        await company(tmp_path, seed=1).__aenter__()
    async with company(tmp_path):
        with pytest.raises(BadInput, match="in use by another process"):
            await company(tmp_path).__aenter__()
    assert tree(tmp_path) == before


async def test_a_run_that_is_refused_leaves_the_folder_to_others(tmp_path: Path) -> None:
    async with company(tmp_path, steps=1) as members:
        await play(members, await spawn(members))
    with pytest.raises(BadInput):
        await company(tmp_path, seed=1).__aenter__()
    async with company(tmp_path):
        pass


async def test_tracking_that_is_refused_leaves_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mode: str, folder: Path, *_: object) -> Tracker:
        (folder / "wandb").mkdir()
        raise BadInput("tracking: no key")

    with monkeypatch.context() as patch:
        patch.setattr(cluster.cluster, "open_tracker", refuse)
        async with company(tmp_path) as members:
            with pytest.raises(BadInput, match="no key"):
                await play(members, await spawn(members))
    assert tree(tmp_path) == set()
    # One that was there before stays.
    async with company(tmp_path) as members:
        await play(members, await spawn(members))
    monkeypatch.setattr(cluster.cluster, "open_tracker", refuse)
    async with company(tmp_path, steps=9) as members:
        with pytest.raises(BadInput, match="no key"):
            await play(members, await spawn(members))
    assert len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()) == 3


async def test_a_policy_that_trains_has_one_replica(tmp_path: Path) -> None:
    async with company(tmp_path) as members:
        with pytest.raises(BadInput, match=r"policy\.resources\.replicas: a policy that trains has one replica"):
            await members.policy(PolicyConfig(resources=Resources(replicas=2)))


async def test_a_defect_in_an_actor_fails_the_commit_and_keeps_its_text(tmp_path: Path) -> None:
    class Forgetful(EchoActor):
        async def save(self, request: CheckpointRequest) -> CheckpointResponse:
            raise ZeroDivisionError("in save")

    async with company(tmp_path) as members:
        with pytest.raises(Internal, match="ZeroDivisionError: in save"):
            await play(members, await spawn(members, build=Forgetful), stop=1)
        assert members.directory.latest() is None


async def test_cancelling_a_run_ends_its_actors(tmp_path: Path) -> None:
    waiting = asyncio.Event()

    async def run() -> None:
        async with company(tmp_path) as members:
            echo = await spawn(members)
            async for _ in members.steps(State()):
                waiting.set()
                await echo.wait(Text(text="for ever"))

    task = asyncio.ensure_future(run())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with company(tmp_path) as members:
        assert await play(members, await spawn(members)) == [1, 2, 3]


async def test_a_summary_is_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = SummaryRow(name="accuracy [/x]", before=0.25, after=None, note="held out")
    summary = Summary(title="A run", rows=[row], notes=["ünsure [bold]"], panels={"Truth": ["eval/gold"]})
    async with company(tmp_path, steps=1) as members:
        await play(members, await spawn(members))
        members.summarize(summary)
    folder = tmp_path / "one"
    assert json.loads((folder / "panels.json").read_text()) == {"Truth": ["eval/gold"]}
    capsys.readouterr()
    show_summary(folder)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("A run", "accuracy [/x]", "0.250", "held out", "- ünsure [bold]"))
    show_summary(tmp_path)
    assert capsys.readouterr().out == ""
