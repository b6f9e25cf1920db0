"""A gateway: its doors, and what they share."""

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from cluster.gateway.admission import Admission
from cluster.gateway.config import GatewayConfig, TLSConfig, host_and_port
from cluster.gateway.grpc_server import GrpcServer
from protocols.errors import BadInput
from protocols.service import Service

if TYPE_CHECKING:
    from cluster.gateway.openai_server import OpenAIServer


class Gateway:
    """Answers for the actors in `handles`, by name; actors that are added there later are reached too."""

    def __init__(self, config: GatewayConfig, handles: Mapping[str, Service]) -> None:
        """Raises BadInput when the file of tokens cannot be read."""
        self._config = config
        self.admission = Admission(config, handles)
        self._grpc = GrpcServer(config, self.admission)
        self._http = _http_door(config, self.admission) if config.http else None
        self._open = AsyncExitStack()

    async def start(self) -> None:
        """Open all doors, or none. Raises BadInput when an address is taken or a certificate cannot be read."""
        async with AsyncExitStack() as stack:
            if self._config.metrics:
                host, port = host_and_port("metrics", self._config.metrics)
                try:
                    stack.push_async_callback(asyncio.to_thread, self.admission.metrics.serve(host, port))
                except OSError as error:
                    raise BadInput(f"gateway.metrics: cannot listen at {self._config.metrics}: {error}") from error
            if self._http is not None:
                await self._http.start(tls_context(self._config.tls) if self._config.tls else None)
                stack.push_async_callback(self._http.close)
            await self._grpc.start()
            stack.push_async_callback(self._grpc.close)
            self._open = stack.pop_all()

    async def close(self) -> None:
        """Refuse new calls, give those under way time to finish, then stop listening."""
        await self._grpc.refuse()
        await self.admission.finished(self._config.drain_s)
        await self._open.aclose()

    @property
    def port(self) -> int:
        """Of the gRPC door."""
        return self._grpc.port

    @property
    def address(self) -> str:
        """Where callers of this machine reach it."""
        host = self._config.address.rpartition(":")[0]
        return f"{'grpcs' if self._config.tls else 'grpc'}://{host}:{self._grpc.port}"

    @property
    def base_url(self) -> str:
        """Where OpenAI's clients of this machine reach it; empty without that door."""
        if self._http is None:
            return ""
        host = self._config.http.rpartition(":")[0]
        return f"{'https' if self._config.tls else 'http'}://{host}:{self._http.port}/v1"


def _http_door(config: GatewayConfig, admission: Admission) -> "OpenAIServer":
    # OpenAI's types take a second to load.
    from cluster.gateway.openai_server import OpenAIServer

    return OpenAIServer(config, admission)


def tls_context(config: TLSConfig) -> ssl.SSLContext:
    """The certificate as Python's servers take it. Raises BadInput when it cannot be read."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.certificate, config.key)
        if config.client_ca:
            context.load_verify_locations(config.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise BadInput(f"gateway.tls: {error}") from error
    return context
