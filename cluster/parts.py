"""Work on many parts of the input, in this process or by Ray Data beside the data."""

import asyncio
import pickle
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from protocols.errors import RepertoryError
from protocols.service import Message

Part = TypeVar("Part", bound=Message)
Result = TypeVar("Result", bound=Message)


def each(
    work: Callable[[Part], Awaitable[Result]], parts: Sequence[Part], *, transport: str, at_once: int
) -> AsyncGenerator[Result, None]:
    """What `work` makes of each part, as they end: one after the other inline, `at_once` of them on Ray.

    `work` goes to other processes there, with the handles that it holds.
    """
    return _by_ray_data(work, parts, at_once) if transport == "ray" and parts else _one_by_one(work, parts)


async def _one_by_one(
    work: Callable[[Part], Awaitable[Result]], parts: Sequence[Part]
) -> AsyncGenerator[Result, None]:
    for part in parts:
        yield await work(part)


async def _by_ray_data(
    work: Callable[[Part], Awaitable[Result]], parts: Sequence[Part], at_once: int
) -> AsyncGenerator[Result, None]:
    """In Ray tasks, `at_once` of them. What they raise is raised here.

    A part whose worker dies is worked on again by another.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A part is one block, so that one that fails costs itself alone. Columns of bytes spare Arrow from guessing.
    rows = ray.data.from_items([{"part": pickle.dumps(part)} for part in parts], override_num_blocks=len(parts))
    done = rows.map(partial(_worked, work), num_cpus=0, compute=ray.data.TaskPoolStrategy(size=at_once))
    iterator = iter(done.iter_rows())
    while (row := await asyncio.to_thread(next, iterator, None)) is not None:
        found = pickle.loads(row["found"])
        if isinstance(found, RepertoryError):
            raise found
        yield found


def _worked(work: Callable[[Any], Awaitable[Any]], row: dict[str, bytes]) -> dict[str, bytes]:
    """One part, in a Ray task; an error of ours comes back as a value, for Ray would wrap it."""

    async def once() -> Any:
        return await work(pickle.loads(row["part"]))

    try:
        found = asyncio.run(once())
    except RepertoryError as error:
        found = error
    return {"found": pickle.dumps(found)}
