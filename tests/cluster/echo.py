"""An actor for the tests of cluster/: it answers, fails, waits and streams as it is told."""

import asyncio
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import ClassVar

from pydantic import Field

from actors.actor import Actor
from protocols.errors import BadInput, Corrupt, DeadlineExceeded, Internal, Stale, Unavailable
from protocols.service import Empty, Message, Service, rpc
from protocols.tensor import Tensor

ERRORS = {kind.__name__: kind for kind in (BadInput, Corrupt, DeadlineExceeded, Internal, Stale, Unavailable)}


class Text(Message):
    """Some text."""

    text: str
    """What it says."""


class Count(Message):
    """Asks for numbers."""

    upto: int = Field(default=10**9, ge=0)
    """How many."""
    then: str = ""
    """How the stream goes on after them: empty, `wait` or what `fail` takes."""


class Number(Message):
    """A number."""

    value: int = Field(ge=0)
    """Which."""


class Array(Message):
    """An array."""

    values: Tensor
    """Its values."""


class ArrayReport(Message):
    """How an array arrived."""

    values: Tensor
    """The same array."""
    total: float
    """Sum of its values."""
    writeable: bool
    """Whether the actor could change it."""
    owned: bool
    """Whether its bytes were copied into the actor's own memory."""


class EchoService(Service):
    """Does what tests need."""

    kind: ClassVar[str] = "echo"

    @rpc(safe=True)
    @abstractmethod
    async def echo(self, request: Text) -> Text:
        """The same text, by way of the inner actor if there is one."""

    @rpc()
    @abstractmethod
    async def note(self, request: Text) -> Text:
        """Remember a text; answers with the process that did."""

    @rpc(dispatch="all")
    @abstractmethod
    async def rename(self, request: Text) -> Text:
        """Remember a text in every replica."""

    @rpc(safe=True)
    @abstractmethod
    async def notes(self, request: Empty) -> Text:
        """The texts that this replica remembers, and its process."""

    @rpc()
    @abstractmethod
    async def fail(self, request: Text) -> Empty:
        """Raise the error that the text names."""

    @rpc()
    @abstractmethod
    async def wait(self, request: Text) -> Empty:
        """Wait without end."""

    @rpc()
    @abstractmethod
    async def began(self, request: Text) -> Empty:
        """Return as soon as the named call has begun."""

    @rpc()
    @abstractmethod
    async def ended(self, request: Text) -> Empty:
        """Return as soon as the named call was cancelled or closed."""

    @rpc()
    @abstractmethod
    def count(self, request: Count) -> AsyncIterator[Number]:
        """0, 1, 2, ..."""

    @rpc(safe=True)
    @abstractmethod
    async def array(self, request: Array) -> ArrayReport:
        """Say how an array arrived, and send it back."""

    @rpc(safe=True)
    @abstractmethod
    async def die(self, request: Text) -> Empty:
        """End the process if the text is its name or empty."""


class EchoActor(Actor, EchoService):
    """The one implementation."""

    def __init__(
        self, *, unbuildable: str = "", broken: str = "", stubborn: bool = False, inner: EchoService | None = None
    ) -> None:
        super().__init__()
        if unbuildable:
            _raise(unbuildable)
        self._broken = broken
        self._stubborn = stubborn
        self._inner = inner
        self._notes: list[str] = []
        self._began: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._ended: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def setup(self) -> None:
        if self._broken:
            _raise(self._broken)

    async def close(self) -> None:
        await super().close()
        if self._stubborn:
            await asyncio.Event().wait()

    def state(self) -> Text:
        return Text(text=" ".join(self._notes))

    def load_state(self, text: str) -> None:
        self._notes = Text.model_validate_json(text).text.split()

    async def echo(self, request: Text) -> Text:
        return await self._inner.echo(request) if self._inner else request

    async def note(self, request: Text) -> Text:
        self._notes.append(request.text)
        return Text(text=str(os.getpid()))

    async def rename(self, request: Text) -> Text:
        return await self.note(request)

    async def notes(self, request: Empty) -> Text:
        return Text(text=" ".join([str(os.getpid()), *self._notes]))

    async def fail(self, request: Text) -> Empty:
        if self._inner:
            return await self._inner.fail(request)
        _raise(request.text)
        return Empty()

    async def wait(self, request: Text) -> Empty:
        self._began[request.text].set()
        try:
            await asyncio.Event().wait()
        finally:
            self._ended[request.text].set()
        return Empty()

    async def began(self, request: Text) -> Empty:
        await self._began[request.text].wait()
        return Empty()

    async def ended(self, request: Text) -> Empty:
        await self._ended[request.text].wait()
        return Empty()

    async def count(self, request: Count) -> AsyncIterator[Number]:
        try:
            for value in range(request.upto):
                yield Number(value=value)
            if request.then == "wait":
                await asyncio.Event().wait()
            elif request.then:
                _raise(request.then)
        finally:
            self._ended["count"].set()

    async def array(self, request: Array) -> ArrayReport:
        array = request.values.array
        base = array
        while getattr(base, "base", None) is not None:
            base = base.base
        return ArrayReport(
            values=request.values,
            total=float(request.values.numpy().sum(dtype="float64")),
            writeable=bool(array.flags.writeable),
            owned=hasattr(base, "flags"),
        )

    async def die(self, request: Text) -> Empty:
        if request.text in ("", str(os.getpid())):
            os._exit(1)
        return Empty()


def _raise(what: str) -> None:
    name, _, text = what.partition(": ")
    if name in ERRORS:
        raise ERRORS[name](text)
    if name == "ValidationError":
        Number(value=-1)
    raise ValueError(text)
