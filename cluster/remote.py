"""Actors that serve already, behind a gateway: what a run needs to use one as its own."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from cluster.run_directory import write_atomically
from protocols.client import Credentials, connect
from protocols.errors import BadInput, Corrupt, Unavailable
from protocols.handle import Transport, make_handle, transport_of
from protocols.policy import PolicyConfig, PolicyService, RemoteConfig
from protocols.service import CheckpointRequest, CheckpointResponse, Empty, Message, Method

NOTE = "remote.txt"
"""File of a checkpoint that says where, at the gateway, an actor's state lies."""


async def remote_policy(name: str, config: PolicyConfig, run: str, keep: int, deadline_s: float) -> PolicyService:
    """The policy at `config.at`, its checkpoints in `keep` + 2 folders named after the run.

    Raises BadInput when it is another model than the configuration says, or cannot learn and should; Unavailable
    when nobody answers.
    """
    assert config.at is not None
    policy = connect(
        config.at.address,
        PolicyService,
        actor=config.at.actor,
        credentials=credentials(name, config.at),
        deadline_s=deadline_s,
    )
    try:
        info = await policy.info(Empty())
    except Unavailable as error:
        raise Unavailable(f"{name}.at.address: no policy answers at {config.at.address}: {error}") from error
    where = f"the policy at {config.at.address}"
    if info.model != config.model:
        raise BadInput(f"{name}.model: got {config.model!r}, but {where} is of {info.model!r}; name that")
    if config.trainer is not None and not info.trainable_parameters:
        raise BadInput(f"{name}.trainer: {where} is frozen; give its gateway a trainer, or set {name}.trainer=null")
    kept = KeptRemotely(transport_of(policy), f"{run}/{name}", keep + 2)
    return make_handle(PolicyService, kept, deadline_s)


def credentials(name: str, at: RemoteConfig) -> Credentials:
    """How the run shows who it is. Raises BadInput when the file of the token cannot be read."""
    try:
        token = Path(at.token_file).expanduser().read_text("utf-8").strip() if at.token_file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{name}.at.token_file: {error}") from error
    return Credentials(token, at.root_certificate, at.certificate, at.key)


@dataclass
class KeptRemotely:
    """Calls to an actor that keeps its checkpoints itself; the run's own name the place.

    Places are used in turn, so one that a checkpoint of the run names is not written over.
    """

    inner: Transport
    folder: str
    places: int
    latest: int = -1

    @property
    def name(self) -> str:
        """The actor's name."""
        return self.inner.name

    async def call(self, method: Method, request: Message) -> Message:
        """One call; of save and load the path is the place at the gateway."""
        if not isinstance(request, CheckpointRequest):
            return await self.inner.call(method, request)
        note = Path(request.path) / NOTE
        if method.name == "save":
            index = (self.latest + 1) % self.places
            place = f"{self.folder}/{index}"
            await self.inner.call(method, request.model_copy(update={"path": place}))
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(note, place)
            self.latest = index
            return CheckpointResponse(files=[NOTE])
        place = _read(note)
        response = await self.inner.call(method, request.model_copy(update={"path": place}))
        self.latest = int(place.rpartition("/")[2])
        return response

    async def stream(self, method: Method, request: Message) -> AsyncGenerator[Message, None]:
        """One streaming call."""
        async with aclosing(self.inner.stream(method, request)) as items:
            async for item in items:
                yield item


def _read(note: Path) -> str:
    try:
        place = note.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Corrupt(f"{note} does not say where the checkpoint lies: {error}") from error
    if not place.rpartition("/")[2].isdecimal():
        raise Corrupt(f"{note} does not say where the checkpoint lies: got {place[:80]!r}")
    return place
