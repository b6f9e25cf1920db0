"""The gRPC server: one service per actor kind, the same messages and errors as inside of the cluster."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_status import rpc_status

from cluster.gateway.auth import Callers, check_role
from cluster.gateway.config import GatewayConfig, host_and_port
from cluster.gateway.limits import Allowances, Lane, estimated_tokens
from cluster.gateway.metrics import Metrics
from protocols.client import ACTOR
from protocols.codegen import services
from protocols.descriptors import name_of, pool
from protocols.errors import SHOWN, BadInput, DeadlineExceeded, Exhausted, RepertoryError, Unavailable, classify
from protocols.handle import make_handle, service_of, transport_of
from protocols.proto_schema import camel
from protocols.service import CheckpointRequest, Message, Method, Service
from protocols.wire import from_bytes, to_bytes

logger = logging.getLogger("repertory.gateway")
REQUEST_ID = "x-request-id"
PATH = re.compile(r"[A-Za-z0-9._/-]{1,200}")
AT_ONCE = 4096
"""Calls that may be open beside those that wait; grpc refuses more."""
TEXT_BYTES, FIELD_BYTES = 1500, 200
LAST_WORDS = 1.0
"""Seconds for answers that are on their way to callers when the server stops."""


@dataclass
class Call:
    """One call from outside, while it runs and for the log."""

    id: str
    method: str
    began: float = field(default_factory=time.monotonic)
    caller: str = "-"
    code: str = "OK"


class Gateway:
    """Answers for the actors in `handles`, by name; actors that are added there later are reached too."""

    def __init__(self, config: GatewayConfig, handles: Mapping[str, Service]) -> None:
        """Raises BadInput when the file of tokens cannot be read."""
        self._config = config
        self._handles = handles
        self.checkpoints: Path | None = None
        """The folder that paths of callers are relative to, and may not leave; without one nothing is saved."""
        self._callers = Callers(config.tokens)
        self._allowances = Allowances()
        kept = round(config.tokens_at_once * config.train_share)
        infer = Lane(config.tokens_at_once - kept, config.queue)
        self.lanes = {"infer": infer, "train": Lane(kept, config.queue) if kept else infer}
        self.metrics = Metrics(self.lanes)
        self._health = health.aio.HealthServicer()
        self._server: Any = None
        self._end_metrics: Callable[[], None] | None = None
        self._under_way = 0
        self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.port = 0

    async def start(self) -> None:
        """Listen. Raises BadInput when the address is taken or the certificate cannot be read."""
        size = self._config.max_message_mb << 20
        # A caller whose machine is gone holds room until it is noticed.
        alive = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 20_000)]
        options = [*alive, ("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", -1)]
        most = 2 * self._config.queue + AT_ONCE
        # Two gateways on one port would share its callers by chance.
        self._server = grpc.aio.server(options=[*options, ("grpc.so_reuseport", 0)], maximum_concurrent_rpcs=most)
        for service in services():
            self._server.add_generic_rpc_handlers((self._handlers(service),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [name_of(service) for service in services()]
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server, pool=_reflected()
        )
        self.port = self._listen()
        if self._config.metrics:
            host, port = host_and_port("metrics", self._config.metrics)
            try:
                self._end_metrics = self.metrics.serve(host, port)
            except OSError as error:
                raise BadInput(f"gateway.metrics: cannot listen at {self._config.metrics}: {error}") from error
        await self._server.start()
        for name in ["", *names]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    @property
    def address(self) -> str:
        """Where callers of this machine reach it."""
        host = self._config.address.rpartition(":")[0]
        return f"{'grpcs' if self._config.tls else 'grpc'}://{host}:{self.port}"

    def _listen(self) -> int:
        address, tls = self._config.address, self._config.tls
        try:
            if tls is None:
                return int(self._server.add_insecure_port(address))
            key, chain = Path(tls.key).read_bytes(), Path(tls.certificate).read_bytes()
            authority = Path(tls.client_ca).read_bytes() if tls.client_ca else None
            credentials = grpc.ssl_server_credentials([(key, chain)], authority, bool(authority))
            return int(self._server.add_secure_port(address, credentials))
        except OSError as error:
            raise BadInput(f"gateway.tls: {error}") from error
        except RuntimeError as error:
            raise BadInput(f"gateway.address: cannot listen at {address}: {error}") from error

    async def close(self) -> None:
        """Refuse new calls, give those under way time to finish, then stop listening."""
        if self._server is None:
            return
        # grpc's own stop would leave a call that comes at this moment without an answer until the others are done.
        self._stopping = True
        await self._health.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_s):
                await self._idle.wait()
        await self._server.stop(grace=LAST_WORDS)
        if self._end_metrics is not None:
            await asyncio.to_thread(self._end_metrics)

    def _handlers(self, service: type[Service]) -> Any:
        def handler(method: Method) -> Any:
            # Bytes in and out: what cannot be decoded is answered as bad input, not as grpc does.
            if method.streaming:
                return grpc.unary_stream_rpc_method_handler(self._streaming(service, method))
            return grpc.unary_unary_rpc_method_handler(self._unary(service, method))

        methods = {camel(name): handler(method) for name, method in service.methods().items()}
        return grpc.method_handlers_generic_handler(name_of(service), methods)

    def _unary(self, service: type[Service], method: Method) -> Callable[[bytes, Any], Any]:
        async def answer(data: bytes, context: Any) -> bytes:
            with self._watched(service, method, context) as call:
                try:
                    async with self._admitted(service, method, data, context, call) as (handle, request):
                        return to_bytes(await getattr(handle, method.name)(request))
                # Whatever it is, the caller is to get it as a status.
                except Exception as error:
                    await self._refuse(call, context, error)
                    raise AssertionError from error

        return answer

    def _streaming(self, service: type[Service], method: Method) -> Callable[[bytes, Any], Any]:
        async def answer(data: bytes, context: Any) -> None:
            with self._watched(service, method, context) as call:
                try:
                    async with (
                        self._admitted(service, method, data, context, call) as (handle, request),
                        aclosing(getattr(handle, method.name)(request)) as items,
                    ):
                        async for item in items:
                            await self._written(to_bytes(item), context)
                # As above.
                except Exception as error:  # noqa: BLE001
                    await self._refuse(call, context, error)

        return answer

    async def _written(self, data: bytes, context: Any) -> None:
        """Send one item. Raises DeadlineExceeded when the caller does not read: it would hold its room for ever."""
        try:
            async with asyncio.timeout(self._config.stall_s):
                await context.write(data)
        except TimeoutError:
            raise DeadlineExceeded(f"the caller has read nothing for {self._config.stall_s:g} s") from None

    @asynccontextmanager
    async def _admitted(
        self, service: type[Service], method: Method, data: bytes, context: Any, call: Call
    ) -> AsyncIterator[tuple[Service, Message]]:
        """Who calls, what for, of whom, and whether there is room. Raises an error of the taxonomy."""
        if self._stopping:
            raise Unavailable("the gateway is stopping")
        metadata = dict(context.invocation_metadata())
        caller = self._callers.of(str(metadata.get("authorization", "")))
        call.caller = caller.name
        check_role(caller, method)
        with self._allowances.taken(caller):
            handle = self._handle(service, str(metadata.get(ACTOR, "")))
            request = from_bytes(method.request, data)
            if self._config.log_prompts:
                logger.info("id=%s request=%r", call.id, request)
            if isinstance(request, CheckpointRequest):
                if self.checkpoints is None:
                    raise Unavailable("nothing can be saved or loaded before the run has begun")
                request = confined(request, self.checkpoints)
            lane = self.lanes["train" if method.role == "train" else "infer"]
            cost = estimated_tokens(request, len(data), lane.capacity)
            with self._counted():
                async with lane.entered(caller.name, cost):
                    yield handle, request

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Let `close` wait for a call."""
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _refuse(self, call: Call, context: Any, error: Exception) -> None:
        failure = classify(error)
        call.code = failure.code
        if failure.code == "INTERNAL":
            logger.error("id=%s failed", call.id, exc_info=error)
        status = rpc_status.to_status(status_of(failure))
        # abort_with_status would leave out what was set before.
        await context.abort(status.code, status.details, (*status.trailing_metadata, (REQUEST_ID, call.id)))

    def _handle(self, service: type[Service], name: str) -> Service:
        # The very service: a policy's samplers and ranks, which are policies too, are not for callers.
        of_kind = {key: handle for key, handle in self._handles.items() if service_of(handle) is service}
        if not of_kind:
            raise Unavailable(f"this gateway has no {service.kind}")
        if not name:
            name = service.kind if service.kind in of_kind else min(of_kind)
        if name not in of_kind:
            raise BadInput(f"{ACTOR}: got {name!r}, expected one of {', '.join(sorted(of_kind))}")
        # One of its own: the run's timings are those of its own calls.
        return make_handle(service, transport_of(of_kind[name]))

    @contextmanager
    def _watched(self, service: type[Service], method: Method, context: Any) -> Iterator[Call]:
        """Count and log a call, however it ends."""
        given = str(dict(context.invocation_metadata()).get(REQUEST_ID, ""))
        # The log is one line per call, whatever callers send.
        id_ = given if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", given) else secrets.token_hex(8)
        call = Call(id_, f"{service.__name__}.{method.name}")
        context.set_trailing_metadata(((REQUEST_ID, id_),))
        try:
            yield call
        except asyncio.CancelledError:
            call.code = "CANCELLED"
            raise
        finally:
            seconds = time.monotonic() - call.began
            self.metrics.ended(call.method, call.code, seconds)
            logger.info(
                "id=%s caller=%s method=%s code=%s ms=%.1f", id_, call.caller, call.method, call.code, seconds * 1e3
            )


def confined(request: CheckpointRequest, folder: Path) -> CheckpointRequest:
    """The request with its path inside of the folder. Raises BadInput for one that leads out of it."""
    if not PATH.fullmatch(request.path):
        raise BadInput(
            f"path: got {request.path[:80]!r}, expected a relative path of letters,"
            " digits and . _ - /, inside of the checkpoints of this gateway"
        )
    root = folder.resolve()
    path = (root / request.path).resolve()
    if path == root or not path.is_relative_to(root):
        raise BadInput(f"path: got {request.path!r}, which leads out of the checkpoints of this gateway")
    return request.model_copy(update={"path": str(path)})


def status_of(error: RepertoryError) -> status_pb2.Status:
    """Code, text, and details in Google's error model: wrong fields, or when to come again."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=cut(error.message, TEXT_BYTES))
    if isinstance(error, BadInput) and error.fields:
        request = error_details_pb2.BadRequest()
        for path, text in error.fields[:SHOWN]:
            request.field_violations.add(field=cut(path, FIELD_BYTES), description=cut(text, FIELD_BYTES))
        status.details.append(_packed(request))
    if isinstance(error, Exhausted):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def cut(text: str, limit: int) -> str:
    """At most so many bytes of it in UTF-8: all of a status has to fit into 16 kB."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= limit else data[:limit].decode("utf-8", "ignore") + "..."


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _reflected() -> Any:
    """The published files, and those of the services that every server has."""
    found = pool()
    for module in (health_pb2, reflection_pb2):
        found.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return found
