import pickle

import pytest

from actors.actor import start
from cluster.inline import InlineTransport
from protocols.errors import Unavailable
from protocols.handle import make_handle
from protocols.service import HealthRequest
from tests.cluster.echo import Array, EchoActor, EchoService, Text


async def test_messages_are_not_copied() -> None:
    actor = EchoActor()
    await start(actor)
    handle = make_handle(EchoService, InlineTransport("echo", actor))
    request = Text(text="the same object")
    assert await handle.echo(request) is request
    array = Array(values=[1.0, 2.0])
    report = await handle.array(array)
    assert report.values is array.values
    assert not report.writeable


async def test_an_actor_answers_between_set_up_and_close_only() -> None:
    actor = EchoActor()
    handle = make_handle(EchoService, InlineTransport("echo", actor))
    assert not (await handle.health(HealthRequest())).ready
    with pytest.raises(Unavailable, match="not ready"):
        await handle.echo(Text(text="early"))
    await start(actor)
    assert (await handle.health(HealthRequest())).ready
    await handle.echo(Text(text="in time"))
    await actor.close()
    with pytest.raises(Unavailable, match="refused echo"):
        await handle.echo(Text(text="late"))


async def test_a_handle_to_an_actor_in_this_process_cannot_be_sent_away() -> None:
    handle = make_handle(EchoService, InlineTransport("policy", EchoActor()))
    with pytest.raises(TypeError, match="'policy' lives in this process"):
        pickle.dumps(handle)
