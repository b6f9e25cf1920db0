"""Work that is done to its end, one piece after the other."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

Result = TypeVar("Result")


class InTurn:
    """For ranks that compute together, which must all make the same calls in one order, and for shared processes."""

    def __init__(self) -> None:
        self._free = asyncio.Lock()

    async def __call__(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do one piece of work, to its end.

        A caller that leaves meanwhile does not end it, for one rank might have begun and another not.
        """
        await self._free.acquire()
        task = asyncio.ensure_future(work())
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Future[Result]) -> None:
        self._free.release()
        if not task.cancelled():
            # A caller that left does not hear of an error; asked for, it is not reported as forgotten.
            task.exception()
