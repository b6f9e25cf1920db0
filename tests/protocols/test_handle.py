import asyncio
import pickle
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from protocols.errors import BadInput, DeadlineExceeded, Unavailable
from protocols.handle import call_times, make_handle, transport_of, with_deadline
from protocols.policy import PolicyService, SampleRequest
from protocols.questioner import QuestionerService
from protocols.service import Empty, Message, Method, Service
from protocols.verifier import VerifierService
from tests.cluster.echo import Count, EchoService, Number, Text


@dataclass
class Echoing:
    """A transport that answers with its request, or never."""

    name: str = "echo"
    never: bool = False
    error: Exception | None = None
    sent: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    async def call(self, method: Method, request: Message) -> Message:
        self.sent.append(method.name)
        try:
            if self.never:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
            return request
        finally:
            self.ended.append(method.name)

    async def stream(self, method: Method, request: Message) -> AsyncGenerator[Message, None]:
        self.sent.append(method.name)
        try:
            assert isinstance(request, Count)
            for value in range(request.upto):
                yield Number(value=value)
            if self.never:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.ended.append(method.name)


@pytest.mark.parametrize("service", [PolicyService, QuestionerService, VerifierService, EchoService])
def test_a_handle_is_its_service_with_exactly_its_methods(service: type[Service]) -> None:
    handle = make_handle(service, Echoing())
    assert isinstance(handle, service)
    assert not getattr(type(handle), "__abstractmethods__", None)
    own = {name for name in vars(type(handle)) if not name.startswith("_")}
    assert own == set(service.methods())
    assert type(make_handle(service, Echoing())) is type(handle)


async def test_calls_and_streams_travel() -> None:
    handle = make_handle(EchoService, Echoing())
    assert await handle.echo(Text(text="one")) == Text(text="one")
    assert [item.value async for item in handle.count(Count(upto=3))] == [0, 1, 2]
    assert [item async for item in handle.count(Count(upto=0))] == []


@pytest.mark.parametrize("name", ["echo", "count"])
async def test_a_request_of_another_kind_is_refused_before_it_travels(name: str) -> None:
    transport = Echoing("echo-1")
    handle = make_handle(EchoService, transport)
    answer = getattr(handle, name)(SampleRequest.model_construct())
    with pytest.raises(BadInput, match=rf"^echo-1\.{name} takes a \w+, got a SampleRequest$"):
        await (anext(answer) if name == "count" else answer)
    assert transport.sent == []


async def test_a_call_has_a_deadline_that_names_the_actor() -> None:
    transport = Echoing("policy", never=True)
    handle = with_deadline(make_handle(EchoService, transport), 0.01)
    with pytest.raises(DeadlineExceeded, match=r"^policy\.echo did not answer within 0\.01 s$"):
        await handle.echo(Text(text="?"))
    assert transport.ended == ["echo"]


async def test_the_deadline_of_a_stream_is_for_each_item() -> None:
    transport = Echoing("policy", never=True)
    handle = make_handle(EchoService, transport, deadline_s=0.01)
    items = handle.count(Count(upto=3))
    assert [(await anext(items)).value for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DeadlineExceeded, match=r"^policy\.count did not answer within 0\.01 s$"):
        await anext(items)
    assert transport.ended == ["count"]


async def test_errors_pass_unchanged() -> None:
    error = Unavailable("the actor 'echo' has died")
    handle = make_handle(EchoService, Echoing(error=error))
    with pytest.raises(Unavailable) as call:
        await handle.echo(Text(text="?"))
    assert call.value is error
    with pytest.raises(Unavailable) as stream:
        await anext(handle.count(Count(upto=0)))
    assert stream.value is error


async def test_cancelling_the_caller_ends_the_call() -> None:
    transport = Echoing(never=True)
    call = asyncio.ensure_future(make_handle(EchoService, transport).wait(Text(text="a")))
    while not transport.sent:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert transport.ended == ["wait"]


async def test_closing_a_stream_early_ends_it_at_once() -> None:
    transport = Echoing()
    async with aclosing(make_handle(EchoService, transport).count(Count())) as items:
        assert (await anext(items)).value == 0
        assert transport.ended == []
    assert transport.ended == ["count"]


async def test_calls_are_counted_and_timed_whatever_becomes_of_them() -> None:
    transport = Echoing()
    handle = make_handle(EchoService, transport)
    await handle.echo(Text(text="one"))
    await handle.echo(Text(text="two"))
    transport.error = BadInput("no")
    with pytest.raises(BadInput):
        await handle.notes(Empty())
    times = call_times(handle)
    assert times.calls == {"echo": 2, "notes": 1}
    assert set(times.seconds) == {"echo", "notes"}
    assert all(seconds >= 0 for seconds in times.seconds.values())


def test_a_handle_can_be_sent_to_another_process() -> None:
    handle = make_handle(EchoService, Echoing("policy"), deadline_s=12.0)
    again = pickle.loads(pickle.dumps(handle))
    assert type(again) is type(handle)
    assert transport_of(again) == transport_of(handle)
    assert again.deadline_s == 12.0


async def test_a_shorter_deadline_leaves_the_first_handle_as_it_was() -> None:
    handle = make_handle(EchoService, Echoing("policy"), deadline_s=12.0)
    short = with_deadline(handle, 0.5)
    assert isinstance(short, EchoService)
    assert transport_of(short) is transport_of(handle)
    assert (handle.deadline_s, short.deadline_s) == (12.0, 0.5)
