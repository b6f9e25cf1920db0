"""The retriever actor: finds on threads, changes its index on one of its own."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from actors.actor import Actor
from actors.retriever.snippets import snippets
from protocols.errors import BadInput
from protocols.retriever import (
    IndexRequest,
    IndexResponse,
    RetrieverConfig,
    RetrieverInfo,
    RetrieverService,
    SearchRequest,
    SearchResponse,
    SnippetsRequest,
    SnippetsResponse,
)
from protocols.service import Empty

Result = TypeVar("Result")


class RetrieverActor(Actor, RetrieverService):
    """Cuts snippets, and where its kind has an index finds documents in it."""

    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        self._config = config
        self._readers = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="retriever")

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    async def close(self) -> None:
        """Stop the threads."""
        await super().close()
        await asyncio.to_thread(self._readers.shutdown, wait=True, cancel_futures=True)

    async def info(self, request: Empty) -> RetrieverInfo:
        """Facts about the retriever."""
        return RetrieverInfo(kind=self._config.kind, documents=0)

    async def index(self, request: IndexRequest) -> IndexResponse:
        """Add, replace and forget documents."""
        raise self._without_index("index")

    async def search(self, request: SearchRequest) -> SearchResponse:
        """Find the nearest documents."""
        raise self._without_index("search")

    async def snippets(self, request: SnippetsRequest) -> SnippetsResponse:
        """Find patterns in texts."""
        return SnippetsResponse(snippets=await self._run(lambda: snippets(request)))

    def _without_index(self, method: str) -> BadInput:
        return BadInput(f"{method}: kind: got {self._config.kind!r}, expected bm25, dense or hybrid")
