from typing import Any

from actors.actor import start
from actors.retriever.retriever import RetrieverActor
from cluster.inline import InlineTransport
from protocols.handle import make_handle
from protocols.retriever import RetrieverConfig, RetrieverService


async def started(**given: Any) -> RetrieverService:
    """A retriever behind a handle."""
    actor = RetrieverActor(RetrieverConfig.model_validate(given))
    await start(actor)
    return make_handle(RetrieverService, InlineTransport("retriever", actor))
