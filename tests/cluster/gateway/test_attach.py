"""Gateways to a run that they did not start, and what callers see when actors or gateways die."""

import asyncio
import collections
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

import launch
from cluster.cluster import Cluster
from cluster.config import MethodConfig
from methods.worlds.ledger import write_skeleton
from protocols.client import connect
from protocols.errors import BadInput, Unavailable
from protocols.handle import transport_of
from protocols.messages import Prompt, SamplingParams
from protocols.placement import Resources
from protocols.policy import PolicyConfig, PolicyService, SampleRequest
from protocols.service import Empty, HealthRequest
from protocols.verifier import VerifierConfig
from tests.cluster.gateway.scripted import counters
from tests.cluster.local_ray import local_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
ROOT = Path(launch.__file__).parent
CALLERS = 8


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray cluster with room for a few policies."""
    with local_ray(cpus=4) as ray, pytest.MonkeyPatch.context() as patch:
        found = ray.get_runtime_context().gcs_address
        patch.setenv("RAY_ADDRESS", found)
        yield found


@asynccontextmanager
async def a_cluster(folder: Path, run: str, *, gateway: bool = False) -> AsyncIterator[Cluster]:
    given = {"runs_dir": str(folder), "transport": "ray", "deadline_s": 120}
    config = MethodConfig.model_validate(given | ({"gateway": {"address": "127.0.0.1:0"}} if gateway else {}))
    async with Cluster(config, method="test", run=run) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_skeleton(folder)
    return str(folder)


def a_policy(model: str, **options: Any) -> PolicyConfig:
    given = {"model": model, "init": "random", "threads": 1, "device": "cpu", "resources": Resources(cpus=0.4)}
    return PolicyConfig.model_validate(given | options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(address: str, model: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """A run with a policy whose samplers are processes of their own, and a verifier."""
    async with a_cluster(tmp_path_factory.mktemp("runs"), "first") as cluster:
        policy = await cluster.policy(a_policy(model, sampler={"replicas": 2}))
        await cluster.verifier(VerifierConfig(), policy)
        yield cluster


def a_request(seed: int, tokens: int = 8) -> SampleRequest:
    return SampleRequest(prompts=[Prompt(tokens=[5, 6], seed=seed)], params=SamplingParams(max_tokens=tokens))


class Load:
    """Callers that ask without pause until they are told to stop; what came of each call."""

    def __init__(self, policy: PolicyService) -> None:
        self._policy = policy
        self._stopping = False
        self.codes: collections.Counter[str] = collections.Counter()
        self._tasks = [asyncio.ensure_future(self._call(i)) for i in range(CALLERS)]

    async def _call(self, caller: int) -> None:
        seed = caller
        while not self._stopping:
            seed += CALLERS
            try:
                await self._policy.sample(a_request(seed))
                self.codes["OK"] += 1
            except Unavailable as error:
                self.codes[error.message.partition(":")[0]] += 1

    async def more(self, code: str, count: int) -> None:
        """Wait until so many more calls have ended so."""
        wanted = self.codes[code] + count
        while self.codes[code] < wanted:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)


async def test_two_gateways_in_front_of_a_run(run: Cluster, tmp_path: Path) -> None:
    own = run._handles["policy"]
    assert isinstance(own, PolicyService)
    before = await own.sample(a_request(1))
    async with a_cluster(tmp_path, "one", gateway=True) as one:
        await one.attach("first")
        # Samplers and ranks are not for callers.
        assert one._handles.keys() == {"policy", "verifier"}
        async with a_cluster(tmp_path, "two", gateway=True) as two:
            await two.attach("first")
            ports = [cluster._gateway.port for cluster in (one, two) if cluster._gateway]
            both = connect("grpc://" + ",".join(f"127.0.0.1:{port}" for port in ports), PolicyService)
            assert await both.sample(a_request(1)) == before
            load = Load(both)
            await load.more("OK", 60)
            for cluster in (one, two):
                assert cluster._gateway is not None
                text = counters(cluster._gateway)
                name = 'repertory_calls_total{code="OK",method="PolicyService.sample"} '
                (count,) = [line for line in text.splitlines() if line.startswith(name)]
                assert float(count.split()[-1]) > 10
        # With one of them gone nobody notices.
        await load.more("OK", 30)
        await load.stop()
        assert load.codes.keys() == {"OK"}
    # The run's actors are the run's.
    assert (await own.health(HealthRequest())).ready
    assert await own.sample(a_request(1)) == before


async def test_runs_that_are_not_there(run: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_cluster(tmp_path, "one", gateway=True) as one:
        with pytest.raises(BadInput, match=r"attach: no run 'frist' has actors in this Ray cluster; .*first"):
            await one.attach("frist")
        monkeypatch.delenv("RAY_ADDRESS")
        with pytest.raises(BadInput, match="attach: set RAY_ADDRESS"):
            await one.attach("first")


@pytest.fixture
def gateways(address: str, tmp_path: Path) -> Iterator[Any]:
    """Start `launch.py serve attach=first` as an operator does; the process and its address."""
    started: list[subprocess.Popen[str]] = []

    def start(where: str) -> tuple["subprocess.Popen[str]", str]:
        keys = ["attach=first", "transport=ray", f"address={where}", "gateway.http=", f"run=front-{len(started)}"]
        command = [sys.executable, ROOT / "launch.py", "serve", *keys]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("serving at "):
                return process, line.split()[2].rstrip(";")
        raise AssertionError(said)

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


async def test_a_gateway_that_is_killed_and_started_again_loses_no_safe_call(run: Cluster, gateways: Any) -> None:
    process, address = await asyncio.to_thread(gateways, "127.0.0.1:0")
    policy = connect(address, PolicyService, tries=50)
    hasty = connect(address, PolicyService, tries=1)
    load = Load(policy)
    await load.more("OK", 30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(Unavailable):
        await hasty.sample(a_request(1))
    await asyncio.to_thread(gateways, address.removeprefix("grpc://"))
    await load.more("OK", 30)
    await load.stop()
    assert load.codes.keys() == {"OK"}
    # What is not safe is not made again: nobody knows whether it was done.
    assert (await hasty.info(Empty())).version == 0


async def test_an_actor_killed_under_load(address: str, model: str, tmp_path: Path) -> None:
    async with a_cluster(tmp_path, "pair", gateway=True) as cluster:
        policy = await cluster.policy(a_policy(model, trainer=None, resources=Resources(cpus=0.4, replicas=2)))
        assert cluster._gateway is not None
        load = Load(connect(cluster._gateway.address, PolicyService, tries=1))
        await load.more("OK", 30)
        first, second = transport_of(policy).replicas  # type: ignore[attr-defined]
        kill(first)
        await load.more("OK", 60)
        assert load.codes.keys() == {"OK"}
        kill(second)
        # Now there is nobody: every call is answered, and says so.
        await load.more("the actor 'policy-1' has died", CALLERS)
        await load.stop()
        outcomes = {"OK", "the actor 'policy-0' has died", "the actor 'policy-1' has died"}
        assert load.codes.keys() <= outcomes
        async with grpc.aio.insecure_channel(cluster._gateway.address.removeprefix("grpc://")) as channel:
            from grpc_health.v1 import health_pb2, health_pb2_grpc

            found = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert found.status == health_pb2.HealthCheckResponse.SERVING


async def test_an_attached_gateway_finds_the_actors_of_a_run_that_goes_on(
    address: str, model: str, tmp_path: Path
) -> None:
    async with a_cluster(tmp_path, "front", gateway=True) as front:
        async with a_cluster(tmp_path, "second") as run:
            await run.policy(a_policy(model, trainer=None))
            await front.attach("second")
            assert front._gateway is not None
            policy = connect(front._gateway.address, PolicyService, tries=1)
            before = await policy.sample(a_request(1))
        with pytest.raises(Unavailable, match="the actor 'policy' has died"):
            await policy.sample(a_request(1))
        with pytest.raises(Unavailable, match="there is no actor 'policy' in the Ray namespace 'second'"):
            await policy.sample(a_request(1))
        async with a_cluster(tmp_path, "second") as run:
            await run.policy(a_policy(model, trainer=None))
            assert await policy.sample(a_request(1)) == before


def kill(transport: Any) -> None:
    """End the actor's process as a crash would."""
    import ray

    pid = ray.get(transport._host.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)
