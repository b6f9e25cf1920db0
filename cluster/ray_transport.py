"""The Ray transport: each actor in a named Ray actor, messages through the object store.

ray is imported when the first actor is spawned, so inline runs never load it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from actors.actor import Actor, answer, answer_stream, start
from protocols.errors import BadInput, DeadlineExceeded, Internal, RepertoryError, Unavailable, classify
from protocols.placement import Resources
from protocols.service import Message, Method
from protocols.workers import Rank

# Concurrency is bounded by the actor itself (a policy works on one thread); Ray must not add a queue to it.
MAX_CONCURRENCY = 1000
# Seconds: without a word while an actor waits for a place, for one to close, for a cluster to answer at all.
PLACE_QUIETLY, CLOSE, REACH = 30.0, 10.0, 10.0

logger = logging.getLogger(__name__)


class Part(Message):
    """What a Ray actor is to its run."""

    handle: str
    """Name of the handle that it stands behind, perhaps with others."""
    service: str
    """Class of the handle's service."""
    index: int = 0
    """Which of the actors behind the handle."""


class ActorHost:
    """Runs inside the Ray actor. Errors go back as values, because Ray would change their type and text."""

    def __init__(self, build: Callable[..., Actor], part: Part) -> None:
        self._build = build
        self._part = part
        self._actor: Actor | None = None

    async def part(self) -> Part:
        """What it is to its run."""
        return self._part

    async def meeting_point(self) -> str:
        """HOST:PORT on this node where a group of workers can meet."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    async def start(self, *arguments: Message) -> RepertoryError | None:
        """Build the actor and set it up; an error is returned."""
        try:
            actor = self._build(*arguments)
            await start(actor)
        # Building imports what the actor needs, which may fail in any way.
        except Exception as error:  # noqa: BLE001
            return classify(error)
        self._actor = actor
        return None

    async def call(self, method: str, request: Message) -> Message | RepertoryError:
        """One call; an error is returned."""
        try:
            return await answer(self._up(), method, request)
        except RepertoryError as error:
            return error

    async def stream(self, method: str, request: Message) -> AsyncGenerator[Message | RepertoryError, None]:
        """One streaming call; an error is the last item."""
        try:
            async for item in answer_stream(self._up(), method, request):
                yield item
        except RepertoryError as error:
            yield error

    def _up(self) -> Actor:
        # Whoever finds it by its name may come before it is.
        if self._actor is None:
            raise Unavailable(f"the actor {self._part.handle!r} is being set up")
        return self._actor

    async def close(self) -> None:
        """Let the actor give back what it took."""
        if self._actor is not None:
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

    async def stream(self, method: Method, request: Message) -> AsyncGenerator[Message, None]:
        """One remote streaming call; one that is closed early is cancelled in the actor too."""
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
        return type(self), (self.name, self.namespace)


class BorrowedTransport(RayTransport):
    """Reaches an actor that another process has started, and may start again under the same name."""

    def _translated(self, error: Exception) -> RepertoryError:
        self.__dict__.pop("_host", None)
        return super()._translated(error)


@dataclass(frozen=True)
class Place:
    """Where an actor of a group goes: a bundle of a placement group, which holds room for it."""

    group: Any
    bundle: int


async def reserve(name: str, bundles: Sequence[Resources], deadline_s: float = 3600.0) -> Any:
    """Set resources aside, all of them or none, near each other. Returns Ray's placement group.

    Two runs that start at once would otherwise take half of a cluster each and wait for the other half.
    """
    import ray.util

    asked = [{"CPU": one.cpus, "GPU": one.gpus} for one in bundles]
    group = ray.util.placement_group([{kind: n for kind, n in one.items() if n} for one in asked], strategy="PACK")
    total = Resources(cpus=sum(one.cpus for one in bundles), gpus=sum(one.gpus for one in bundles))
    try:
        async with asyncio.timeout(deadline_s):
            with _warned(f"the processes of {name!r} wait", total):
                await group.ready()
    except BaseException as error:
        release(group)
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"no room for the processes of {name!r} within {deadline_s:g} s") from None
        raise
    return group


def release(group: Any) -> None:
    """Give back what `reserve` set aside."""
    import ray.util

    ray.util.remove_placement_group(group)


async def spawn(
    name: str,
    namespace: str,
    part: Part,
    build: Callable[[], Actor],
    resources: Resources,
    deadline_s: float = 3600.0,
    place: Place | None = None,
) -> RayTransport:
    """Start a named Ray actor and set up what it hosts, within the deadline. Raises what the set-up raised."""
    transport = _create(name, namespace, part, build, resources, place)
    await _or_kill([transport], _set_up(transport, resources, deadline_s))
    return transport


async def spawn_group(
    names: Sequence[str],
    namespace: str,
    part: Part,
    build: Callable[[Rank], Actor],
    resources: Resources,
    deadline_s: float = 3600.0,
    places: Sequence[Place | None] = (),
) -> list[RayTransport]:
    """Start the ranks of a worker group: all must be placed before the first sets up, which waits for the others."""
    where = places or [None] * len(names)
    transports = [
        _create(name, namespace, part.model_copy(update={"index": i}), build, resources, where[i])
        for i, name in enumerate(names)
    ]

    async def set_up() -> None:
        async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as group:
            for transport in transports:
                group.create_task(_placed(transport, resources))
        address = await transports[0]._host.meeting_point.remote()
        ranks = [Rank(index=i, world=len(names), address=address) for i in range(len(names))]
        pairs = zip(transports, ranks, strict=True)
        calls = (_set_up(transport, resources, deadline_s, rank) for transport, rank in pairs)
        failures = [one for one in await asyncio.gather(*calls, return_exceptions=True) if one is not None]
        if failures:
            raise failures[0]

    await _or_kill(transports, set_up())
    return transports


def _create(
    name: str, namespace: str, part: Part, build: Callable[..., Actor], resources: Resources, place: Place | None
) -> RayTransport:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    options = {
        "name": name,
        "namespace": namespace,
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "max_concurrency": MAX_CONCURRENCY,
    }
    if place is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            place.group, placement_group_bundle_index=place.bundle
        )
    try:
        host = ray.remote(ActorHost).options(**options).remote(build, part)
    except ray.exceptions.ActorAlreadyExistsError:
        raise BadInput(
            f"run: the actor {name!r} of the run {namespace!r} is at work in this Ray cluster already;"
            " stop the other run, or choose another run="
        ) from None
    transport = RayTransport(name, namespace)
    # The named actor lives as long as a handle to it does, so the transport must hold this one.
    transport.__dict__["_host"] = host
    return transport


async def _or_kill(transports: Sequence[RayTransport], work: Coroutine[Any, Any, None]) -> None:
    """Leave no process behind if the work fails."""
    import ray

    try:
        await work
    except BaseException:
        for transport in transports:
            ray.kill(transport._host)
        raise


async def _set_up(transport: RayTransport, resources: Resources, deadline_s: float, *arguments: Message) -> None:
    import ray

    try:
        async with asyncio.timeout(deadline_s):
            await _placed(transport, resources)
            failure = await transport._host.start.remote(*arguments)
    except ray.exceptions.RayError as error:
        raise transport._translated(error) from error
    except TimeoutError:
        raise DeadlineExceeded(f"the actor {transport.name!r} was not up within {deadline_s:g} s") from None
    if failure is not None:
        raise failure


async def _placed(transport: RayTransport, resources: Resources) -> None:
    """Wait until the actor's process runs; say whom the run waits for when the cluster has no place for it."""
    with _warned(f"the actor {transport.name!r} waits", resources):
        await transport._host.__ray_ready__.remote()


@contextlib.contextmanager
def _warned(who: str, resources: Resources) -> Iterator[None]:
    """Say after a while who waits, and for what."""
    import ray

    def warn() -> None:
        free = ray.available_resources()
        logger.warning(
            "%s for cpus=%g gpus=%g; the Ray cluster has cpus=%g gpus=%g free",
            who,
            resources.cpus,
            resources.gpus,
            free.get("CPU", 0),
            free.get("GPU", 0),
        )

    timer = asyncio.get_running_loop().call_later(PLACE_QUIETLY, warn)
    try:
        yield
    finally:
        timer.cancel()


async def find(namespace: str, deadline_s: float = 3600.0) -> list[tuple[BorrowedTransport, Part]]:
    """The actors of a run that is up in this Ray cluster, and what they are to it.

    Raises BadInput when there are none, Unavailable or DeadlineExceeded when one does not answer.
    """
    import ray.util

    known = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in known if one["namespace"] == namespace]
    if not names:
        runs = ", ".join(sorted({one["namespace"] for one in known})) or "none"
        raise BadInput(f"attach: no run {namespace!r} has actors in this Ray cluster; runs there: {runs}")
    transports = [BorrowedTransport(name, namespace) for name in names]
    try:
        async with asyncio.timeout(deadline_s):
            parts = await asyncio.gather(*(transport._host.part.remote() for transport in transports))
    except (ray.exceptions.RayError, Unavailable) as error:
        raise Unavailable(f"attach: an actor of the run {namespace!r} does not answer: {error}") from error
    except TimeoutError:
        raise DeadlineExceeded(f"attach: the actors of {namespace!r} were not up within {deadline_s:g} s") from None
    return sorted(zip(transports, parts, strict=True), key=lambda one: (one[1].handle, one[1].index))


async def stop(transport: RayTransport) -> None:
    """Close the hosted actor and end its process, also if it is dead or does not answer."""
    import ray

    try:
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(CLOSE):
                await transport._host.close.remote()
    finally:
        ray.kill(transport._host)


def connect(namespace: str) -> bool:
    """Join the Ray cluster that RAY_ADDRESS names, or start one on this machine.

    Returns whether this process was not in one already. Raises Unavailable when the cluster cannot be joined.
    """
    import ray

    if ray.is_initialized():
        return False
    # Without an address Ray would also wait, without end, for a `ray start` that was killed on this machine.
    address = os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address)
    # Says at every start that the token is in use, which is as it should be.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            namespace=namespace,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level="WARNING",
        )
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        raise Unavailable(f"cannot join the Ray cluster at {address!r}: {error}") from error
    # Ray would print its C++ stack before the run stops as it should.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    return True


def cluster_nodes() -> list[tuple[str, float, float, int]]:
    """Name, cores, bytes of memory and GPUs of each machine of the Ray cluster, as Ray counts them."""
    import ray

    joined = connect("plan")
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        return [
            (
                node["NodeManagerHostname"],
                node["Resources"].get("CPU", 0.0),
                node["Resources"].get("memory", 0.0),
                int(node["Resources"].get("GPU", 0)),
            )
            for node in alive
        ]
    finally:
        if joined:
            disconnect()


def _check_reachable(address: str) -> None:
    """Raise Unavailable if nobody listens at HOST:PORT, for which Ray itself would wait without end."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except OSError as error:
        raise Unavailable(f"RAY_ADDRESS: no Ray cluster answers at {address}: {error}") from error


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
