"""What a step comes to must not depend on which call ends first."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import methods.spell
from cluster.steps import Step
from methods.spell import Cursor, self_play
from methods.spell_config import Config
from methods.spell_rounds import Cast, Fate, Round
from protocols.errors import Internal
from protocols.questioner import HistoryRequest
from protocols.questions import Task

MIXED = {Task.GENERAL: 5, Task.MATH: 2, Task.CHOICE: 4}


class Watch:
    """Sees which chunks are under way, by wrapping the stages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running: list[set[str]] = []
        self.most = 0
        self.launched: list[list[str]] = []
        self.ended: list[list[str]] = []
        propose, play = methods.spell.propose, methods.spell.play

        async def watched_propose(cast: Cast, config: Config, clusters: Any, *rest: Any) -> list[Round]:
            names = {cluster.question_id for cluster in clusters}
            assert len(names) == len(clusters)
            for other in self.running:
                assert not names & other, "a cluster was dealt again while it was in flight"
            self.running.append(names)
            self.most = max(self.most, len(self.running))
            self.launched.append([cluster.question_id for cluster in clusters])
            return await propose(cast, config, clusters, *rest)

        async def watched_play(cast: Cast, config: Config, rounds: list[Round], seed: int) -> list[Round]:
            done = await play(cast, config, rounds, seed)
            names = [round_.cluster.question_id for round_ in done]
            self.running.remove(set(names))
            self.ended.append(names)
            return done

        monkeypatch.setattr(methods.spell, "propose", watched_propose)
        monkeypatch.setattr(methods.spell, "play", watched_play)


def world_of(toys: SimpleNamespace) -> Any:
    return toys.World([toys.cluster(f"{task.name}{i}", 6, task) for task, n in MIXED.items() for i in range(n)])


async def played(
    toys: SimpleNamespace, wait: Any, steps: int = 3, right: float = 0.4, **values: Any
) -> tuple[list[Any], dict[str, Any], Cursor]:
    """Rounds, memories and loop state after some steps, as plain data."""
    config = toys.config(questions_per_step=6, generation_batch=20, chunk=3, chunks_in_flight=4, **values)
    policy = toys.Policy(toys.writer(right=right))
    policy.before = wait
    cast = await toys.cast(policy, config.questioner, config.verifier)
    world, state, seen = world_of(toys), Cursor(), []
    for index in range(1, steps + 1):
        step = Step(index, config.seed, lambda text: None)
        for round_ in await self_play(step, cast, world, {}, config, config.questioner.documents, state):
            answers = round_.answers.model_dump_json() if round_.answers else None
            seen.append((round_.proposal.model_dump_json(), round_.fate, answers, round_.rewards, round_.probe_hits))
    memories = {
        cluster.question_id: (
            await cast.questioner.history(HistoryRequest(question_id=cluster.question_id, task=cluster.task))
        ).entries
        for cluster in world.training
    }
    return seen, memories, state


async def test_the_outcome_does_not_depend_on_timing(
    toys: SimpleNamespace, restless: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    expected = await played(toys, None, grounding={"enabled": True})
    assert any(expected[1].values()) and {fate for _, fate, *_ in expected[0]} > {Fate.GOOD}
    orders = {str(watch.ended)}
    for seed in range(6):
        monkeypatch.undo()
        watch = Watch(monkeypatch)
        assert await played(toys, restless(seed), grounding={"enabled": True}) == expected
        orders.add(str(watch.ended))
        assert watch.most == 4
        assert sorted(map(str, watch.ended)) == sorted(map(str, watch.launched))
    # The calls did end in different orders.
    assert len(orders) > 3


@pytest.mark.parametrize("window", [1, 2, 4])
async def test_no_more_chunks_than_allowed_are_under_way(
    toys: SimpleNamespace, restless: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    watch = Watch(monkeypatch)
    config = toys.config(questions_per_step=12, generation_batch=24, chunk=2, chunks_in_flight=window)
    policy = toys.Policy(toys.writer())
    policy.before = restless(1)
    cast = await toys.cast(policy, config.questioner)
    world = toys.World([toys.cluster(f"c{i}") for i in range(40)])
    await self_play(Step(1, 0, lambda text: None), cast, world, {}, config, config.questioner.documents, Cursor())
    assert watch.most == window
    assert not watch.running


def all_good(toys: SimpleNamespace) -> Any:
    """Answers of which the first half is right."""
    able, lost = toys.writer(right=1.0), toys.writer(right=0.0)
    return lambda call: (lost if call.kind == "answer" and call.index % 2 else able)(call)


async def ask(toys: SimpleNamespace, write: Any, state: Cursor, clusters: int = 60, **values: Any) -> list[Round]:
    config = toys.config(questions_per_step=8, generation_batch=16, chunk=2, chunks_in_flight=3, **values)
    cast = await toys.cast(toys.Policy(write), config.questioner, config.verifier)
    world = toys.World([toys.cluster(f"c{i}") for i in range(clusters)])
    return await self_play(Step(1, 0, lambda text: None), cast, world, {}, config, config.questioner.documents, state)


async def test_launching_stops_when_enough_is_promised(toys: SimpleNamespace) -> None:
    state = Cursor()
    # Half is expected to be good at first, so what is done and what is under way promise 8 earlier than 16 asked.
    first = await ask(toys, all_good(toys), state)
    assert [round_.fate for round_ in first] == [Fate.GOOD] * len(first)
    assert 8 <= len(first) <= 8 + 3 * 2
    assert state.keep_rates == [(len(first), len(first))]
    # Now all are expected to be good: exactly as many are asked as are needed.
    assert len(await ask(toys, all_good(toys), state)) == 8


async def test_launching_goes_on_while_too_few_are_good(toys: SimpleNamespace) -> None:
    rare = toys.writer(right=1.0)
    good = all_good(toys)

    def write(call: Any) -> Any:
        number = int(call.uid.split("/")[0].split("-")[1])
        return (good if number % 4 == 0 else rare)(call)

    state = Cursor()
    rounds = await ask(toys, write, state, verifier={"mode": "rules"})
    assert sum(round_.fate is Fate.GOOD for round_ in rounds) >= 8
    assert len(rounds) >= 29
    assert state.keep_rates[0][1] / state.keep_rates[0][0] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(("most_batches", "batch", "asked"), [(3, 16, 48), (1, 17, 17)])
async def test_a_step_never_asks_more_than_its_batches(
    toys: SimpleNamespace, most_batches: int, batch: int, asked: int
) -> None:
    state = Cursor()
    config = {"most_batches": most_batches}
    hopeless = toys.Policy(toys.writer(right=1.0)).write
    toys_config = toys.config(questions_per_step=8, generation_batch=batch, chunk=2, chunks_in_flight=3, **config)
    cast = await toys.cast(toys.Policy(hopeless), toys_config.questioner)
    world = toys.World([toys.cluster(f"c{i}") for i in range(60)])
    rounds = await self_play(
        Step(1, 0, lambda text: None), cast, world, {}, toys_config, toys_config.questioner.documents, state
    )
    assert len(rounds) == asked
    assert state.keep_rates == [(asked, 0)]


async def test_one_cluster_is_enough(toys: SimpleNamespace) -> None:
    rounds = await ask(toys, all_good(toys), Cursor(), clusters=1)
    assert len(rounds) >= 8
    assert [round_.proposal.history_used for round_ in rounds][:4] == [0, 1, 2, 3]


async def test_questions_of_a_step_have_names_and_seeds_of_their_own(toys: SimpleNamespace) -> None:
    policy = toys.Policy(all_good(toys))
    config = toys.config(questions_per_step=8, generation_batch=16)
    cast = await toys.cast(policy, config.questioner)
    world, state = toys.World([toys.cluster(f"c{i}") for i in range(9)]), Cursor()
    names = []
    for index in (1, 2):
        rounds = await self_play(
            Step(index, 0, lambda text: None), cast, world, {}, config, config.questioner.documents, state
        )
        names += [round_.proposal.uid for round_ in rounds]
        assert names[-1].startswith(f"{index}-")
    assert len(set(names)) == len(names)
    seeds = [(call.kind, call.seed) for call in policy.calls if call.index == 0]
    assert len(set(seeds)) == len(seeds)


async def test_a_failing_chunk_fails_the_step(toys: SimpleNamespace) -> None:
    able = toys.writer()

    def write(call: Any) -> Any:
        if call.uid.startswith("1-3"):
            raise ValueError("the model broke")
        return able(call)

    with pytest.raises(Internal, match="the model broke"):
        await ask(toys, write, Cursor())
