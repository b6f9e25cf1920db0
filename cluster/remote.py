"""Actors that serve already, behind a gateway: what a run needs to use one as its own."""

import itertools
import re
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from cluster.run_directory import write_atomically
from protocols.client import Credentials, connect
from protocols.errors import BadInput, Corrupt, Unavailable
from protocols.handle import Transport, make_handle, transport_of
from protocols.policy import PolicyConfig, PolicyService, RemoteConfig
from protocols.service import CheckpointRequest, CheckpointResponse, Empty, Message, Method

NOTE = "remote.txt"
"""File of a checkpoint that says where, at the gateway, an actor's state lies."""


async def remote_policy(name: str, config: PolicyConfig, run: str, deadline_s: float) -> PolicyService:
    """The policy at `config.at`, its checkpoints in folders named after the run.

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
    kept = KeptRemotely(transport_of(policy), run)
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

    A place that a checkpoint of the run names is not written over; others are used again.
    """

    inner: Transport
    run: str
    key: str = field(default_factory=lambda: secrets.token_hex(4))
    """Of this run alone: another may have the same name."""

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
            place = self._free(note)
            await self.inner.call(method, request.model_copy(update={"path": place}))
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(note, place)
            return CheckpointResponse(files=[NOTE])
        place = _read(note)
        response = await self.inner.call(method, request.model_copy(update={"path": place}))
        self.key = place.split("/")[1]
        return response

    def _free(self, note: Path) -> str:
        """RUN/KEY/ACTOR/NUMBER, the lowest number that no checkpoint beside the note's names."""
        actor = note.parent.name
        named = {_read(one) for one in note.parent.parent.parent.glob(f"*/{actor}/{NOTE}")}
        places = (f"{self.run}/{self.key}/{actor}/{number}" for number in itertools.count())
        return next(place for place in places if place not in named)

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
    if not re.fullmatch(r"[^/]+/[0-9a-f]{8}/[^/]+/\d+", place):
        raise Corrupt(f"{note} does not say where the checkpoint lies: got {place[:80]!r}")
    return place
