import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.pipeline import in_order


class Stage:
    """Work whose pieces end when the test says so."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.ended: list[int] = []
        self.cancelled: list[int] = []
        self.gates: dict[int, asyncio.Future[int]] = {}
        self.news = asyncio.Condition()

    async def work(self, item: int) -> int:
        self.started.append(item)
        self.gates[item] = asyncio.get_running_loop().create_future()
        await self._tell()
        try:
            result = await self.gates[item]
        except asyncio.CancelledError:
            self.cancelled.append(item)
            raise
        self.ended.append(item)
        await self._tell()
        return result

    @property
    def under_way(self) -> set[int]:
        return set(self.started) - set(self.ended) - set(self.cancelled)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self.news:
            await self.news.wait_for(condition)

    async def _tell(self) -> None:
        async with self.news:
            self.news.notify_all()


def source(items: Iterator[int]) -> Callable[[], int | None]:
    return lambda: next(items, None)


async def collected(results: AsyncIterator[int]) -> list[int]:
    return [result async for result in results]


@given(st.integers(1, 5), st.integers(0, 12), st.randoms(use_true_random=False))
def test_whatever_ends_first_results_keep_their_order(window: int, count: int, random: Random) -> None:
    async def scenario() -> None:
        stage = Stage()
        reading = asyncio.ensure_future(collected(in_order(source(iter(range(count))), stage.work, window)))
        for number in range(count):
            # All that may run does run, before the next piece ends.
            await stage.until(lambda: len(stage.under_way) == expected_under_way(stage, window, count))
            assert len(stage.under_way) <= window
            chosen = random.choice(sorted(stage.under_way))
            stage.gates[chosen].set_result(10 * chosen)
            await stage.until(lambda done=number + 1: len(stage.ended) == done)
        assert await reading == [10 * item for item in range(count)]
        assert stage.started == list(range(count))

    asyncio.run(scenario())


def expected_under_way(stage: Stage, window: int, count: int) -> int:
    """Results are taken in order, so the window begins at the first piece that has not ended."""
    first_open = next((item for item in range(count) if item not in stage.ended), count)
    reach = min(count, first_open + window)
    return len([item for item in range(reach) if item not in stage.ended])


@given(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=10), st.randoms(use_true_random=False))
def test_what_is_drawn_depends_on_results_and_never_on_the_order_of_completion(
    window: int, gains: list[int], random: Random
) -> None:
    async def scenario(choose: Callable[[list[int]], int]) -> tuple[list[int], list[int]]:
        """Draw until the results promise 8; a piece brings what `gains` says."""
        stage, items = Stage(), iter(range(len(gains)))
        results: list[int] = []
        seen: list[int] = []

        def draw() -> int | None:
            seen.append(sum(results))
            return None if sum(results) >= 8 else next(items, None)

        async def read() -> None:
            async for gain in in_order(draw, stage.work, window):
                results.append(gain)

        reading = asyncio.ensure_future(read())
        while True:
            waiting = asyncio.ensure_future(stage.until(lambda: bool(stage.under_way)))
            await asyncio.wait({reading, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                waiting.cancel()
                return stage.started, seen
            chosen = choose(sorted(stage.under_way))
            stage.gates[chosen].set_result(gains[chosen])
            await stage.until(lambda: chosen in stage.ended)  # noqa: B023  awaited in this very turn

    first = asyncio.run(scenario(lambda open_: open_[0]))
    assert asyncio.run(scenario(lambda open_: open_[-1])) == first
    assert asyncio.run(scenario(lambda open_: random.choice(open_))) == first


async def test_a_draw_is_asked_again_after_each_result() -> None:
    waiting = [0]

    async def work(item: int) -> int:
        return item

    taken = []
    async for result in in_order(lambda: waiting.pop(0) if waiting else None, work, 3):
        taken.append(result)
        if result == 0:
            waiting.extend([1, 2])
    assert taken == [0, 1, 2]


async def test_nothing_to_draw_is_no_result() -> None:
    assert await collected(in_order(lambda: None, Stage().work, 3)) == []


async def test_results_may_be_anything_but_items_may_not_be_none() -> None:
    items = iter([0, False, ""])

    async def work(item: object) -> None:
        return None

    assert [result async for result in in_order(lambda: next(items, None), work, 2)] == [None, None, None]


async def test_an_error_reaches_the_caller_in_its_turn_and_ends_the_rest() -> None:
    stage = Stage()
    taken: list[int] = []

    async def read() -> None:
        async for result in in_order(source(iter(range(10))), stage.work, 3):
            taken.append(result)

    reading = asyncio.ensure_future(read())
    await stage.until(lambda: len(stage.started) == 3)
    stage.gates[1].set_exception(ValueError("piece 1"))
    stage.gates[0].set_result(7)
    with pytest.raises(ValueError, match="piece 1"):
        await reading
    assert taken == [7]
    # Piece 3 got the room that piece 0 left, and was cancelled before it began.
    assert (stage.started, stage.cancelled) == ([0, 1, 2], [2])
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_error_in_draw_ends_what_is_under_way() -> None:
    stage = Stage()
    items = iter([0, 1])

    def draw() -> int | None:
        item = next(items, None)
        if item is None:
            raise LookupError("nothing left")
        return item

    with pytest.raises(LookupError):
        await collected(in_order(draw, stage.work, 3))
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_leaving_early_ends_what_is_under_way() -> None:
    stage = Stage()
    async with aclosing(in_order(source(iter(range(10))), stage.work, 3)) as results:
        reading = asyncio.ensure_future(anext(results))
        await stage.until(lambda: len(stage.started) == 3)
        stage.gates[0].set_result(0)
        assert await reading == 0
    assert stage.cancelled == [1, 2]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_cancelling_the_reader_ends_what_is_under_way() -> None:
    stage = Stage()
    reading = asyncio.ensure_future(collected(in_order(source(iter(range(10))), stage.work, 3)))
    await stage.until(lambda: len(stage.started) == 3)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert sorted(stage.cancelled) == [0, 1, 2]
    assert asyncio.all_tasks() == {asyncio.current_task()}
