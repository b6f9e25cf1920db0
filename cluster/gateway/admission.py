"""Who calls, of whom, and whether there is room: the same for all doors of a gateway."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from cluster.gateway.auth import Caller, Callers, check_role
from cluster.gateway.config import GatewayConfig
from cluster.gateway.limits import Allowances, Lane, estimated_tokens
from cluster.gateway.metrics import Metrics
from cluster.gateway.routed import AUTO, RoutedPolicy
from protocols.client import ACTOR
from protocols.errors import BadInput, RepertoryError, Unavailable, classify
from protocols.handle import make_handle, service_of, transport_of
from protocols.policy import PolicyService
from protocols.router import RouterService
from protocols.service import CheckpointRequest, Message, Role, Service

logger = logging.getLogger("repertory.gateway")
REQUEST_ID = "x-request-id"
PATH = re.compile(r"[A-Za-z0-9._/-]{1,200}")

S = TypeVar("S", bound=Service)
M = TypeVar("M", bound=Message)


@dataclass
class Call:
    """One call from outside, while it runs and for the log."""

    id: str
    method: str
    began: float = field(default_factory=time.monotonic)
    caller: str = "-"
    code: str = "OK"
    route: str = ""
    """Who answered and why, if a router chose."""

    def failed(self, error: Exception) -> RepertoryError:
        """Take down how the call ended; the error with its place in the taxonomy is for the caller."""
        failure = classify(error)
        self.code = failure.code
        if failure.code == "INTERNAL":
            logger.error("id=%s failed", self.id, exc_info=error)
        return failure


class Admission:
    """Lets calls in to the actors in `handles`, by name; actors that are added there later are reached too."""

    def __init__(self, config: GatewayConfig, handles: Mapping[str, Service]) -> None:
        """Raises BadInput when the file of tokens cannot be read."""
        self._log_prompts = config.log_prompts
        self._handles = handles
        self.checkpoints: Path | None = None
        """The folder that paths of callers are relative to, and may not leave; without one nothing is saved."""
        self._callers = Callers(config.tokens)
        self._allowances = Allowances()
        kept = round(config.tokens_at_once * config.train_share)
        infer = Lane(config.tokens_at_once - kept, config.queue)
        self.lanes = {"infer": infer, "train": Lane(kept, config.queue) if kept else infer}
        self.metrics = Metrics(self.lanes)
        self._under_way = 0
        self.stopping = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def watched(self, method: str, given_id: str) -> Iterator[Call]:
        """Count and log a call, however it ends."""
        # The log is one line per call, whatever callers send.
        id_ = given_id if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", given_id) else secrets.token_hex(8)
        call = Call(id_, method)
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

    @contextmanager
    def known(self, call: Call, role: Role, authorization: str) -> Iterator[Caller]:
        """Who calls, as one more call of theirs. Raises Unauthenticated, Denied, Exhausted, Unavailable."""
        if self.stopping:
            raise Unavailable("the gateway is stopping")
        caller = self._callers.of(authorization)
        call.caller = caller.name
        check_role(caller, call.method, role)
        with self._allowances.taken(caller):
            yield caller

    def handle(self, service: type[S], name: str) -> S:
        """The actor of a kind and name; without a name, the one that is named like its kind.

        Raises Unavailable where there is none of the kind, BadInput where there is none of the name.
        """
        of_kind = self.of_kind(service)
        if service is PolicyService and name == AUTO and self.routes:
            policies = {one: make_handle(PolicyService, transport_of(handle)) for one, handle in of_kind.items()}
            return cast(S, RoutedPolicy(self.handle(RouterService, ""), policies))
        if not of_kind:
            raise Unavailable(f"this gateway has no {service.kind}")
        if not name:
            name = service.kind if service.kind in of_kind else min(of_kind)
        if name not in of_kind:
            raise BadInput(f"{ACTOR}: got {name!r}, expected one of {', '.join(sorted(of_kind))}")
        # One of its own: the run's timings are those of its own calls.
        return make_handle(service, transport_of(of_kind[name]))

    @property
    def routes(self) -> bool:
        """Whether a router may choose the policy of a call."""
        return bool(self.of_kind(RouterService)) and AUTO not in self.of_kind(PolicyService)

    def of_kind(self, service: type[Service]) -> dict[str, Service]:
        """The actors of a service by name."""
        # The very service: a policy's samplers and ranks, which are policies too, are not for callers.
        return {name: handle for name, handle in self._handles.items() if service_of(handle) is service}

    @asynccontextmanager
    async def room(self, call: Call, caller: Caller, role: Role, request: M, size: int) -> AsyncIterator[M]:
        """Hold room for a request of so many bytes; what is yielded is to be sent in its place.

        Raises Exhausted, and BadInput for a request that no waiting would make room for.
        """
        if self._log_prompts:
            logger.info("id=%s request=%r", call.id, request)
        if isinstance(request, CheckpointRequest):
            if self.checkpoints is None:
                raise Unavailable("nothing can be saved or loaded before the run has begun")
            request = confined(request, self.checkpoints)
        lane = self.lanes["train" if role == "train" else "infer"]
        cost = estimated_tokens(request, size, lane.capacity)
        with self._counted():
            async with lane.entered(caller.name, cost):
                yield request

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Let `finished` wait for a call."""
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def finished(self, seconds: float) -> None:
        """Let no more calls in, and wait so long for those that are."""
        # A door's own stop would leave a call that comes at this moment without an answer until the others are done.
        self.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()


def confined(request: M, folder: Path) -> M:
    """The request with its path inside of the folder. Raises BadInput for one that leads out of it."""
    assert isinstance(request, CheckpointRequest)
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
