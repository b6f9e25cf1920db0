"""Several copies of an actor behind one handle."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

from cluster.handle import Transport
from protocols.errors import Unavailable
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
            responses = await asyncio.gather(*(replica.call(method, request) for replica in self.replicas))
            return responses[0]
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

    async def stream(self, method: Method, request: Message) -> AsyncIterator[Message]:
        """Stream from one replica."""
        index = self._least_loaded(set())
        with self._counted(index):
            async for item in self.replicas[index].stream(method, request):
                yield item

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
