"""Work that overlaps and still happens in a fixed order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def in_order(
    draw: Callable[[], Item | None], work: Callable[[Item], Awaitable[Result]], window: int
) -> AsyncGenerator[Result, None]:
    """Work on items with at most `window` under way, and yield the results in the order of the items.

    `draw` gives the next item, or None if there is none for now. It is asked at the start and after each
    result has been dealt with, so it may decide by the results so far, and the schedule never depends on
    which work ends first. The loop ends when nothing is under way and `draw` gives None. Closing it
    early cancels what is under way; a reader that may leave early uses `contextlib.aclosing`.
    """
    running: deque[asyncio.Task[Result]] = deque()

    def fill() -> None:
        while len(running) < window and (item := draw()) is not None:
            running.append(asyncio.ensure_future(work(item)))

    try:
        fill()
        while running:
            yield await running.popleft()
            fill()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
