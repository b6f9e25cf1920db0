"""A retriever whose documents are spread over others."""

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TypeVar

from actors.actor import Actor
from actors.retriever.folder import SHARDS, check, check_shards, claim_shards, shard_of
from actors.retriever.fusion import best, depth, fused
from protocols.errors import Corrupt
from protocols.retriever import (
    Document,
    Hit,
    IndexRequest,
    IndexResponse,
    RetrieverConfig,
    RetrieverInfo,
    RetrieverService,
    SearchRequest,
    SearchResponse,
    SearchResult,
    SnippetsRequest,
    SnippetsResponse,
)
from protocols.service import CheckpointRequest, CheckpointResponse, Empty

Result = TypeVar("Result")


class ShardedRetrieverActor(Actor, RetrieverService):
    """Sends documents to the shard of their id, asks all of them, and puts their rankings together.

    A change is one commit of each shard. If one fails the others have theirs, and the same call again completes it.
    """

    def __init__(self, config: RetrieverConfig, shards: Sequence[RetrieverService]) -> None:
        super().__init__()
        self._config = config
        self._shards = shards
        self._load = [0] * len(shards)

    async def setup(self) -> None:
        """Raises BadInput when the folder holds an index of other shards."""
        if self._config.path:
            claim_shards(Path(self._config.path).expanduser(), len(self._shards))

    async def info(self, request: Empty) -> RetrieverInfo:
        """Facts about all shards together."""
        told = await _all([shard.info(request) for shard in self._shards])
        documents = sum(one.documents for one in told)
        return told[0].model_copy(update={"documents": documents, "shards": len(told)})

    async def index(self, request: IndexRequest) -> IndexResponse:
        """Add, replace and forget documents."""
        check(request)
        documents: list[list[Document]] = [[] for _ in self._shards]
        remove: list[list[str]] = [[] for _ in self._shards]
        for document in request.documents:
            documents[shard_of(document.id, len(documents))].append(document)
        for name in request.remove:
            remove[shard_of(name, len(remove))].append(name)
        parts = (IndexRequest(documents=added, remove=gone) for added, gone in zip(documents, remove, strict=True))
        told = await _all([shard.index(part) for shard, part in zip(self._shards, parts, strict=True)])
        return IndexResponse(
            added=sum(one.added for one in told),
            replaced=sum(one.replaced for one in told),
            removed=sum(one.removed for one in told),
            documents=sum(one.documents for one in told),
        )

    async def search(self, request: SearchRequest) -> SearchResponse:
        """Find the nearest documents of all shards."""
        if self._config.kind != "hybrid" or request.kind not in (None, "hybrid"):
            return _results(await self._ranked(request, request.k))
        # Ranks are those among all documents, so what is fused are whole rankings.
        deep, kinds = depth(request.k), ("bm25", "dense")
        asked = [request.model_copy(update={"kind": kind, "k": deep}) for kind in kinds]
        rankings = await _all([self._ranked(one, deep) for one in asked])
        queries = (dict(zip(kinds, of_query, strict=True)) for of_query in zip(*rankings, strict=True))
        return _results([fused(one, self._config.fusion, request.k) for one in queries])

    async def _ranked(self, request: SearchRequest, k: int) -> list[list[Hit]]:
        """One ranking of each query."""
        told = await _all([shard.search(request) for shard in self._shards])
        of_queries = zip(*(one.results for one in told), strict=True)
        return [best([hit for part in parts for hit in part.hits], k) for parts in of_queries]

    async def snippets(self, request: SnippetsRequest) -> SnippetsResponse:
        """Find patterns in texts, on the shard that has least to do."""
        least = min(range(len(self._load)), key=lambda i: (self._load[i], i))
        self._load[least] += 1
        try:
            return await self._shards[least].snippets(request)
        finally:
            self._load[least] -= 1

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Write a folder with a copy of each shard."""
        folder = Path(request.path)
        folder.mkdir(parents=True, exist_ok=True)
        told = await _all([shard.save(part) for shard, part in zip(self._shards, self._parts(request), strict=True)])
        claim_shards(folder, len(self._shards))
        return _files(told)

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Keep what is in a saved folder instead. Raises BadInput when it is of another number of shards."""
        folder = Path(request.path)
        if not (folder / SHARDS).is_file():
            raise Corrupt(f"{folder} is not a saved retriever of several shards")
        check_shards(folder, len(self._shards))
        return _files(
            await _all([shard.load(part) for shard, part in zip(self._shards, self._parts(request), strict=True)])
        )

    def _parts(self, request: CheckpointRequest) -> list[CheckpointRequest]:
        paths = [f"{request.path}/shard-{i}" for i in range(len(self._shards))]
        return [request.model_copy(update={"path": path}) for path in paths]


def _results(rankings: Sequence[list[Hit]]) -> SearchResponse:
    return SearchResponse(results=[SearchResult(hits=hits) for hits in rankings])


def _files(told: Sequence[CheckpointResponse]) -> CheckpointResponse:
    files = [f"shard-{i}/{file}" for i, one in enumerate(told) for file in one.files]
    return CheckpointResponse(files=sorted([SHARDS, *files]))


async def _all(calls: Sequence[Awaitable[Result]]) -> list[Result]:
    """All answers. Each is waited for also when one fails: none may still be changing when the caller goes on."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]
