"""The life of an actor: set-up, calls, state, drain, close."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

from protocols.errors import BadInput, Corrupt, Unavailable, classify
from protocols.service import (
    CheckpointRequest,
    CheckpointResponse,
    Empty,
    HealthRequest,
    HealthResponse,
    Message,
    Service,
)


class Actor(Service):
    """Base of all actors. The constructor only stores; `setup` does the work, so its errors reach the caller."""

    STATE_FILE = "state.json"

    def __init__(self) -> None:
        self._ready = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def setup(self) -> None:
        """Load what the actor needs. Raises BadInput when its configuration cannot work here."""

    async def close(self) -> None:
        """Give back what `setup` took; no call is answered any more."""
        self._ready = False

    def state(self) -> Message:
        """What must survive a restart, apart from weights."""
        return Empty()

    def load_state(self, text: str) -> None:
        """Take back the JSON of `state`. Raises ValidationError when it is something else."""
        Empty.model_validate_json(text)

    async def health(self, request: HealthRequest) -> HealthResponse:
        """Say whether the actor can serve."""
        return HealthResponse(kind=self.kind, ready=self._ready)

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Write `state` as JSON into the directory."""
        directory = Path(request.path)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.STATE_FILE).write_text(self.state().model_dump_json())
        return CheckpointResponse(files=[self.STATE_FILE])

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Take back what `save` wrote. Raises Corrupt if the file is missing or not a state of this actor."""
        file = Path(request.path) / self.STATE_FILE
        try:
            self.load_state(file.read_text())
        except (OSError, ValueError) as error:
            raise Corrupt(f"{file} is not a saved {self.kind}: {error}") from error
        return CheckpointResponse(files=[self.STATE_FILE])

    async def drain(self, request: Empty) -> Empty:
        """Refuse new calls, wait until no other call is running."""
        self._ready = False
        await self._idle.wait()
        return Empty()

    @contextmanager
    def _call(self, method: str) -> Iterator[None]:
        """Count the call while it runs; refuse it if the actor is not ready."""
        if method in ("health", "drain"):
            yield
            return
        if not self._ready:
            raise Unavailable(f"the {self.kind} is not ready, or is draining; it refused {method}")
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()


async def start(actor: Actor) -> None:
    """Set the actor up and open it for calls. Raises an error of the taxonomy."""
    try:
        await actor.setup()
    except Exception as error:
        raise classify(error) from error
    actor._ready = True


async def answer(actor: Actor, method: str, request: Message) -> Message:
    """Let the actor answer one call. Whatever it raises leaves as an error of the taxonomy."""
    _check(actor, method, request)
    with actor._call(method):
        try:
            response: Message = await getattr(actor, method)(request)
        except Exception as error:
            raise classify(error) from error
    return response


async def answer_stream(actor: Actor, method: str, request: Message) -> AsyncGenerator[Message, None]:
    """Let the actor answer one streaming call; errors as in `answer`."""
    _check(actor, method, request)
    with actor._call(method):
        try:
            async with aclosing(getattr(actor, method)(request)) as items:
                async for item in items:
                    yield item
        except Exception as error:
            raise classify(error) from error


def _check(actor: Actor, method: str, request: Message) -> None:
    known = actor.methods().get(method)
    if known is None:
        raise BadInput(f"a {actor.kind} has no method {method!r}")
    if not isinstance(request, known.request):
        raise BadInput(f"{method} takes a {known.request.__name__}, got a {type(request).__name__}")
