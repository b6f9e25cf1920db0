"""How much runs at once: allowances of single callers, and lanes in which calls wait for their turn."""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from cluster.gateway.auth import Caller
from protocols.errors import BadInput, Exhausted
from protocols.policy import SampleRequest
from protocols.questioner import ProposeRequest
from protocols.reviser import ReviseRequest
from protocols.service import Message
from protocols.verifier import JudgeRequest

BYTES_PER_TOKEN = 4
"""A request's prompts are counted by its length; an array of token ids has four bytes for each."""


def sampled_tokens(request: Message) -> int:
    """Tokens that a request may make a policy draw."""
    if isinstance(request, SampleRequest):
        return len(request.prompts) * request.n * request.params.max_tokens
    if isinstance(request, JudgeRequest):
        return len(request.items) * request.votes * request.params.max_tokens
    if isinstance(request, ProposeRequest):
        return len(request.clusters) * request.params.max_tokens
    if isinstance(request, ReviseRequest) and not request.labels_only:
        return len(request.items) * request.params.max_tokens
    return 0


def estimated_tokens(request: Message, size: int, limit: int) -> int:
    """Tokens that a request may cost, at least 1: its `size` in bytes, and what may be drawn.

    Raises BadInput when more may be drawn than the `limit`: no waiting would make room for it.
    """
    drawn = sampled_tokens(request)
    if drawn > limit:
        raise BadInput(f"request: may draw {drawn} tokens, expected at most {limit}; ask for fewer, or shorter ones")
    return max(1, size // BYTES_PER_TOKEN + drawn)


@dataclass
class Allowance:
    """What is left of a caller's rate, and how much it has under way."""

    left: float = 1.0
    seen: float = 0.0
    under_way: int = 0


class Allowances:
    """Rates and concurrency of single callers. Rates allow bursts of one second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: defaultdict[str, Allowance] = defaultdict(Allowance)

    @contextmanager
    def taken(self, caller: Caller) -> Iterator[None]:
        """One call of the caller. Raises Exhausted when it has too many, or too many per second."""
        mine = self._of[caller.name]
        if caller.concurrent and mine.under_way >= caller.concurrent:
            raise Exhausted(f"{caller.name} has {mine.under_way} calls under way, allowed are {caller.concurrent}")
        self._spend(caller, mine)
        mine.under_way += 1
        try:
            yield
        finally:
            mine.under_way -= 1

    def _spend(self, caller: Caller, mine: Allowance) -> None:
        rate = caller.requests_per_second
        if not rate:
            return
        now = self._clock()
        mine.left = min(max(1.0, rate), mine.left + (now - mine.seen) * rate)
        mine.seen = now
        if mine.left < 1.0 - 1e-9:
            raise Exhausted(f"{caller.name} may begin {rate:g} calls per second", (1.0 - mine.left) / rate)
        mine.left -= 1.0


@dataclass(eq=False)
class Waiting:
    """A call that waits for its turn."""

    cost: int
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Lane:
    """Lets calls in while their costs fit together. Others wait: callers take turns, each with its oldest call."""

    def __init__(self, capacity: int, queue: int) -> None:
        self.capacity, self.queue = max(1, capacity), queue
        self.used = 0
        self._waiting: dict[str, deque[Waiting]] = {}
        """In order of turns: whose call was let in goes to the end."""

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def entered(self, caller: str, cost: int) -> AsyncIterator[None]:
        """Wait for room, and hold it. Raises Exhausted when too many wait."""
        cost = min(cost, self.capacity)
        await self._enter(caller, cost)
        try:
            yield
        finally:
            self._leave(cost)

    async def _enter(self, caller: str, cost: int) -> None:
        if not self._waiting and self.used + cost <= self.capacity:
            self.used += cost
            return
        if self.waiting >= self.queue:
            raise Exhausted(f"{self.waiting} calls wait already", retry_after_s=1.0)
        own = len(self._waiting.get(caller, ()))
        if own >= max(1, self.queue // 2):
            raise Exhausted(f"{caller} has {own} calls that wait already", retry_after_s=1.0)
        mine = Waiting(cost)
        self._waiting.setdefault(caller, deque()).append(mine)
        try:
            await mine.turn
        except asyncio.CancelledError:
            if mine.turn.done() and not mine.turn.cancelled():  # it was let in at the same moment
                self._leave(cost)
            else:
                self._forget(caller, mine)
            raise

    def _forget(self, caller: str, mine: Waiting) -> None:
        calls = self._waiting.get(caller, deque())
        if mine in calls:  # else its turn came when it had left already
            calls.remove(mine)
            if not calls:
                del self._waiting[caller]
        self._let_in()

    def _leave(self, cost: int) -> None:
        self.used -= cost
        self._let_in()

    def _let_in(self) -> None:
        """Strictly in turn: a large call is not passed by small ones for ever."""
        while self._waiting:
            caller, calls = next(iter(self._waiting.items()))
            left = calls[0].turn.cancelled()
            if not left and self.used + calls[0].cost > self.capacity:
                return
            first = calls.popleft()
            if left and calls:
                continue
            del self._waiting[caller]
            if calls:
                self._waiting[caller] = calls
            if not left:
                self.used += first.cost
                first.turn.set_result(None)
