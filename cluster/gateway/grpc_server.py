"""The gRPC server: one service per actor kind, the same messages and errors as inside of the cluster."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_status import rpc_status

from cluster.gateway.admission import REQUEST_ID, Admission, Call
from cluster.gateway.config import LAST_WORDS, GatewayConfig
from cluster.gateway.routed import ROUTE, RoutedPolicy
from protocols.client import ACTOR
from protocols.codegen import services
from protocols.descriptors import name_of, pool
from protocols.errors import SHOWN, BadInput, DeadlineExceeded, Exhausted, RepertoryError
from protocols.proto_schema import camel
from protocols.service import Message, Method, Service
from protocols.wire import from_bytes, to_bytes

TEXT_BYTES, FIELD_BYTES = 1500, 200


class GrpcServer:
    """The gateway's first door."""

    def __init__(self, config: GatewayConfig, admission: Admission) -> None:
        self._config = config
        self._admission = admission
        self._health = health.aio.HealthServicer()
        self._server: Any = None
        self.port = 0

    async def start(self) -> None:
        """Listen. Raises BadInput when the address is taken or the certificate cannot be read."""
        size = self._config.max_message_mb << 20
        # A caller whose machine is gone holds room until it is noticed.
        alive = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 20_000)]
        options = [*alive, ("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", -1)]
        # Two gateways on one port would share its callers by chance.
        self._server = grpc.aio.server(
            options=[*options, ("grpc.so_reuseport", 0)], maximum_concurrent_rpcs=self._config.most_open
        )
        for service in services():
            self._server.add_generic_rpc_handlers((self._handlers(service),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [name_of(service) for service in services()]
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server, pool=_reflected()
        )
        self.port = self._listen()
        await self._server.start()
        for name in ["", *names]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def refuse(self) -> None:
        """Tell those who ask for its health that it stops."""
        await self._health.enter_graceful_shutdown()

    async def close(self) -> None:
        """Stop listening."""
        await self._server.stop(grace=LAST_WORDS)

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
                        response = await getattr(handle, method.name)(request)
                        self._tell_route(handle, call, context)
                        self._admission.metrics.drew(call.method, response)
                        return to_bytes(response)
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
                            self._tell_route(handle, call, context)
                            self._admission.metrics.drew(call.method, item)
                            await self._written(to_bytes(item), context)
                # As above.
                except Exception as error:  # noqa: BLE001
                    await self._refuse(call, context, error)

        return answer

    def _tell_route(self, handle: Service, call: Call, context: Any) -> None:
        """Add to what the caller gets at the end who answered."""
        if isinstance(handle, RoutedPolicy) and handle.decisions and not call.route:
            call.route = handle.told()
            context.set_trailing_metadata(((REQUEST_ID, call.id), (ROUTE, call.route)))
            self._admission.metrics.routed(handle)

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
        """The actor and what to send it. Raises an error of the taxonomy."""
        metadata = dict(context.invocation_metadata())
        with self._admission.known(call, method.role, str(metadata.get("authorization", ""))) as caller:
            handle = self._admission.handle(service, str(metadata.get(ACTOR, "")))
            request = from_bytes(method.request, data)
            async with self._admission.room(call, caller, method.role, request, len(data)) as admitted:
                yield handle, admitted

    @contextmanager
    def _watched(self, service: type[Service], method: Method, context: Any) -> Iterator[Call]:
        given = str(dict(context.invocation_metadata()).get(REQUEST_ID, ""))
        with self._admission.watched(f"{service.__name__}.{method.name}", given) as call:
            context.set_trailing_metadata(((REQUEST_ID, call.id),))
            yield call

    async def _refuse(self, call: Call, context: Any, error: Exception) -> None:
        status = rpc_status.to_status(status_of(call.failed(error)))
        # abort_with_status would leave out what was set before.
        await context.abort(status.code, status.details, (*status.trailing_metadata, (REQUEST_ID, call.id)))


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
