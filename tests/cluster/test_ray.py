"""The contract of both transports: a script cannot tell where an actor lives."""

import asyncio
import functools
import logging
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from actors.actor import Actor
from cluster import ray_transport
from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.replicas import Replicas
from protocols.errors import (
    BadInput,
    Corrupt,
    DeadlineExceeded,
    Internal,
    RepertoryError,
    Stale,
    Unavailable,
)
from protocols.handle import transport_of, with_deadline
from protocols.placement import Resources
from protocols.service import CheckpointRequest, Empty, HealthRequest, HealthResponse
from tests.cluster.echo import Array, Count, EchoActor, EchoService, Text
from tests.cluster.local_ray import local_ray

pytestmark = pytest.mark.asyncio(loop_scope="module")
RUN = "contract"
ONE = Resources()
FAILURES: list[tuple[str, type[RepertoryError], str]] = [
    ("BadInput: text: too long", BadInput, "text: too long"),
    ("Unavailable: the model is loading", Unavailable, "the model is loading"),
    ("DeadlineExceeded: judge.sample did not answer", DeadlineExceeded, "judge.sample did not answer"),
    ("Stale: version 3 is wanted, 2 is there", Stale, "version 3 is wanted, 2 is there"),
    ("Corrupt: gradient: not finite", Corrupt, "gradient: not finite"),
    ("Internal: a defect", Internal, "a defect"),
    ("ValueError: 2 + 2 = 5\nsecond line", Internal, "ValueError: 2 + 2 = 5\nsecond line"),
    ("ValidationError: ", BadInput, "value: got -1; input should be greater than or equal to 0"),
]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One small Ray for all tests of this file."""
    with local_ray(cpus=2) as ray:
        yield ray


def a_cluster(transport: str, folder: Path, run: str = RUN, deadline_s: float = 60.0) -> Cluster:
    config = MethodConfig.model_validate({"transport": transport, "runs_dir": str(folder), "deadline_s": deadline_s})
    return Cluster(config, method="test", run=run)


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["inline", pytest.param("ray", marks=pytest.mark.ray)]
)
async def company(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    if request.param == "ray":
        request.getfixturevalue("ray")
    async with a_cluster(request.param, tmp_path_factory.mktemp("runs")) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def echo(company: Cluster) -> EchoService:
    return await spawn(company, "echo")


async def spawn(cluster: Cluster, name: str, resources: Resources = ONE, **options: Any) -> EchoService:
    build: functools.partial[Actor] = functools.partial(EchoActor, **options)
    return await cluster._spawn(EchoService, name, build, resources)


async def test_calls(echo: EchoService) -> None:
    assert await echo.echo(Text(text="ä\n\U0001f600")) == Text(text="ä\n\U0001f600")
    assert await echo.health(HealthRequest()) == HealthResponse(kind="echo", ready=True)


async def test_calls_run_side_by_side(echo: EchoService) -> None:
    waiting = [asyncio.ensure_future(echo.wait(Text(text=f"side {i}"))) for i in range(50)]
    await asyncio.gather(*(echo.began(Text(text=f"side {i}")) for i in range(50)))
    assert await echo.echo(Text(text="in between")) == Text(text="in between")
    for call in waiting:
        call.cancel()
    await asyncio.wait(waiting)


@pytest.mark.parametrize(("what", "kind", "text"), FAILURES, ids=[what.split(":")[0] for what, *_ in FAILURES])
async def test_errors_keep_type_and_text(echo: EchoService, what: str, kind: type, text: str) -> None:
    with pytest.raises(RepertoryError) as error:
        await echo.fail(Text(text=what))
    assert (type(error.value), str(error.value)) == (kind, text)


@pytest.mark.parametrize(("what", "kind", "text"), FAILURES, ids=[what.split(":")[0] for what, *_ in FAILURES])
async def test_errors_in_the_middle_of_a_stream_do_too(echo: EchoService, what: str, kind: type, text: str) -> None:
    items = echo.count(Count(upto=2, then=what))
    assert [(await anext(items)).value for _ in range(2)] == [0, 1]
    with pytest.raises(RepertoryError) as error:
        await anext(items)
    assert (type(error.value), str(error.value)) == (kind, text)


async def test_streams(echo: EchoService) -> None:
    assert [item.value async for item in echo.count(Count(upto=200))] == list(range(200))
    assert [item async for item in echo.count(Count(upto=0))] == []


async def test_a_deadline_names_the_actor_and_ends_the_call_there(echo: EchoService) -> None:
    await echo.echo(Text(text="awake"))
    with pytest.raises(DeadlineExceeded, match=r"^echo\.wait did not answer within 1\.5 s$"):
        await with_deadline(echo, 1.5).wait(Text(text="late"))
    await echo.ended(Text(text="late"))


async def test_a_stream_that_falls_silent_has_a_deadline_too(echo: EchoService) -> None:
    items = with_deadline(echo, 1.5).count(Count(upto=1, then="wait"))
    assert (await anext(items)).value == 0
    with pytest.raises(DeadlineExceeded, match=r"^echo\.count did not answer within 1\.5 s$"):
        await anext(items)


async def test_cancelling_the_caller_cancels_the_call_in_the_actor(echo: EchoService) -> None:
    call = asyncio.ensure_future(echo.wait(Text(text="given up")))
    await echo.began(Text(text="given up"))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await echo.ended(Text(text="given up"))


async def test_closing_a_stream_early_ends_it_in_the_actor(company: Cluster) -> None:
    actor = await spawn(company, "streaming")
    async with aclosing(actor.count(Count(upto=10, then="wait"))) as items:
        assert (await anext(items)).value == 0
    await actor.ended(Text(text="count"))
    await company.stop("streaming")


@pytest.mark.parametrize(("what", "kind", "text"), FAILURES, ids=[what.split(":")[0] for what, *_ in FAILURES])
@pytest.mark.parametrize("where", ["broken", "unbuildable"])
async def test_an_error_in_set_up_reaches_the_caller(
    company: Cluster, where: str, what: str, kind: type, text: str
) -> None:
    with pytest.raises(RepertoryError) as error:
        await spawn(company, "broken", **{where: what})
    assert (type(error.value), str(error.value)) == (kind, text)


async def test_names_are_unique_and_free_again_after_a_stop(company: Cluster) -> None:
    first = await spawn(company, "unique")
    with pytest.raises(BadInput, match="there is an actor 'unique' in this run already"):
        await spawn(company, "unique")
    await company.stop("unique")
    await company.stop("unique")
    with pytest.raises(Unavailable, match=r"has died|refused echo"):
        await first.echo(Text(text="gone"))
    again = await spawn(company, "unique")
    assert await again.echo(Text(text="back")) == Text(text="back")
    await company.stop("unique")


async def test_a_role_holds_a_handle_to_another_actor(company: Cluster, echo: EchoService) -> None:
    role = await spawn(company, "role", inner=echo)
    assert await role.echo(Text(text="by way of the role")) == Text(text="by way of the role")
    for what, kind, text in FAILURES:
        with pytest.raises(RepertoryError) as error:
            await role.fail(Text(text=what))
        assert (type(error.value), str(error.value)) == (kind, text)
    await company.stop("role")


async def test_state_is_saved_and_loaded(company: Cluster, tmp_path: Path) -> None:
    actor = await spawn(company, "memory")
    await actor.note(Text(text="remembered"))
    saved = await actor.save(CheckpointRequest(path=str(tmp_path / "state")))
    await actor.note(Text(text="later"))
    assert await actor.load(CheckpointRequest(path=str(tmp_path / "state"))) == saved
    assert (await actor.notes(Empty())).text.split()[1:] == ["remembered"]
    with pytest.raises(Corrupt, match="is not a saved echo"):
        await actor.load(CheckpointRequest(path=str(tmp_path / "nothing")))
    await company.stop("memory")


async def test_arrays_arrive_intact_and_nobody_can_change_them(company: Cluster, echo: EchoService) -> None:
    values = np.random.default_rng(0).normal(size=(1 << 20, 2)).astype(np.float32)
    report = await echo.array(Array(values=values))
    assert report.values.array.shape == values.shape
    assert np.array_equal(report.values.array, values)
    assert not report.values.array.flags.writeable
    assert report.total == pytest.approx(float(values.sum(dtype="float64")))
    assert not report.writeable
    if company.config.transport == "ray":
        # It lies in the object store, once for all who read it.
        assert not report.owned


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64"])
async def test_every_kind_of_array_arrives(echo: EchoService, dtype: Any) -> None:
    from protocols.tensor import Tensor

    for shape in [(), (0, 3), (2, 3)]:
        values = Tensor(np.ones(shape), dtype)
        assert (await echo.array(Array(values=values))).values == values


async def test_replicas_stand_behind_one_handle(company: Cluster) -> None:
    actor = await spawn(company, "many", Resources(replicas=2))
    await actor.rename(Text(text="all"))
    transport = transport_of(actor)
    assert isinstance(transport, Replicas)
    assert [replica.name for replica in transport.replicas] == ["many-0", "many-1"]
    notes = EchoService.methods()["notes"]
    texts = [str(await replica.call(notes, Empty())) for replica in transport.replicas]
    assert all("all" in text for text in texts)
    waiting = [asyncio.ensure_future(actor.wait(Text(text=str(i)))) for i in range(4)]
    while sum(transport.load) < 4:
        await asyncio.sleep(0)
    assert transport.load == [2, 2]
    for call in waiting:
        call.cancel()
    await asyncio.wait(waiting)
    assert transport.load == [0, 0]
    await company.stop("many")


async def test_a_run_directory_is_made_by_its_first_step_only(company: Cluster) -> None:
    assert not company.directory.path.exists()


# What only an actor in a process of its own can do.


@pytest_asyncio.fixture(loop_scope="module")
async def on_ray(ray: Any, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with a_cluster("ray", tmp_path, run="alone") as cluster:
        yield cluster


@pytest.mark.ray
async def test_an_actor_killed_in_a_call_is_unavailable_by_name(on_ray: Cluster) -> None:
    actor = await spawn(on_ray, "victim")
    waiting = asyncio.ensure_future(actor.wait(Text(text="for ever")))
    await actor.began(Text(text="for ever"))
    with pytest.raises(Unavailable, match=r"^the actor 'victim' has died: "):
        await actor.die(Text(text=""))
    with pytest.raises(Unavailable, match=r"^the actor 'victim' has died: "):
        await waiting
    with pytest.raises(Unavailable, match=r"^the actor 'victim' has died: "):
        await actor.echo(Text(text="still there?"))
    with pytest.raises(Unavailable, match=r"^the actor 'victim' has died: "):
        await anext(actor.count(Count()))


@pytest.mark.ray
async def test_when_a_replica_dies_the_others_go_on(on_ray: Cluster) -> None:
    actor = await spawn(on_ray, "pair", Resources(replicas=2))
    first, *_ = (await actor.notes(Empty())).text.split()
    # `die` is marked as safe: the first replica ends, and the second answers in its place.
    await actor.die(Text(text=first))
    other, *_ = (await actor.notes(Empty())).text.split()
    assert other != first
    with pytest.raises(Unavailable, match="'pair-0' has died"):
        await actor.note(Text(text="not repeated"))
    with pytest.raises(Unavailable, match="'pair-0' has died"):
        await actor.rename(Text(text="not everywhere"))


@pytest.mark.ray
async def test_a_handle_finds_its_actor_by_name_from_anywhere(on_ray: Cluster) -> None:
    actor = await spawn(on_ray, "known")
    copy = pickle.loads(pickle.dumps(actor))
    assert isinstance(copy, EchoService)
    assert await copy.echo(Text(text="by name")) == Text(text="by name")
    stranger = pickle.loads(pickle.dumps(actor).replace(b"known", b"never"))
    with pytest.raises(Unavailable, match="there is no actor 'never' in the Ray namespace 'alone'"):
        await stranger.echo(Text(text="?"))


@pytest.mark.ray
async def test_leaving_the_cluster_ends_its_actors_and_spares_the_rest(ray: Any, tmp_path: Path) -> None:
    async with a_cluster("ray", tmp_path, run="other") as other:
        kept = await spawn(other, "kept")
        async with a_cluster("ray", tmp_path, run="short") as cluster:
            await spawn(cluster, "one")
            await spawn(cluster, "two", Resources(replicas=2))
            assert sorted(actors_of(ray, "short")) == ["one", "two-0", "two-1"]
        await until_gone(ray, "short")
        assert await kept.echo(Text(text="still here")) == Text(text="still here")
    # Ray was there before, so it stays.
    assert ray.is_initialized()


def actors_of(ray: Any, namespace: str) -> list[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in found if actor["namespace"] == namespace]


async def until_gone(ray: Any, namespace: str) -> None:
    """Ray answers that it kills an actor before its name is free; pytest's timeout ends a wait for one that lives."""
    while actors_of(ray, namespace):
        await asyncio.sleep(0.05)


@pytest.mark.ray
async def test_a_failed_set_up_leaves_no_actor(ray: Any, on_ray: Cluster) -> None:
    with pytest.raises(BadInput):
        await spawn(on_ray, "broken", broken="BadInput: no model")
    await until_gone(ray, "alone")


@pytest.mark.ray
async def test_a_run_that_is_at_work_already_is_named(on_ray: Cluster, tmp_path: Path) -> None:
    await spawn(on_ray, "echo")
    async with a_cluster("ray", tmp_path / "elsewhere", run="alone") as twin:
        with pytest.raises(BadInput, match="run: the actor 'echo' of the run 'alone' is at work in this Ray cluster"):
            await spawn(twin, "echo")


@pytest.mark.ray
async def test_who_waits_for_a_place_says_so(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_transport, "PLACE_QUIETLY", 0.1)
    async with a_cluster("ray", tmp_path, run="waiting", deadline_s=0.5) as cluster:
        with pytest.raises(DeadlineExceeded, match=r"the actor 'judge' was not up within 0\.5 s"):
            await spawn(cluster, "judge", Resources(cpus=64, gpus=8))
    assert caplog.record_tuples[0][1] == logging.WARNING
    assert "the actor 'judge' waits for cpus=64 gpus=8; the Ray cluster has cpus=" in caplog.text
    await until_gone(ray, "waiting")


@pytest.mark.ray
async def test_an_actor_that_does_not_close_is_ended(
    ray: Any, on_ray: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_transport, "CLOSE", 0.2)
    actor = await spawn(on_ray, "stubborn", stubborn=True)
    await on_ray.stop("stubborn")
    await until_gone(ray, "alone")
    with pytest.raises(Unavailable):
        await actor.echo(Text(text="gone"))
