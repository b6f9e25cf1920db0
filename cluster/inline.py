"""The inline transport: the actor is an object in this process."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from actors.actor import Actor, answer, answer_stream
from protocols.service import Message, Method


@dataclass(frozen=True)
class InlineTransport:
    """Calls an actor directly. Messages are immutable, so nothing is copied."""

    name: str
    actor: Actor

    async def call(self, method: Method, request: Message) -> Message:
        """Let the actor answer."""
        return await answer(self.actor, method.name, request)

    def stream(self, method: Method, request: Message) -> AsyncGenerator[Message, None]:
        """Let the actor answer, item by item."""
        return answer_stream(self.actor, method.name, request)

    def __reduce__(self) -> str:
        raise TypeError(f"the actor {self.name!r} lives in this process and cannot be sent to another")
