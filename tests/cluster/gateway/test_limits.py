"""Room for calls, and whose turn it is."""

import asyncio
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.auth import Caller, hash_of
from cluster.gateway.limits import Allowances, Lane, estimated_tokens
from protocols.client import Credentials, connect
from protocols.errors import BadInput, Exhausted
from protocols.messages import Prompt, SamplingParams
from protocols.policy import PolicyService, SampleRequest
from protocols.service import CheckpointRequest, Empty
from tests.cluster.gateway.scripted import ANSWERS, Scripted, a_gateway, a_handle, a_request


def a_caller(**limits: float) -> Caller:
    return Caller.model_validate({"name": "me", "sha256": "0" * 64, "roles": ["infer"]} | limits)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_a_request_may_cost() -> None:
    request = SampleRequest(prompts=[Prompt(text="a"), Prompt(text="b")], n=3, params=SamplingParams(max_tokens=10))
    assert estimated_tokens(request, 40, 60) == 10 + 2 * 3 * 10
    assert estimated_tokens(Empty(), 0, 1) == 1
    with pytest.raises(BadInput, match="request: may draw 60 tokens, expected at most 59"):
        estimated_tokens(request, 40, 59)


def test_a_rate_allows_bursts_of_a_second() -> None:
    now = [100.0]
    allowances, caller = Allowances(lambda: now[0]), a_caller(requests_per_second=3)

    def call() -> None:
        with allowances.taken(caller):
            pass

    for _ in range(3):
        call()
    with pytest.raises(Exhausted, match="me may begin 3 calls per second") as refused:
        call()
    assert refused.value.retry_after_s == pytest.approx(1 / 3)
    now[0] += 1 / 3
    call()
    with pytest.raises(Exhausted):
        call()
    now[0] += 1000
    for _ in range(3):
        call()
    with pytest.raises(Exhausted):
        call()


def test_a_slow_rate_lets_the_first_call_in() -> None:
    now = [0.0]
    allowances, caller = Allowances(lambda: now[0]), a_caller(requests_per_second=0.1)
    with allowances.taken(caller):
        pass
    with pytest.raises(Exhausted) as refused, allowances.taken(caller):
        pass
    assert refused.value.retry_after_s == pytest.approx(10)


def test_calls_under_way_are_counted() -> None:
    allowances, caller = Allowances(), a_caller(concurrent=2)
    with allowances.taken(caller), allowances.taken(caller):
        with pytest.raises(Exhausted, match="me has 2 calls under way, allowed are 2"), allowances.taken(caller):
            pass
        with allowances.taken(caller.model_copy(update={"name": "other"})):
            pass
    with allowances.taken(caller):
        pass


class Entered:
    """Calls in a lane, in the order in which they were let in."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.order: list[str] = []
        self.leave: dict[str, asyncio.Event] = {}

    def call(self, name: str, cost: int) -> asyncio.Task[None]:
        return asyncio.ensure_future(self._stay(name, cost))

    async def _stay(self, name: str, cost: int) -> None:
        self.leave[name] = asyncio.Event()
        async with self.lane.entered(name[0], cost):
            self.order.append(name)
            await self.leave[name].wait()


async def test_callers_take_turns() -> None:
    entered = Entered(Lane(10, 100))
    tasks = [entered.call(name, 10) for name in ("a1", "a2", "a3", "a4", "b1", "c1", "b2")]
    await settled()
    assert entered.order == ["a1"] and entered.lane.waiting == 6
    for i in range(7):
        entered.leave[entered.order[i]].set()
        await settled()
    assert entered.order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
    await asyncio.gather(*tasks)
    assert (entered.lane.used, entered.lane.waiting) == (0, 0)


async def test_a_large_call_is_not_passed_for_ever_and_runs_alone() -> None:
    entered = Entered(Lane(10, 100))
    tasks = [entered.call(name, cost) for name, cost in (("a1", 6), ("b1", 1000), ("c1", 1))]
    await settled()
    assert entered.order == ["a1"]
    entered.leave["a1"].set()
    await settled()
    assert entered.order == ["a1", "b1"] and entered.lane.used == 10
    entered.leave["b1"].set()
    entered.leave["c1"].set()
    await asyncio.gather(*tasks)


async def test_who_leaves_while_waiting_blocks_nobody() -> None:
    entered = Entered(Lane(10, 2))
    tasks = [entered.call(name, cost) for name, cost in (("a1", 6), ("b1", 10), ("c1", 4))]
    await settled()
    with pytest.raises(Exhausted, match="2 calls wait already"):
        await entered.call("d1", 1)
    tasks[1].cancel()
    await settled()
    assert entered.order == ["a1", "c1"] and entered.lane.waiting == 0
    for name in ("a1", "c1"):
        entered.leave[name].set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert entered.lane.used == 0


async def test_a_turn_that_comes_when_its_call_has_just_left_goes_to_the_next() -> None:
    entered = Entered(Lane(10, 9))
    tasks = [entered.call(name, 10) for name in ("a1", "b1", "b2", "c1")]
    await settled()
    tasks[1].cancel()
    entered.leave["a1"].set()  # before the cancelled task has run
    await settled()
    assert entered.order in (["a1", "c1"], ["a1", "b2"])
    for name in ("b2", "c1"):
        entered.leave[name].set()
        await settled()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(entered.order) == ["a1", "b2", "c1"]
    assert (entered.lane.used, entered.lane.waiting) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 15), st.sampled_from(["enter", "leave", "cancel"]))))
def test_a_lane_never_holds_more_than_fits_and_never_stalls(moves: list[tuple[str, int, str]]) -> None:
    async def play() -> None:
        entered, tasks = Entered(Lane(10, 1000)), {}
        for i, (caller, cost, move) in enumerate(moves):
            tasks[f"{caller}{i}"] = entered.call(f"{caller}{i}", cost)
            await settled()
            inside = [name for name in entered.order if not tasks[name].done()]
            waiting = [name for name in tasks if name not in entered.order and not tasks[name].done()]
            if move == "leave" and inside:
                entered.leave[inside[0]].set()
            elif move == "cancel" and waiting:
                tasks[waiting[-1]].cancel()
            await settled()
            assert 0 <= entered.lane.used <= 10
        for _ in range(len(moves) + 1):
            for name in entered.order:
                entered.leave[name].set()
            await settled()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert (entered.lane.used, entered.lane.waiting) == (0, 0)

    asyncio.run(play())


# Over the wire.


async def test_too_many_are_told_when_to_come_again(tmp_path: Path) -> None:
    transport = Scripted(waits=True)
    limits = {"tokens_at_once": 100, "train_share": 0.0, "queue": 1}
    async with a_gateway({"policy": a_handle(transport)}, tmp_path, **limits) as gateway:
        once = connect(gateway.address, PolicyService, tries=1)
        running = asyncio.ensure_future(once.sample(a_request(max_tokens=90)))
        await transport.began.acquire()
        waiting = asyncio.ensure_future(once.sample(a_request(max_tokens=90)))
        while not gateway.admission.lanes["infer"].waiting:
            await asyncio.sleep(0)
        with pytest.raises(Exhausted, match="1 calls wait already") as refused:
            await once.sample(a_request(max_tokens=90))
        assert refused.value.retry_after_s == 1.0
        # A client that may try again gets through.
        patient = asyncio.ensure_future(connect(gateway.address, PolicyService).sample(a_request(max_tokens=90)))
        for _ in range(3):
            transport.go.release()
        assert await asyncio.gather(running, waiting, patient) == [ANSWERS["sample"]] * 3


async def test_training_keeps_a_lane(tmp_path: Path) -> None:
    transport = Scripted(waits=True)
    limits = {"tokens_at_once": 100, "train_share": 0.2, "queue": 0}
    async with a_gateway({"policy": a_handle(transport)}, tmp_path, **limits) as gateway:
        once = connect(gateway.address, PolicyService, tries=1)
        running = asyncio.ensure_future(once.sample(a_request(max_tokens=80)))
        await transport.began.acquire()
        with pytest.raises(Exhausted):
            await once.info(Empty())
        training = asyncio.ensure_future(once.save(CheckpointRequest(path="a")))
        await transport.began.acquire()
        for _ in range(2):
            transport.go.release()
        await asyncio.gather(running, training)


async def test_limits_of_a_caller(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    one = {"name": "me", "sha256": hash_of("t"), "roles": ["infer"], "concurrent": 1}
    file.write_text(yaml.safe_dump([one]))
    transport = Scripted(waits=True)
    async with a_gateway({"policy": a_handle(transport)}, tmp_path, tokens=str(file)) as gateway:
        me = connect(gateway.address, PolicyService, credentials=Credentials(token="t"), tries=1)
        running = asyncio.ensure_future(me.sample(a_request()))
        await transport.began.acquire()
        with pytest.raises(Exhausted, match="me has 1 calls under way, allowed are 1"):
            await me.sample(a_request())
        transport.go.release()
        await running
