import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest

from actors.actor import Actor, answer, answer_stream, start
from protocols.errors import BadInput, Corrupt, Internal, RepertoryError, Stale, Unavailable
from protocols.service import CheckpointRequest, Empty, HealthRequest, HealthResponse, Message, Service, rpc


class Text(Message):
    text: str


class EchoService(Service):
    kind: ClassVar[str] = "echo"

    @rpc(safe=True)
    @abstractmethod
    async def echo(self, request: Text) -> Text: ...

    @rpc()
    @abstractmethod
    def letters(self, request: Text) -> AsyncIterator[Text]: ...


class Echo(Actor, EchoService):
    """Repeats what it is told. `fail` is raised by whatever is called; `gate` holds the calls."""

    def __init__(self, fail: BaseException | None = None) -> None:
        super().__init__()
        self.fail = fail
        self.last = Text(text="")
        self.gate = asyncio.Event()
        self.gate.set()
        self.closed = False

    async def setup(self) -> None:
        if self.fail:
            raise self.fail

    def state(self) -> Text:
        return self.last

    def load_state(self, text: str) -> None:
        self.last = Text.model_validate_json(text)

    async def echo(self, request: Text) -> Text:
        await self.gate.wait()
        if self.fail:
            raise self.fail
        self.last = request
        return request

    async def letters(self, request: Text) -> AsyncIterator[Text]:
        try:
            for letter in request.text:
                await self.gate.wait()
                yield Text(text=letter)
            if self.fail:
                raise self.fail
        finally:
            self.closed = True


HI = Text(text="hi")


@pytest.fixture
async def echo() -> Echo:
    actor = Echo()
    await start(actor)
    return actor


async def test_an_actor_serves_between_start_and_close() -> None:
    actor = Echo()
    with pytest.raises(Unavailable, match=r"the echo is not ready, .* refused echo"):
        await answer(actor, "echo", HI)
    await start(actor)
    assert await answer(actor, "echo", HI) == HI
    await actor.close()
    with pytest.raises(Unavailable, match="not ready"):
        await answer(actor, "echo", HI)


async def test_health_is_always_answered() -> None:
    actor = Echo()
    for ready in (False, True, False):
        assert await answer(actor, "health", HealthRequest()) == HealthResponse(kind="echo", ready=ready)
        if not ready:
            await start(actor)
        else:
            await answer(actor, "drain", Empty())


def invalid() -> Exception:
    with pytest.raises(ValueError) as caught:
        Text.model_validate({"text": 3})
    return caught.value


ERRORS = [
    (ValueError("odd"), Internal, "ValueError: odd"),
    (KeyError("k"), Internal, "KeyError: 'k'"),
    (invalid(), BadInput, "text: got 3; input should be a valid string"),
    (Stale("too old"), Stale, "too old"),
]


@pytest.mark.parametrize(("error", "kind", "text"), ERRORS)
async def test_every_error_leaves_in_its_class(error: Exception, kind: type[RepertoryError], text: str) -> None:
    with pytest.raises(kind) as caught:
        await start(Echo(error))
    assert caught.value.message == text
    actor = Echo()
    await start(actor)
    actor.fail = error
    with pytest.raises(kind) as caught:
        await answer(actor, "echo", HI)
    assert caught.value.message == text
    with pytest.raises(kind) as caught:
        assert [item async for item in answer_stream(actor, "letters", HI)]
    assert caught.value.message == text


async def test_a_failed_setup_opens_nothing() -> None:
    actor = Echo(BadInput("no such model"))
    with pytest.raises(BadInput):
        await start(actor)
    with pytest.raises(Unavailable):
        await answer(actor, "echo", HI)


@pytest.mark.parametrize("method", ["setup", "close", "no_such", "_call"])
async def test_only_remote_methods_can_be_called(method: str, echo: Echo) -> None:
    with pytest.raises(BadInput, match=f"a echo has no method '{method}'"):
        await answer(echo, method, Empty())
    with pytest.raises(BadInput, match="no method"):
        await anext(answer_stream(echo, method, Empty()))


async def test_a_method_takes_its_own_message(echo: Echo) -> None:
    with pytest.raises(BadInput, match="echo takes a Text, got a Empty"):
        await answer(echo, "echo", Empty())


async def test_draining_waits_for_what_runs_and_refuses_the_rest(echo: Echo) -> None:
    echo.gate.clear()
    running = asyncio.create_task(answer(echo, "echo", HI))
    stream = answer_stream(echo, "letters", HI)
    letter = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    draining = asyncio.create_task(answer(echo, "drain", Empty()))
    await asyncio.sleep(0)
    for method in ("echo", "save", "load"):
        with pytest.raises(Unavailable, match=f"draining; it refused {method}"):
            await answer(echo, method, HI if method == "echo" else CheckpointRequest(path="."))
    echo.gate.set()
    assert await running == HI and (await letter) == Text(text="h")
    assert not draining.done()
    assert [item.text async for item in stream] == ["i"]
    assert await draining == Empty()


async def test_draining_an_idle_actor_returns(echo: Echo) -> None:
    assert await answer(echo, "drain", Empty()) == Empty()


@pytest.mark.parametrize("ending", ["error", "cancelled"])
async def test_calls_that_do_not_return_are_not_waited_for(ending: str, echo: Echo) -> None:
    echo.gate.clear()
    running = asyncio.create_task(answer(echo, "echo", HI))
    await asyncio.sleep(0)
    if ending == "error":
        echo.fail = ValueError("odd")
        echo.gate.set()
    else:
        running.cancel()
    (result,) = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(result, Internal if ending == "error" else asyncio.CancelledError)
    assert await answer(echo, "drain", Empty()) == Empty()


async def test_leaving_a_stream_ends_the_actors_side_at_once(echo: Echo) -> None:
    stream = answer_stream(echo, "letters", HI)
    assert await anext(stream) == Text(text="h")
    assert not echo.closed
    await stream.aclose()
    assert echo.closed
    assert await answer(echo, "drain", Empty()) == Empty()


async def test_state_survives_in_a_file(echo: Echo, tmp_path: Path) -> None:
    await answer(echo, "echo", HI)
    where = CheckpointRequest(path=str(tmp_path / "deep" / "echo"))
    saved = await answer(echo, "save", where)
    other = Echo()
    await start(other)
    assert await answer(other, "load", where) == saved
    assert saved.model_dump() == {"files": ["state.json"]} and other.last == HI


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"text": 3}', b'{"other": "a"}', b"\xff\xfe"])
async def test_what_is_no_state_is_corrupt(content: bytes | None, echo: Echo, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(Corrupt, match=r"state.json is not a saved echo"):
        await answer(echo, "load", CheckpointRequest(path=str(tmp_path)))
    assert echo.last == Text(text="")


async def test_an_actor_without_state_keeps_an_empty_one(tmp_path: Path) -> None:
    class Plain(Echo):
        state = Actor.state
        load_state = Actor.load_state

    actor, where = Plain(), CheckpointRequest(path=str(tmp_path))
    await start(actor)
    await answer(actor, "save", where)
    await answer(actor, "load", where)
    (tmp_path / "state.json").write_text('{"text": "hi"}')
    with pytest.raises(Corrupt):
        await answer(actor, "load", where)
