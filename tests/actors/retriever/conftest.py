from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from actors.actor import Actor, start
from actors.retriever.retriever import RetrieverActor
from cluster.inline import InlineTransport
from protocols.handle import make_handle
from protocols.retriever import Document, Hit, RetrieverConfig, RetrieverService, SearchRequest

Starter = Callable[..., Awaitable[RetrieverService]]


async def hits(retriever: RetrieverService, query: str, k: int = 10, **given: Any) -> list[Hit]:
    request = SearchRequest.model_validate({"queries": [query], "k": k, **given})
    return (await retriever.search(request)).results[0].hits


async def ids(retriever: RetrieverService, query: str, k: int = 10, **given: Any) -> list[str]:
    return [hit.id for hit in await hits(retriever, query, k, **given)]


def documents(**texts: str) -> list[Document]:
    return [Document(id=name, text=text) for name, text in texts.items()]


@pytest.fixture
async def started() -> AsyncIterator[Starter]:
    """Starts retrievers behind handles, and closes them."""
    actors: list[Actor] = []

    async def begin(**given: Any) -> RetrieverService:
        actor = RetrieverActor(RetrieverConfig.model_validate(given))
        actors.append(actor)
        await start(actor)
        return make_handle(RetrieverService, InlineTransport("retriever", actor))

    yield begin
    for actor in actors:
        await actor.close()
