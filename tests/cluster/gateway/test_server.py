"""What callers of the gateway see, over the wire."""

import asyncio
import logging
import pickle
import socket
import threading
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protocols.client import DETAILS, Blocking, connect
from protocols.descriptors import message_class
from protocols.errors import (
    BadInput,
    Corrupt,
    DeadlineExceeded,
    Exhausted,
    Internal,
    RepertoryError,
    Stale,
    Unavailable,
)
from protocols.handle import with_deadline
from protocols.policy import PolicyService, SampleRequest
from protocols.questioner import HistoryRequest, QuestionerService
from protocols.questions import Task
from protocols.service import CheckpointRequest, Empty, Service
from protocols.wire import to_bytes
from tests.cluster.gateway.scripted import ANSWERS, DELTA, Scripted, a_gateway, a_handle, a_request, counters, raw

SAMPLE = "PolicyService/Sample"


async def test_calls_and_streams(tmp_path: Path) -> None:
    transport = Scripted()
    async with a_gateway({"policy": a_handle(transport)}, tmp_path) as gateway:
        policy = connect(gateway.address, PolicyService)
        assert await policy.sample(a_request()) == ANSWERS["sample"]
        transport.waits = True
        transport.go.release()
        assert [delta async for delta in policy.stream(a_request(2))] == [DELTA, DELTA]
        assert transport.requests == [a_request(), a_request(2)]
        transport.go.release()
        copy = pickle.loads(pickle.dumps(policy))
        assert await copy.info(Empty()) == ANSWERS["info"]


def test_calls_without_an_event_loop(tmp_path: Path) -> None:
    async def serve(ready: Any, done: Any) -> None:
        async with a_gateway({"policy": a_handle(Scripted())}, tmp_path) as gateway:
            ready.set_result(gateway.address)
            await done.wait()

    ready: Future[str] = Future()
    loop = asyncio.new_event_loop()
    done = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(ready, done),))
    thread.start()
    policy = Blocking(connect(ready.result(), PolicyService))
    assert policy.sample(a_request()) == ANSWERS["sample"]
    assert list(policy.stream(a_request())) == [DELTA, DELTA]
    with pytest.raises(AttributeError, match="a policy has no method 'juggle'"):
        policy.juggle(Empty())
    loop.call_soon_threadsafe(done.set)
    thread.join()


@pytest.mark.parametrize("kind", [BadInput, Unavailable, Stale, Corrupt, Internal, Exhausted, DeadlineExceeded])
async def test_errors_keep_type_and_text(kind: type[RepertoryError], tmp_path: Path) -> None:
    transport = Scripted(error=kind("prompt 'ü': too long"))
    async with a_gateway({"policy": a_handle(transport)}, tmp_path) as gateway:
        policy = connect(gateway.address, PolicyService, tries=1)
        with pytest.raises(kind, match="prompt 'ü': too long"):
            await policy.sample(a_request())
        with pytest.raises(kind, match="prompt 'ü': too long"):
            async for _ in policy.stream(a_request()):
                pass


async def test_a_defect_is_internal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with a_gateway({"policy": a_handle(Scripted(error=ZeroDivisionError("oh")))}, tmp_path) as gateway:
        with pytest.raises(Internal, match="ZeroDivisionError: oh"):
            await connect(gateway.address, PolicyService).sample(a_request())
    assert "ZeroDivisionError" in caplog.text


async def test_wrong_fields_are_named_in_the_details(tmp_path: Path) -> None:
    bad = message_class("SampleRequest")(n=-3)
    bad.prompts.add(text="x")
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path) as gateway, raw(gateway) as send:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await send(SAMPLE, bad.SerializeToString())
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert failed.value.details() == "n: got -3; input should be greater than or equal to 1"
        request = error_details_pb2.BadRequest()
        (detail,) = status_pb2.Status.FromString(dict(failed.value.trailing_metadata() or ())[DETAILS]).details
        assert detail.Unpack(request)
        assert [one.field for one in request.field_violations] == ["n"]


@pytest.mark.parametrize(
    ("path", "data", "code"),
    [
        (SAMPLE, b"\xff\xff", "INVALID_ARGUMENT"),
        (SAMPLE, b"\x0a\x04\x12\x02\xff\xfe", "INVALID_ARGUMENT"),
        (SAMPLE, b"", "INVALID_ARGUMENT"),
        ("PolicyService/Juggle", b"", "UNIMPLEMENTED"),
        ("JugglerService/Sample", b"", "UNIMPLEMENTED"),
        # What moves weights has no door.
        ("SamplerService/Receive", b"", "UNIMPLEMENTED"),
        ("VerifierService/Health", b"", "UNAVAILABLE"),
        (SAMPLE, b"\x0a" * (2 << 20), "RESOURCE_EXHAUSTED"),
    ],
)
async def test_bytes_that_are_no_request(path: str, data: bytes, code: str, tmp_path: Path) -> None:
    transport = Scripted()
    async with (
        a_gateway({"policy": a_handle(transport)}, tmp_path, max_message_mb=1) as gateway,
        raw(gateway) as send,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await send(path, data)
        assert failed.value.code().name == code
        assert not transport.requests
        await send("PolicyService/Health")


async def test_one_of_several_actors(tmp_path: Path) -> None:
    transports = {name: Scripted(name) for name in ("reference", "policy", "old")}
    handles: dict[str, Service] = {name: a_handle(one) for name, one in transports.items()}
    async with a_gateway(handles, tmp_path) as gateway:
        await connect(gateway.address, PolicyService).sample(a_request())
        await connect(gateway.address, PolicyService, actor="old").sample(a_request())
        assert [len(one.requests) for one in transports.values()] == [0, 1, 1]
        with pytest.raises(BadInput, match="repertory-actor: got 'new', expected one of old, policy, reference"):
            await connect(gateway.address, PolicyService, actor="new").sample(a_request())
        request = HistoryRequest(question_id="q", task=Task.MATH)
        with pytest.raises(Unavailable, match="this gateway has no questioner"):
            await connect(gateway.address, QuestionerService, tries=1).history(request)


async def test_a_safe_call_waits_for_an_actor_and_others_do_not(tmp_path: Path) -> None:
    transport = Scripted(error=Unavailable("not yet"))
    async with a_gateway({"policy": a_handle(transport)}, tmp_path) as gateway:
        policy = connect(gateway.address, PolicyService)
        with pytest.raises(Unavailable, match="not yet"):
            await policy.publish(Empty())
        assert len(transport.requests) == 1
        call = asyncio.ensure_future(policy.sample(a_request()))
        for _ in range(3):
            await transport.began.acquire()
        transport.error = None
        assert await call == ANSWERS["sample"]


async def test_who_leaves_ends_the_call_in_the_actor(tmp_path: Path) -> None:
    transport = Scripted(waits=True)
    async with a_gateway({"policy": a_handle(transport)}, tmp_path) as gateway:
        policy = connect(gateway.address, PolicyService)
        call = asyncio.ensure_future(policy.sample(a_request()))
        await transport.began.acquire()
        call.cancel()
        await transport.cancelled.acquire()
        stream = policy.stream(a_request())
        assert await anext(stream) == DELTA
        pending = asyncio.ensure_future(anext(stream))
        await transport.began.acquire()
        pending.cancel()
        await transport.cancelled.acquire()
        with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.05 s"):
            await with_deadline(policy, 0.05).sample(a_request())
        await transport.cancelled.acquire()
        # A deadline that the gateway is told of, as other clients do it.
        async with raw(gateway) as send:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await send(SAMPLE, to_bytes(a_request()), timeout=0.05)
            assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await transport.cancelled.acquire()
        assert gateway.admission.lanes["infer"].used == 0


async def test_what_was_accepted_is_finished_when_the_gateway_stops(tmp_path: Path) -> None:
    transport = Scripted(waits=True)
    async with a_gateway({"policy": a_handle(transport)}, tmp_path) as gateway:
        policy = connect(gateway.address, PolicyService, tries=1)
        calls = [asyncio.ensure_future(policy.sample(a_request(i))) for i in range(5)]
        for _ in calls:
            await transport.began.acquire()
        closing = asyncio.ensure_future(gateway.close())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="the gateway is stopping"):
            await policy.sample(a_request())
        with pytest.raises(Unavailable, match="the gateway is stopping"):
            await connect(gateway.address, PolicyService, tries=1).info(Empty())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            state = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert state.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not closing.done()
        for _ in calls:
            transport.go.release()
        assert await asyncio.gather(*calls) == [ANSWERS["sample"]] * 5
        await closing


async def test_health_and_reflection(tmp_path: Path) -> None:
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path) as gateway:
        target = f"127.0.0.1:{gateway.port}"

        def ask() -> tuple[list[Any], set[str], Any]:
            with grpc.insecure_channel(target) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                names = ["", "repertory.v1.PolicyService"]
                states = [stub.Check(health_pb2.HealthCheckRequest(service=name)).status for name in names]
                database = ProtoReflectionDescriptorDatabase(channel)
                services = set(database.get_services())
                found = database.FindFileContainingSymbol("repertory.v1.PolicyService")
                health = database.FindFileContainingSymbol("grpc.health.v1.Health")
                return states, services, (found, health)

        states, services, (found, health) = await asyncio.to_thread(ask)
        assert states == [health_pb2.HealthCheckResponse.SERVING] * 2
        assert services >= {"repertory.v1.PolicyService", "repertory.v1.VerifierService", "grpc.health.v1.Health"}
        assert "Sample" in [method.name for method in found.service[0].method]
        assert health.package == "grpc.health.v1"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../../x", "a/../../x", "a/../..", ".", "a\0b", "/"])
async def test_paths_stay_inside(path: str, tmp_path: Path) -> None:
    transport = Scripted()
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "link").symlink_to("/etc")
    async with a_gateway({"policy": a_handle(transport)}, tmp_path) as gateway:
        policy = connect(gateway.address, PolicyService)
        for one in (path, f"link/{path}"):
            with pytest.raises(BadInput, match="path: "):
                await policy.save(CheckpointRequest(path=one))
        assert not transport.requests
        await policy.save(CheckpointRequest(path="a/./b"))
        assert transport.requests == [CheckpointRequest(path=str(tmp_path / "remote" / "a" / "b"))]


async def test_nothing_is_saved_before_there_is_a_place_for_it(tmp_path: Path) -> None:
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path) as gateway:
        gateway.admission.checkpoints = None
        with pytest.raises(Unavailable, match="nothing can be saved or loaded before the run has begun"):
            await connect(gateway.address, PolicyService).save(CheckpointRequest(path="a"))
        assert not (tmp_path / "remote").exists()


@pytest.mark.parametrize("count", [60, 5000])
async def test_many_wrong_fields_are_still_bad_input(count: int, tmp_path: Path) -> None:
    """All of a status must fit into the 16 kB that callers take."""
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path) as gateway, raw(gateway) as send:
        call = send(SAMPLE, b"\x0a\x00" * count)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "and 50 more" in (failed.value.details() or "") or count > 60
        assert "x-request-id" in dict(failed.value.trailing_metadata() or ())
        with pytest.raises(grpc.aio.AioRpcError, match="prompts: got 65537 entries, expected at most 65536"):
            await send(SAMPLE, b"\x0a\x00" * 65537)
    async with a_gateway({"policy": a_handle(Scripted(error=Internal("ü" * 100_000)))}, tmp_path) as gateway:
        with pytest.raises(Internal, match="üüü"):
            await connect(gateway.address, PolicyService).sample(a_request())


async def test_a_message_that_is_too_large_is_sent_once(tmp_path: Path) -> None:
    transport = Scripted()
    async with a_gateway({"policy": a_handle(transport)}, tmp_path, max_message_mb=1) as gateway:
        large = SampleRequest(prompts=[{"text": "x" * (2 << 20)}])  # type: ignore[list-item]
        with pytest.raises(Exhausted) as refused:
            await connect(gateway.address, PolicyService).sample(large)
        assert refused.value.retry_after_s == 0


async def test_the_log_has_a_line_per_call_and_no_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "repertory.gateway")
    secret = SampleRequest(prompts=[{"text": "my secret"}])  # type: ignore[list-item]
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path) as gateway, raw(gateway) as send:
        call = send(SAMPLE, to_bytes(secret), metadata=(("x-request-id", "me-1"),))
        await call
        assert dict(await call.trailing_metadata())["x-request-id"] == "me-1"
        await send(SAMPLE, to_bytes(secret), metadata=(("x-request-id", "a id=forged"),))
        with pytest.raises(grpc.aio.AioRpcError):
            await send(SAMPLE, b"")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("id=me-1 caller=anyone method=PolicyService.sample code=OK ms=")
    assert "forged" not in lines[1]
    assert "code=INVALID_ARGUMENT" in lines[2]
    assert "secret" not in caplog.text
    async with (
        a_gateway({"policy": a_handle(Scripted())}, tmp_path, log_prompts=True) as gateway,
        raw(gateway) as send,
    ):
        await send(SAMPLE, to_bytes(secret))
    assert "my secret" in caplog.text


async def test_prometheus_reads_the_metrics(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(BadInput, match=rf"gateway\.metrics: cannot listen at {address}"):
            async with a_gateway({}, tmp_path, metrics=address):
                pass
    for _ in range(2):  # the port is free again
        async with a_gateway({"policy": a_handle(Scripted())}, tmp_path, metrics=address) as gateway:
            await connect(gateway.address, PolicyService).sample(a_request())
            shown = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics").read())
        assert b'repertory_calls_total{code="OK",method="PolicyService.sample"} 1.0' in shown


async def test_metrics(tmp_path: Path) -> None:
    transport = Scripted()
    async with a_gateway({"policy": a_handle(transport)}, tmp_path) as gateway:
        policy = connect(gateway.address, PolicyService, tries=1)
        await policy.sample(a_request())
        transport.error = Stale("no")
        with pytest.raises(Stale):
            await policy.sample(a_request())
        transport.error, transport.waits = None, True
        under_way = asyncio.ensure_future(policy.sample(a_request(max_tokens=100)))
        for _ in range(3):
            await transport.began.acquire()
        text = counters(gateway)
        assert 'repertory_calls_total{code="OK",method="PolicyService.sample"} 1.0' in text
        assert 'repertory_calls_total{code="FAILED_PRECONDITION",method="PolicyService.sample"} 1.0' in text
        assert 'repertory_call_seconds_count{method="PolicyService.sample"} 2.0' in text
        assert 'repertory_drawn_tokens_total{method="PolicyService.sample"} 1.0' in text
        assert 'repertory_tokens{lane="infer"} 10' in text
        transport.go.release()
        await under_way


@pytest.mark.parametrize(
    "address",
    ["grpc://127.0.0.1:1,there:2", "grpcs://127.0.0.1:1,127.0.0.1:2", "grpc://127.0.0.1:1,127.0.0.1", "x://a:1"],
)
def test_addresses_of_another_form(address: str) -> None:
    with pytest.raises(BadInput, match="address: got"):
        connect(address, PolicyService)
