"""Producing ahead of the loop: the order of things, the bound, and what a commit holds."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.steps import LoopState, Step
from protocols.errors import Corrupt
from protocols.placement import Resources
from tests.cluster.echo import EchoActor, EchoService, Text


class Counter(LoopState):
    produced: int = 0


class State(LoopState):
    rollout: Counter = Counter()
    trained: int = 0


class Loop:
    """A loop whose producer counts in its cursor and takes notes in an actor, and whose body trains a number."""

    def __init__(self, folder: Path, staleness: int, steps: int = 6, every: int = 1) -> None:
        self.config = MethodConfig(runs_dir=str(folder), steps=steps, checkpoint_every=every, wandb="disabled")
        self.staleness = staleness
        self.log: list[str] = []
        self.state = State()
        self.lags: list[int] = []

    async def run(self, stop_after: int | None = None, fail_at: int | None = None) -> None:
        async with Cluster(self.config, method="test", run="one") as cluster:
            echo = await cluster._spawn(EchoService, "echo", EchoActor, Resources())

            async def produce(step: Step, cursor: Counter) -> dict[str, Any]:
                self.log.append(f"produce {step.index}")
                if step.index == fail_at:
                    raise Corrupt(f"nothing for step {step.index}")
                trained = self.state.trained
                for _ in range(3):
                    await asyncio.sleep(0)
                cursor.produced += 1
                await echo.note(Text(text=f"note {step.index}"))
                return {"trained": trained, "drawn": int(step.rng("draw").integers(1000)), "number": cursor.produced}

            async for step, made in cluster.overlapped(self.state, produce, staleness=self.staleness):
                self.log.append(f"train {step.index}")
                self.lags.append(step.index - 1 - made["trained"])
                # Long enough for everything that may be produced meanwhile.
                for _ in range(200):
                    await asyncio.sleep(0)
                assert self.state.rollout.produced == made["number"] == step.index
                self.state.trained = step.index
                step.log({"drawn": made["drawn"]})
                if step.index == stop_after:
                    return


async def test_at_zero_both_alternate(tmp_path: Path) -> None:
    loop = Loop(tmp_path, 0, steps=3)
    await loop.run()
    assert loop.log == ["produce 1", "train 1", "produce 2", "train 2", "produce 3", "train 3"]
    assert loop.lags == [0, 0, 0]


@pytest.mark.parametrize("staleness", [1, 2, 5, 50])
async def test_producing_is_ahead_by_the_bound_and_no_more(staleness: int, tmp_path: Path) -> None:
    loop = Loop(tmp_path, staleness)
    await loop.run()
    assert sorted(loop.log) == sorted(f"{what} {index}" for what in ("produce", "train") for index in range(1, 7))
    assert [line for line in loop.log if line.startswith("produce")] == [f"produce {i}" for i in range(1, 7)]
    for index in range(1, 7):
        begun = loop.log.index(f"produce {index}")
        # It waits for the training that it must not be older than, and for no other.
        if index - 1 - staleness > 0:
            assert begun > loop.log.index(f"train {index - 1 - staleness}")
        if index > staleness:
            assert begun < loop.log.index(f"train {index - staleness + 1}")
    assert max(loop.lags) == min(staleness, 5)


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("every", [1, 2])
async def test_a_stopped_run_continues_with_the_same_rollouts(staleness: int, every: int, tmp_path: Path) -> None:
    """What producing changed for later steps is not in the commit: neither its cursor nor its actor's state."""
    whole = Loop(tmp_path / "whole", staleness, every=every)
    await whole.run()
    broken = Loop(tmp_path / "broken", staleness, every=every)
    await broken.run(stop_after=3)
    # Step 3 was not over, so the last commit is that of step 2.
    assert State.model_validate_json(newest(tmp_path / "broken", "loop.json")) == State(
        rollout=Counter(produced=2), trained=2
    )
    assert newest(tmp_path / "broken", "echo/state.json").count("note ") == 2
    assert not (tmp_path / "broken/one/checkpoints/.ahead/step-2").exists()
    rest = Loop(tmp_path / "broken", staleness, every=every)
    await rest.run()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "whole/one" / name).read_bytes() == (tmp_path / "broken/one" / name).read_bytes()
    for name in ("loop.json", "echo/state.json"):
        assert newest(tmp_path / "whole", name) == newest(tmp_path / "broken", name)


def newest(folder: Path, name: str) -> str:
    return (sorted((folder / "one/checkpoints").glob("step-*"))[-1] / name).read_text()


@pytest.mark.parametrize("staleness", [0, 2])
async def test_a_failure_of_producing_reaches_the_loop_when_its_step_comes(staleness: int, tmp_path: Path) -> None:
    loop = Loop(tmp_path, staleness)
    with pytest.raises(Corrupt, match="nothing for step 4"):
        await loop.run(fail_at=4)
    assert "train 4" not in loop.log and "produce 5" not in loop.log
    assert State.model_validate_json(newest(tmp_path, "loop.json")).trained == 3


async def test_leaving_the_loop_ends_what_is_being_produced(tmp_path: Path) -> None:
    loop = Loop(tmp_path, 3)
    before = asyncio.all_tasks()
    await loop.run(stop_after=1)
    assert asyncio.all_tasks() == before
