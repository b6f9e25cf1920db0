"""Several copies of an actor behind one handle."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import cast

from protocols.errors import Unavailable
from protocols.handle import Transport
from protocols.service import Message, Method


class Replicas:
    """A transport over replicas: each call goes to the one with the fewest calls under way.

    Methods that change state go to all replicas and answer with the first one's response. A safe call whose
    replica is unavailable is tried on the others.
    """

    def __init__(self, name: str, replicas: Sequence[Transport]) -> None:
        self.name = name
        self.replicas = list(replicas)
        self.load = [0] * len(replicas)

    async def call(self, method: Method, request: Message) -> Message:
        """Send to one replica, or to all."""
        if method.dispatch == "all":
            return await self._call_all(method, request)
        tried: set[int] = set()
        while True:
            index = self._least_loaded(tried)
            tried.add(index)
            try:
                with self._counted(index):
                    return await self.replicas[index].call(method, request)
            except Unavailable:
                if not method.safe or len(tried) == len(self.replicas):
                    raise

    async def stream(self, method: Method, request: Message) -> AsyncGenerator[Message, None]:
        """Stream from one replica; from another one if it is unavailable before its first item."""
        tried: set[int] = set()
        while True:
            index, begun = self._least_loaded(tried), False
            tried.add(index)
            try:
                with self._counted(index):
                    async with aclosing(self.replicas[index].stream(method, request)) as items:
                        async for item in items:
                            begun = True
                            yield item
                return
            except Unavailable:
                if begun or len(tried) == len(self.replicas):
                    raise

    async def _call_all(self, method: Method, request: Message) -> Message:
        calls = (replica.call(method, request) for replica in self.replicas)
        # All are waited for also when one fails: none may still be changing when the caller goes on.
        answers = await asyncio.gather(*calls, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures:
            # One that is gone explains what the others ran into.
            raise next((one for one in failures if isinstance(one, Unavailable)), failures[0])
        return cast(Message, answers[0])

    def _least_loaded(self, excluded: set[int]) -> int:
        free = [i for i in range(len(self.replicas)) if i not in excluded]
        return min(free, key=lambda i: (self.load[i], i))

    @contextmanager
    def _counted(self, index: int) -> Iterator[None]:
        self.load[index] += 1
        try:
            yield
        finally:
            self.load[index] -= 1
