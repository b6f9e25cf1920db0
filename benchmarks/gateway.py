"""The gateway against Ray Serve's gRPC ingress, in front of the same policy: python benchmarks/gateway.py

Calls per second and latencies of a trivial call (health) and of sampling at several numbers of callers. Arms:
- gateway: in the process that started the policy, which is a Ray actor
- gateway, inline: gateway and policy in one process, as `launch.py serve` starts them
- serve: the policy inside of a Serve replica
- serve, actor: a Serve replica that asks the very actor that the gateway asks
- engine (of sampling alone): the actor asked without a door, as often at once
The caller is a process of its own that sends the same bytes to each. Prints Markdown and writes gateway.json.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from protocols.messages import Prompt, SamplingParams
from protocols.policy import PolicyConfig, PolicyService, SampleRequest
from protocols.service import HealthRequest
from protocols.wire import to_bytes

ROOT = Path(__file__).parents[1]
POLICY = PolicyConfig(trainer=None, threads=1, device="cpu")
WARM_UP = 1.0
CHANNELS = 8
SAMPLE = SampleRequest(prompts=[Prompt(text="The text says", seed=1)], n=4, params=SamplingParams(max_tokens=16))
REQUESTS = {"health": ("Health", HealthRequest()), "sample": ("Sample", SAMPLE)}
Call = Callable[[int], Awaitable[Any]]


async def load(call: Call, callers: int, seconds: float) -> dict[str, Any]:
    """So many callers, each with one call under way, until time is up. Counted are calls that end in the window."""
    taken: list[float] = []
    begin = time.perf_counter() + WARM_UP

    async def caller(i: int) -> None:
        while True:
            began = time.perf_counter()
            await call(i)
            if (now := time.perf_counter()) >= begin:
                taken.append(now - began)

    tasks = [asyncio.ensure_future(caller(i)) for i in range(callers)]
    done, _ = await asyncio.wait(tasks, timeout=WARM_UP + seconds, return_when=asyncio.FIRST_EXCEPTION)
    counted = list(taken)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()  # a caller ends only when its call fails
    if not counted:
        raise SystemExit(f"no call of {callers} callers ended within {seconds:g} s; give more --seconds")
    p50, p99 = (1e3 * float(value) for value in np.percentile(counted, [50, 99]))
    return {"per_s": len(counted) / seconds, "p50_ms": p50, "p99_ms": p99}


async def load_over_grpc(target: str, application: str, kind: str, callers: int, seconds: float) -> dict[str, Any]:
    method, request = REQUESTS[kind]
    data = to_bytes(request)
    async with AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(target, options))
            for _ in range(min(callers, CHANNELS))
        ]
        calls = [channel.unary_unary(f"/repertory.v1.PolicyService/{method}") for channel in channels]
        metadata = (("application", application),)  # the gateway does not read it
        await calls[0](data, metadata=metadata)  # whatever is loaded with the first call
        return await load(lambda i: calls[i % len(calls)](data, metadata=metadata), callers, seconds)


async def from_outside(target: str, application: str, kind: str, callers: int, seconds: float) -> dict[str, Any]:
    """The same in a process of its own."""
    words = [sys.executable, __file__, "--load", target, application, kind, str(callers), "--seconds", str(seconds)]
    process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
    out, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(f"the load against {target} failed")
    found: dict[str, Any] = json.loads(out)
    return found


def generate(folder: Path) -> None:
    """What Serve needs: classes made by protoc from the checked-in files."""
    from grpc_tools import protoc

    protos = ROOT / "protocols" / "proto"
    words = ["protoc", f"-I{protos}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main([*words, *(str(file) for file in protos.glob("*.proto"))]):
        raise SystemExit("protoc failed")


def start_serve(port: int, policy: PolicyService) -> dict[str, str]:
    """Both applications behind one proxy. Returns the name of each by arm."""
    from ray import serve
    from ray.serve.config import gRPCOptions

    class Served:
        """Answers with protobuf messages, as Serve wants them."""

        async def Health(self, request: Any) -> Any:
            return await self.answer(request, "health")

        async def Sample(self, request: Any) -> Any:
            return await self.answer(request, "sample")

        async def answer(self, request: Any, name: str) -> Any:
            import messages_pb2
            import policy_pb2
            import service_pb2

            from protocols.wire import from_bytes, to_bytes

            modules = (service_pb2, policy_pb2, messages_pb2)
            method = PolicyService.methods()[name]
            actor = await self.ready()  # type: ignore[attr-defined]
            response = await getattr(actor, name)(from_bytes(method.request, request.SerializeToString()))
            kind = next(getattr(m, method.response.__name__) for m in modules if hasattr(m, method.response.__name__))
            return kind.FromString(to_bytes(response))

    class Inside(Served):
        """The policy in the replica."""

        def __init__(self) -> None:
            self._lock = asyncio.Lock()
            self._actor: Any = None

        async def ready(self) -> PolicyService:
            from actors.actor import start
            from actors.policy.policy import PolicyActor

            async with self._lock:
                if self._actor is None:
                    self._actor = PolicyActor(POLICY)
                    await start(self._actor)
            actor: PolicyService = self._actor
            return actor

    class Asking(Served):
        """The policy in its own actor."""

        def __init__(self, policy: PolicyService) -> None:
            self._policy = policy

        async def ready(self) -> PolicyService:
            return self._policy

    functions = ["policy_pb2_grpc.add_PolicyServiceServicer_to_server"]
    serve.start(grpc_options=gRPCOptions(port=port, grpc_servicer_functions=functions))
    options = {"max_ongoing_requests": 1024, "ray_actor_options": {"num_cpus": 0}}
    serve.run(serve.deployment(**options)(Inside).bind(), name="inside", route_prefix="/inside")
    serve.run(serve.deployment(**options)(Asking).bind(policy), name="asking", route_prefix="/asking")
    return {"serve": "inside", "serve, actor": "asking"}


async def measure(callers: list[int], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """All arms in turn, and the medians of each."""
    port = 9000
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    async with AsyncExitStack() as stack:
        runs = stack.enter_context(tempfile.TemporaryDirectory())
        given = {"runs_dir": runs, "gateway": {"address": "127.0.0.1:0"}}
        on_ray = Cluster(MethodConfig.model_validate({"transport": "ray"} | given), method="benchmark", run="ray")
        inline = Cluster(MethodConfig.model_validate(given), method="benchmark", run="inline")
        policies = [await (await stack.enter_async_context(one)).policy(POLICY) for one in (on_ray, inline)]
        assert on_ray._gateway is not None and inline._gateway is not None
        applications = start_serve(port, policies[0])
        arms = {arm: (f"127.0.0.1:{port}", name) for arm, name in applications.items()}
        arms["gateway"] = (f"127.0.0.1:{on_ray._gateway.port}", "-")
        arms["gateway, inline"] = (f"127.0.0.1:{inline._gateway.port}", "-")
        for _ in range(rounds):
            for kind in REQUESTS:
                window = seconds * (1 if kind == "health" else 2)
                for count in callers:
                    for arm, (target, application) in arms.items():
                        result = await from_outside(target, application, kind, count, window)
                        found.setdefault((kind, count, arm), []).append(result)
                    if kind == "sample":
                        engine = await load(lambda _: policies[0].sample(SAMPLE), count, window)
                        found.setdefault((kind, count, "engine"), []).append(engine)
    return [
        {"kind": kind, "callers": count, "arm": arm}
        | {name: statistics.median(one[name] for one in results) for name in results[0]}
        | {"range_per_s": [min(one["per_s"] for one in results), max(one["per_s"] for one in results)]}
        for (kind, count, arm), results in found.items()
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to the faster of Serve's arms."""
    lines = [
        "| call | callers | arm | calls per s (range) | to Serve | p50, ms | p99, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        same = [other for other in results if (other["kind"], other["callers"]) == (one["kind"], one["callers"])]
        serve = max(other["per_s"] for other in same if other["arm"].startswith("serve"))
        low, high = one["range_per_s"]
        lines.append(
            f"| {one['kind']} | {one['callers']} | {one['arm']} | {one['per_s']:.1f} ({low:.1f}-{high:.1f}) |"
            f" {one['per_s'] / serve:.2f}x | {one['p50_ms']:.1f} | {one['p99_ms']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("gateway.json"))
    parser.add_argument("--load", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        target, application, kind, callers = options.load
        print(json.dumps(asyncio.run(load_over_grpc(target, application, kind, int(callers), options.seconds))))
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        # For the processes that Ray starts. It would run them at a lower priority than the gateway.
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT), os.environ.get("PYTHONPATH", "")])
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
        sys.path.insert(0, folder)
        results = asyncio.run(measure(options.callers, options.seconds, options.rounds))
    print(table(results))
    options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
