"""The Ray transport: each actor in a named Ray actor, messages through the object store.

ray is imported when the first actor is spawned, so inline runs never load it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from actors.actor import Actor, answer, answer_stream, start
from protocols.errors import Internal, RepertoryError, Unavailable, classify
from protocols.placement import Resources
from protocols.service import Message, Method

# Concurrency is bounded by the actor itself (a policy works on one thread); Ray must not add a queue to it.
MAX_CONCURRENCY = 1000


class ActorHost:
    """Runs inside the Ray actor. Errors go back as values, because Ray would change their type and text."""

    def __init__(self, build: Callable[[], Actor]) -> None:
        self._actor = build()

    async def start(self) -> RepertoryError | None:
        """Set the actor up; an error is returned."""
        try:
            await start(self._actor)
        except RepertoryError as error:
            return error
        return None

    async def call(self, method: str, request: Message) -> Message | RepertoryError:
        """One call; an error is returned."""
        try:
            return await answer(self._actor, method, request)
        except RepertoryError as error:
            return error

    async def stream(self, method: str, request: Message) -> AsyncIterator[Message | RepertoryError]:
        """One streaming call; an error is the last item."""
        try:
            async for item in answer_stream(self._actor, method, request):
                yield item
        except RepertoryError as error:
            yield error

    async def close(self) -> None:
        """Let the actor give back what it took."""
        await self._actor.close()


@dataclass(frozen=True)
class RayTransport:
    """Reaches an actor by its name in a Ray namespace, from any process of the cluster."""

    name: str
    namespace: str

    @cached_property
    def _host(self) -> Any:
        import ray

        try:
            return ray.get_actor(self.name, self.namespace)
        except ValueError as error:
            raise Unavailable(f"there is no actor {self.name!r} in the Ray namespace {self.namespace!r}") from error

    async def call(self, method: Method, request: Message) -> Message:
        """One remote call. When the caller is cancelled, the call is cancelled in the actor too."""
        import ray

        reference = self._host.call.remote(method.name, request)
        try:
            result = await reference
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except ray.exceptions.RayError as error:
            raise self._translated(error) from error
        return _unwrap(result)

    async def stream(self, method: Method, request: Message) -> AsyncIterator[Message]:
        """One remote streaming call."""
        import ray

        items = self._host.stream.options(num_returns="streaming").remote(method.name, request)
        finished = False
        try:
            async for reference in items:
                yield _unwrap(await reference)
            finished = True
        except ray.exceptions.RayError as error:
            raise self._translated(error) from error
        finally:
            if not finished:
                ray.cancel(items)

    def _translated(self, error: Exception) -> RepertoryError:
        import ray

        if isinstance(error, ray.exceptions.RayActorError):
            return Unavailable(f"the actor {self.name!r} has died: {str(error).strip().splitlines()[0]}")
        return classify(error)

    def __reduce__(self) -> tuple[Any, ...]:
        return RayTransport, (self.name, self.namespace)


async def spawn(name: str, namespace: str, build: Callable[[], Actor], resources: Resources) -> RayTransport:
    """Start a named Ray actor and set up what it hosts. Raises what the set-up raised."""
    import ray

    host = (
        ray.remote(ActorHost)
        .options(
            name=name,
            namespace=namespace,
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_concurrency=MAX_CONCURRENCY,
        )
        .remote(build)
    )
    transport = RayTransport(name, namespace)
    # The named actor lives as long as a handle to it does, so the transport must hold this one.
    transport.__dict__["_host"] = host
    try:
        failure = await host.start.remote()
    except ray.exceptions.RayError as error:
        raise transport._translated(error) from error
    if failure is not None:
        ray.kill(host)
        raise failure
    return transport


async def stop(transport: RayTransport) -> None:
    """Close the hosted actor and end its process."""
    import ray

    try:
        await transport._host.close.remote()
    except ray.exceptions.RayError:
        return
    ray.kill(transport._host)


def connect(namespace: str) -> None:
    """Join the Ray cluster that RAY_ADDRESS names, or start one on this machine."""
    import ray

    if not ray.is_initialized():
        ray.init(namespace=namespace, include_dashboard=False, log_to_driver=False, logging_level="WARNING")


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends."""
    import ray

    ray.shutdown()


def _unwrap(result: Any) -> Message:
    if isinstance(result, RepertoryError):
        raise result
    if not isinstance(result, Message):
        raise Internal(f"expected a message, got a {type(result).__name__}")
    return result
