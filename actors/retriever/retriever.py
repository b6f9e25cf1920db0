"""The retriever actor: finds on threads, changes its index on one of its own."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

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
from protocols.service import CheckpointRequest, CheckpointResponse, Empty

if TYPE_CHECKING:
    from actors.retriever.index import DocumentIndex

Result = TypeVar("Result")


class RetrieverActor(Actor, RetrieverService):
    """Cuts snippets, and where its kind has an index finds documents in it."""

    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        self._config = config
        self._index: DocumentIndex | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="retriever-index")
        self._readers = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="retriever")

    async def setup(self) -> None:
        """Open the index, and load the encoder. Raises BadInput when they do not fit the configuration."""
        if self._config.kind != "pattern":
            self._index = await self._run(self._writer, self._open)

    def _open(self) -> "DocumentIndex":
        from actors.retriever.index import DocumentIndex

        return DocumentIndex(self._config)

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    async def close(self) -> None:
        """Stop the threads, and leave the index to others."""
        await super().close()
        for threads in (self._readers, self._writer):
            await asyncio.to_thread(threads.shutdown, wait=True, cancel_futures=True)
        if self._index is not None:
            await asyncio.to_thread(self._index.close)
            self._index = None

    async def info(self, request: Empty) -> RetrieverInfo:
        """Facts about the retriever."""
        encoder = self._index.encoder if self._index is not None else None
        return RetrieverInfo(
            kind=self._config.kind,
            documents=len(self._index) if self._index is not None else 0,
            encoder=self._config.encoder if encoder is not None else "",
            dimensions=encoder.dimensions if encoder is not None else 0,
        )

    async def index(self, request: IndexRequest) -> IndexResponse:
        """Add, replace and forget documents."""
        index = self._kept("index")
        return await self._run(self._writer, lambda: index.change(request))

    async def search(self, request: SearchRequest) -> SearchResponse:
        """Find the nearest documents."""
        index = self._kept("search")
        return await self._run(self._readers, lambda: index.search(request))

    async def snippets(self, request: SnippetsRequest) -> SnippetsResponse:
        """Find patterns in texts."""
        return SnippetsResponse(snippets=await self._run(self._readers, lambda: snippets(request)))

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Write a copy of the index, from which a retriever can be opened again, by `path` or `load`."""
        index, folder = self._index, Path(request.path)
        if index is None:
            return await super().save(request)
        await self._run(self._writer, lambda: index.write(folder))
        return CheckpointResponse(files=_files(folder))

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Keep what is in a saved index instead; searches are answered by the old one until then."""
        index, folder = self._index, Path(request.path)
        if index is None:
            return await super().load(request)
        await self._run(self._writer, lambda: index.take(folder))
        return CheckpointResponse(files=_files(folder))

    def _kept(self, method: str) -> "DocumentIndex":
        if self._index is None:
            raise BadInput(f"{method}: kind: got {self._config.kind!r}, expected bm25, dense or hybrid")
        return self._index


def _files(folder: Path) -> list[str]:
    # Those within are named by chance.
    return sorted(one.name for one in folder.iterdir())
