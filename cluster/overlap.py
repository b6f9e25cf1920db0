"""Rollouts of coming steps while the loop trains on earlier ones, ahead by a bounded number of steps."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar, cast

from cluster.steps import LoopState, Step

Cursor = TypeVar("Cursor", bound=LoopState)
Rollouts = TypeVar("Rollouts")


class CarriesCursor(Protocol[Cursor]):
    """A loop's state whose field `rollout` holds what producing changes: cursors, counters. Nobody else may."""

    rollout: Cursor


async def overlapped(
    steps: AsyncIterator[Step],
    state: CarriesCursor[Cursor],
    produce: Callable[[Step, Cursor], Awaitable[Rollouts]],
    *,
    staleness: int,
    last: int,
    step_of: Callable[[int], Step],
    keep: Callable[[int], Awaitable[None]],
) -> AsyncGenerator[tuple[Step, Rollouts], None]:
    """Yield each step with its rollouts.

    The rollouts of step k begin when step k - 1 - staleness is over, one step's after the other's, so no
    completion is older than `staleness` steps. At 0 producing and consuming alternate.

    `produce` works on a copy of `state.rollout`. When step k is yielded `state.rollout` is what it was at the end
    of producing for k, so that the commit of step k knows nothing of those that are under way. `keep` is called at
    that moment too, to write down the actors that producing changes.
    """
    ahead: deque[asyncio.Task[tuple[Rollouts, Cursor]]] = deque()

    async def one(step: Step, cursor: Cursor, before: list[asyncio.Task[Any]]) -> tuple[Rollouts, Cursor]:
        for task in before:
            await asyncio.shield(task)
        rollouts = await produce(step, cursor)
        await keep(step.index)
        return rollouts, cursor.model_copy(deep=True)

    try:
        async with aclosing(cast(AsyncGenerator[Step, None], steps)) as given:
            coming, cursor = None, state.rollout
            async for step in given:
                if coming is None:
                    coming, cursor = step.index, state.rollout.model_copy(deep=True)
                for index in range(coming, min(step.index + staleness, last) + 1):
                    begun = step if index == step.index else step_of(index)
                    ahead.append(asyncio.create_task(one(begun, cursor, list(ahead)[-1:])))
                    coming = index + 1
                rollouts, state.rollout = await ahead.popleft()
                yield step, rollouts
    finally:
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)
