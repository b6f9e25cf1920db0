import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from cluster.replicas import Replicas
from protocols.errors import BadInput, RepertoryError, Unavailable
from protocols.handle import make_handle
from protocols.service import Empty, HealthRequest, HealthResponse, Message, Method
from tests.cluster.echo import Count, EchoService, Text

METHODS = EchoService.methods()
ECHO, NOTE, RENAME, COUNT = (METHODS[name] for name in ("echo", "note", "rename", "count"))
ASKED = Text(text="?")


class Replica:
    """A transport whose calls end when the test says so."""

    def __init__(self, name: str, error: RepertoryError | None = None) -> None:
        self.name = name
        self.error = error
        self.calls: list[str] = []
        self.held: list[asyncio.Future[None]] = []
        self.hold = self.late = False
        self.closed = 0

    async def call(self, method: Method, request: Message) -> Message:
        self.calls.append(method.name)
        if self.hold:
            self.held.append(asyncio.get_running_loop().create_future())
            await self.held[-1]
        if self.error is not None:
            raise self.error
        return Text(text=self.name)

    async def stream(self, method: Method, request: Message) -> AsyncGenerator[Message, None]:
        self.calls.append(method.name)
        if self.error is not None and not self.late:
            raise self.error
        try:
            while True:
                yield Text(text=self.name)
                if self.error is not None:
                    raise self.error
        finally:
            self.closed += 1


def company(count: int) -> tuple[Replicas, list[Replica]]:
    members = [Replica(f"echo-{i}") for i in range(count)]
    return Replicas("echo", members), members


async def settled() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_each_call_goes_to_the_replica_with_the_fewest_under_way() -> None:
    replicas, members = company(3)
    for member in members:
        member.hold = True
    calls = [asyncio.ensure_future(replicas.call(ECHO, ASKED)) for _ in range(7)]
    await settled()
    assert [len(member.calls) for member in members] == [3, 2, 2]
    # Whoever is done first is the next to be asked.
    members[1].held[0].set_result(None)
    members[1].held[1].set_result(None)
    await settled()
    calls += [asyncio.ensure_future(replicas.call(ECHO, ASKED)) for _ in range(2)]
    await settled()
    assert [len(member.calls) for member in members] == [3, 4, 2]
    for future in [future for member in members for future in member.held if not future.done()]:
        future.set_result(None)
    assert {(await call).text for call in calls} == {"echo-0", "echo-1", "echo-2"}
    assert replicas.load == [0, 0, 0]


async def test_a_call_that_fails_or_is_cancelled_no_longer_counts() -> None:
    replicas, members = company(2)
    members[0].error = BadInput("no")
    with pytest.raises(BadInput):
        await replicas.call(ECHO, ASKED)
    members[0].hold = True
    call = asyncio.ensure_future(replicas.call(ECHO, ASKED))
    await settled()
    assert replicas.load == [1, 0]
    call.cancel()
    await asyncio.wait([call])
    assert replicas.load == [0, 0]


async def test_a_safe_call_is_tried_on_the_others_when_a_replica_is_unavailable() -> None:
    replicas, members = company(3)
    members[0].error = Unavailable("echo-0 has died")
    members[1].error = Unavailable("echo-1 has died")
    assert ECHO.safe
    assert await replicas.call(ECHO, ASKED) == Text(text="echo-2")
    assert [len(member.calls) for member in members] == [1, 1, 1]


async def test_when_all_are_unavailable_the_last_one_is_named() -> None:
    replicas, members = company(2)
    for member in members:
        member.error = Unavailable(f"{member.name} has died")
    with pytest.raises(Unavailable, match="echo-1 has died"):
        await replicas.call(ECHO, ASKED)
    assert [len(member.calls) for member in members] == [1, 1]


async def test_an_unsafe_call_is_never_repeated() -> None:
    replicas, members = company(2)
    members[0].error = Unavailable("echo-0 has died")
    assert not NOTE.safe
    with pytest.raises(Unavailable, match="echo-0 has died"):
        await replicas.call(NOTE, ASKED)
    assert members[1].calls == []


async def test_other_errors_are_never_retried() -> None:
    replicas, members = company(2)
    members[0].error = BadInput("text: too long")
    with pytest.raises(BadInput):
        await replicas.call(ECHO, ASKED)
    assert members[1].calls == []


async def test_what_changes_state_goes_to_all_and_the_first_answers() -> None:
    replicas, members = company(3)
    assert RENAME.dispatch == "all"
    assert await replicas.call(RENAME, ASKED) == Text(text="echo-0")
    assert [member.calls for member in members] == [["rename"]] * 3


async def test_a_failure_among_all_is_raised_when_no_replica_is_at_work_any_more() -> None:
    replicas, members = company(3)
    members[1].error = Unavailable("echo-1 has died")
    members[2].hold = True
    call = asyncio.ensure_future(replicas.call(RENAME, ASKED))
    await settled()
    assert not call.done()
    members[2].held[0].set_result(None)
    with pytest.raises(Unavailable, match="echo-1 has died"):
        await call


async def test_a_stream_stays_with_one_replica_and_counts_until_it_is_closed() -> None:
    replicas, members = company(2)
    async with (
        aclosing(replicas.stream(COUNT, Count())) as first,
        aclosing(replicas.stream(COUNT, Count())) as second,
    ):
        assert await anext(first) == await anext(first) == Text(text="echo-0")
        assert await anext(second) == Text(text="echo-1")
        assert replicas.load == [1, 1]
    assert replicas.load == [0, 0]
    assert [member.closed for member in members] == [1, 1]


async def test_a_handle_cannot_tell_replicas_from_one_actor() -> None:
    class Well(Replica):
        async def call(self, method: Method, request: Message) -> Message:
            return HealthResponse(kind="echo", ready=True)

    handle = make_handle(EchoService, Replicas("echo", [Well("echo-0"), Well("echo-1")]))
    assert await handle.health(HealthRequest()) == HealthResponse(kind="echo", ready=True)
    with pytest.raises(BadInput, match=r"echo\.echo takes a Text, got a Empty"):
        await handle.echo(Empty())


async def test_a_stream_that_has_not_begun_is_taken_over_by_another_replica() -> None:
    replicas, members = company(2)
    members[0].error = Unavailable("gone")
    for _ in range(3):
        async with aclosing(replicas.stream(COUNT, Count())) as stream:
            assert await anext(stream) == Text(text="echo-1")
    members[1].error = Unavailable("gone too")
    with pytest.raises(Unavailable, match="gone too"):
        await anext(replicas.stream(COUNT, Count()))
    members[0].late = members[1].late = True
    stream = replicas.stream(COUNT, Count())
    begun = await anext(stream)
    assert begun == Text(text="echo-0")
    # What has come cannot be taken back.
    with pytest.raises(Unavailable, match="gone"):
        await anext(stream)
    assert replicas.load == [0, 0]
