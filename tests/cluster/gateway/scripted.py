"""A gateway over handles that do as a test tells them, and bytes sent to it without the client."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from prometheus_client import generate_latest

from cluster.gateway.config import GatewayConfig
from cluster.gateway.gateway import Gateway
from protocols.handle import make_handle
from protocols.messages import Completion, FinishReason, Prompt, SamplingParams
from protocols.policy import PolicyInfo, PolicyService, Sampled, SampleDelta, SampleRequest, SampleResponse
from protocols.service import CheckpointResponse, Empty, HealthResponse, Message, Method, Service

COMPLETION = Completion(
    tokens=np.asarray([5]),
    text="yes",
    logprobs=np.asarray([-0.5]),
    versions=np.asarray([0]),
    finish_reason=FinishReason.STOP,
)
ANSWERS: dict[str, Message] = {
    "health": HealthResponse(kind="policy", ready=True),
    "sample": SampleResponse(results=[Sampled(prompt_tokens=np.asarray([4]), completions=[COMPLETION])]),
    "info": PolicyInfo(
        model="m",
        parameters=1,
        trainable_parameters=0,
        vocab_size=9,
        context_length=9,
        eos_token_ids=[1],
        version=3,
    ),
    "save": CheckpointResponse(files=[]),
    "drain": Empty(),
}
DELTA = SampleDelta(
    prompt_index=0,
    sample_index=0,
    tokens=np.asarray([5]),
    text="y",
    logprobs=np.asarray([-0.5]),
    versions=np.asarray([0]),
)


@dataclass
class Scripted:
    """A transport that answers at once, fails, or waits until it is let go."""

    name: str = "policy"
    error: Exception | None = None
    last: SampleDelta = DELTA
    waits: bool = False
    requests: list[Message] = field(default_factory=list)
    began: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    go: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    cancelled: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def call(self, method: Method, request: Message) -> Message:
        if method.name != "health":
            await self._follow(request)
        return ANSWERS[method.name]

    async def stream(self, method: Method, request: Message) -> AsyncGenerator[Message, None]:
        yield DELTA
        await self._follow(request)
        yield self.last

    async def _follow(self, request: Message) -> None:
        self.requests.append(request)
        self.began.release()
        if self.error is not None:
            raise self.error
        try:
            if self.waits:
                await self.go.acquire()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.release()
            raise


def a_handle(transport: Scripted) -> PolicyService:
    return make_handle(PolicyService, transport)


@asynccontextmanager
async def a_gateway(handles: dict[str, Service], folder: Path, **given: Any) -> AsyncIterator[Gateway]:
    config = GatewayConfig.model_validate({"address": "127.0.0.1:0"} | given)
    gateway = Gateway(config, handles)
    gateway.admission.checkpoints = folder / "remote"
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.close()


def counters(gateway: Gateway) -> str:
    """What Prometheus would read."""
    return str(generate_latest(gateway.admission.metrics.registry).decode())


def a_request(seed: int = 1, **params: Any) -> SampleRequest:
    return SampleRequest(prompts=[Prompt(text="x", seed=seed)], params=SamplingParams.model_validate(params))


async def collected(stream: Any) -> list[bytes]:
    return [item async for item in stream]


@asynccontextmanager
async def raw(gateway: Gateway) -> AsyncIterator[Callable[..., Any]]:
    """Send bytes to a method; the call is returned, to be awaited."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:

        def send(path: str, data: bytes = b"", metadata: Any = (), **options: Any) -> Any:
            service, _, method = path.partition("/")
            full = f"/repertory.v1.{service}/{method}"
            if method == "Stream":
                return collected(channel.unary_stream(full)(data, metadata=metadata, **options))
            return channel.unary_unary(full)(data, metadata=metadata, **options)

        yield send
