"""Handles to actors behind a gateway:

    policy = connect("grpc://127.0.0.1:50051", PolicyService)
    response = await policy.sample(SampleRequest(prompts=[Prompt(text="The text says")]))

A handle is the same as one of an actor in this process: methods, messages and errors. `Blocking(policy).sample(...)`
is for programs without an event loop.
"""

import asyncio
import ipaddress
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from protocols.descriptors import name_of
from protocols.errors import BadInput, Exhausted, Internal, RepertoryError, Unavailable
from protocols.handle import make_handle
from protocols.proto_schema import camel
from protocols.service import Message, Method, Service
from protocols.wire import from_bytes, to_bytes

S = TypeVar("S", bound=Service)
ACTOR = "repertory-actor"
"""Key of the metadata that names an actor where there are several of a kind."""
DETAILS = "grpc-status-details-bin"
MESSAGE_BYTES = 256 << 20
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0
"""Seconds between tries of a safe call; doubled each time."""


@dataclass(frozen=True)
class Credentials:
    """How a caller shows who it is, and knows whom it talks to."""

    token: str = ""
    """Bearer token."""
    root_certificate: str = ""
    """File of the certificate authority to trust, in PEM; empty: those of the system. Of grpcs alone."""
    certificate: str = ""
    """File of the caller's own certificate, in PEM, where the gateway asks for one."""
    key: str = ""
    """File of its key."""


def connect(
    address: str,
    service: type[S],
    *,
    actor: str = "",
    credentials: Credentials | None = None,
    deadline_s: float = 3600.0,
    tries: int = 4,
) -> S:
    """A handle to an actor behind a gateway; nothing is sent before the first call.

    `address`: grpc://HOST:PORT, or grpcs://HOST:PORT for TLS. Where HOST has several addresses, or several
    IP:PORT are given with commas between, calls go to them in turn, and past those that are down.
    `actor`: its name, where there are several of a kind.
    `tries`: how often a safe call is made while the gateway is unavailable or has no room. Raises BadInput for an
    address of another form.
    """
    scheme, _, target = address.partition("://")
    places = target.split(",")
    if scheme not in ("grpc", "grpcs") or not all(place.rpartition(":")[2].isdecimal() for place in places):
        raise BadInput(f"address: got {address!r}, expected grpc://HOST:PORT or grpcs://HOST:PORT")
    if len(places) > 1:
        if scheme == "grpcs":
            raise BadInput(f"address: got {address!r}; with TLS give one name, which may have several addresses")
        # gRPC has names for several addresses of one kind, and none for several hosts.
        if not all(_is_ip(place) for place in places):
            raise BadInput(f"address: got {address!r}, expected IP:PORT where there are several")
        target = f"ipv{6 if '[' in target else 4}:{target}"
    token = credentials.token if credentials else ""
    if not all("!" <= letter <= "~" for letter in token):
        raise BadInput("credentials.token: expected printable ASCII without blanks")
    transport = GrpcTransport(target, name_of(service), actor, scheme == "grpcs", credentials or Credentials(), tries)
    return make_handle(service, transport, deadline_s)


def _is_ip(place: str) -> bool:
    try:
        ipaddress.ip_address(place.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class GrpcTransport:
    """Reaches one actor behind a gateway, from any process."""

    target: str
    service: str
    actor: str
    tls: bool
    credentials: Credentials
    tries: int
    _channels: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Actor and gateway."""
        return f"{self.actor or self.service.rpartition('.')[2]} at {self.target}"

    async def call(self, method: Method, request: Message) -> Message:
        """One call; a safe one is made again while the gateway is unavailable or has no room."""
        invoke = self._channel().unary_unary(f"/{self.service}/{camel(method.name)}")
        data = to_bytes(request)
        for left in reversed(range(self.tries if method.safe else 1)):
            try:
                return from_bytes(method.response, await invoke(data, metadata=self._metadata()))
            except grpc.aio.AioRpcError as error:
                failure = error_of(error)
                # Without a time to come again it is a message that is too large, now and later.
                hopeless = isinstance(failure, Exhausted) and not failure.retry_after_s
                if not left or hopeless or not isinstance(failure, Unavailable | Exhausted):
                    raise failure from error
                await asyncio.sleep(_wait(failure, self.tries - 1 - left))
        raise AssertionError

    async def stream(self, method: Method, request: Message) -> AsyncGenerator[Message, None]:
        """One streaming call; closing it early ends it in the actor."""
        call = self._channel().unary_stream(f"/{self.service}/{camel(method.name)}")(
            to_bytes(request), metadata=self._metadata()
        )
        try:
            async for data in call:
                yield from_bytes(method.response, data)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    def _metadata(self) -> list[tuple[str, str]]:
        entries = [(ACTOR, self.actor)] if self.actor else []
        if self.credentials.token:
            entries.append(("authorization", f"Bearer {self.credentials.token}"))
        return entries

    def _channel(self) -> Any:
        loop = asyncio.get_running_loop()
        if loop not in self._channels:
            options = [
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.lb_policy_name", "round_robin"),
            ]
            if self.tls:
                channel = grpc.aio.secure_channel(self.target, self._tls(), options)
            else:
                channel = grpc.aio.insecure_channel(self.target, options)
            self._channels.clear()  # those of loops that have ended
            self._channels[loop] = channel
        return self._channels[loop]

    def _tls(self) -> Any:
        given = self.credentials
        try:
            root, key, certificate = (
                Path(file).read_bytes() if file else None
                for file in (given.root_certificate, given.key, given.certificate)
            )
        except OSError as error:
            raise BadInput(f"credentials: {error}") from error
        return grpc.ssl_channel_credentials(root, key, certificate)

    def __reduce__(self) -> tuple[Any, ...]:
        return GrpcTransport, (self.target, self.service, self.actor, self.tls, self.credentials, self.tries)


def _wait(failure: RepertoryError, done: int) -> float:
    if isinstance(failure, Exhausted):
        return failure.retry_after_s
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0**done) * random.uniform(0.5, 1.0)


def error_of(error: grpc.aio.AioRpcError) -> RepertoryError:
    """The error that the actor raised, with its type, text and fields."""
    code, text = error.code().name, error.details() or ""
    kinds = {kind.code: kind for kind in RepertoryError.__subclasses__()}
    violations, retry_after_s = _details(error)
    if code == "INVALID_ARGUMENT":
        return BadInput(text, violations)
    if code == "RESOURCE_EXHAUSTED":
        return Exhausted(text, retry_after_s)
    if code == "CANCELLED":  # by the gateway: who cancels a call here does not get to see it
        return Unavailable(f"the gateway has cut the call off: {text}")
    if code == "UNIMPLEMENTED":
        return BadInput(f"the gateway does not know this call: {text}")
    return kinds[code](text) if code in kinds else Internal(f"{code}: {text}")


def _details(error: grpc.aio.AioRpcError) -> tuple[list[tuple[str, str]], float]:
    """Wrong fields, and seconds to wait, as the gateway gave them."""
    fields: list[tuple[str, str]] = []
    seconds = 0.0
    status, request, retry = status_pb2.Status(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    try:
        status.ParseFromString(dict(error.trailing_metadata() or ()).get(DETAILS, b""))
    except DecodeError:
        return fields, seconds
    for detail in status.details:
        if detail.Unpack(request):
            fields += [(one.field, one.description) for one in request.field_violations]
        elif detail.Unpack(retry):
            seconds = retry.retry_delay.ToTimedelta().total_seconds()
    return fields, seconds


class Blocking:
    """The methods of a handle without await: they return responses, and iterators where the service streams."""

    def __init__(self, handle: Service) -> None:
        self._handle = handle
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="repertory-client", daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        method = self._handle.methods().get(name)
        if method is None:
            raise AttributeError(f"a {self._handle.kind} has no method {name!r}")
        invoke = getattr(self._handle, name)
        return self._stream(invoke) if method.streaming else lambda request: self._result(invoke(request))

    def _stream(self, invoke: Any) -> Any:
        def items(request: Message) -> Iterator[Message]:
            stream = cast(AsyncIterator[Message], invoke(request))
            while (item := self._result(_next(stream))) is not None:
                yield item

        return items

    def _result(self, work: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C ends the call in the actor too
            raise

    def close(self) -> None:
        """End the thread that makes the calls."""
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _next(stream: AsyncIterator[Message]) -> Message | None:
    return await anext(stream, None)
