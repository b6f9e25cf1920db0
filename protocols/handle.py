"""Typed handles: an object with a service's methods, whichever way its calls travel.

A handle is an instance of a subclass of the service class itself, so a type checker and a script see the
service and nothing else. Deadlines, timing and the check of the request live here, so that loops stay clean.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, TypeVar, cast

from protocols.errors import BadInput, DeadlineExceeded
from protocols.service import Message, Method, Service

S = TypeVar("S", bound=Service)


class Transport(Protocol):
    """How a call reaches an actor. Errors arrive as errors of the taxonomy."""

    @property
    def name(self) -> str:
        """The actor's name."""

    async def call(self, method: Method, request: Message) -> Message:
        """Send one request, return its response."""

    def stream(self, method: Method, request: Message) -> AsyncGenerator[Message, None]:
        """Send one request, yield what comes back. Closing it early ends the call in the actor."""


@dataclass
class CallTimes:
    """Number and total seconds of the calls that a handle made, by method."""

    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, method: str, seconds: float) -> None:
        """Count one call."""
        self.calls[method] += 1
        self.seconds[method] += seconds


class Handle:
    """What every handle carries beside its service's methods."""

    transport: Transport
    deadline_s: float
    times: CallTimes


def make_handle(service: type[S], transport: Transport, deadline_s: float = 3600.0) -> S:
    """A handle that sends the service's methods over a transport."""
    handle = _handle_class(service)()
    handle.transport, handle.deadline_s, handle.times = transport, deadline_s, CallTimes()
    return cast(S, handle)


def with_deadline(handle: S, deadline_s: float) -> S:
    """The same actor behind a handle that waits at most so many seconds for each call."""
    inner = cast(Handle, handle)
    return cast(S, make_handle(service_of(handle), inner.transport, deadline_s))


def call_times(handle: Service) -> CallTimes:
    """What the calls through this handle took."""
    return cast(Handle, handle).times


def transport_of(handle: Service) -> Transport:
    """The transport behind a handle."""
    return cast(Handle, handle).transport


@cache
def _handle_class(service: type[Service]) -> type[Any]:
    methods = {
        method.name: _streaming(method) if method.streaming else _unary(method)
        for method in service.methods().values()
    }
    return type(f"{service.__name__}Handle", (Handle, service), {**methods, "__reduce__": _reduce})


def _reduce(handle: Any) -> tuple[Any, ...]:
    return make_handle, (service_of(handle), handle.transport, handle.deadline_s)


def service_of(handle: Any) -> type[Any]:
    """The service class that a handle was made for."""
    service: type[Any] = type(handle).__mro__[2]
    return service


def _unary(method: Method) -> Callable[..., Any]:
    async def call(self: Handle, request: Message) -> Message:
        _check(self, method, request)
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.deadline_s):
                return await self.transport.call(method, request)
        except TimeoutError:
            raise DeadlineExceeded(_too_late(self, method)) from None
        finally:
            self.times.add(method.name, time.monotonic() - started)

    call.__name__ = method.name
    return call


def _streaming(method: Method) -> Callable[..., Any]:
    async def stream(self: Handle, request: Message) -> AsyncIterator[Message]:
        _check(self, method, request)
        started = time.monotonic()
        try:
            async with aclosing(self.transport.stream(method, request)) as items:
                while True:
                    async with asyncio.timeout(self.deadline_s):
                        item = await anext(items, None)
                    if item is None:
                        return
                    yield item
        except TimeoutError:
            raise DeadlineExceeded(_too_late(self, method)) from None
        finally:
            self.times.add(method.name, time.monotonic() - started)

    stream.__name__ = method.name
    return stream


def _check(handle: Handle, method: Method, request: Message) -> None:
    if not isinstance(request, method.request):
        name = handle.transport.name
        raise BadInput(f"{name}.{method.name} takes a {method.request.__name__}, got a {type(request).__name__}")


def _too_late(handle: Handle, method: Method) -> str:
    return f"{handle.transport.name}.{method.name} did not answer within {handle.deadline_s:g} s"
