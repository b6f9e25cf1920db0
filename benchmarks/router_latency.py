"""Time to route a query: python benchmarks/router_latency.py.

Routers over the packaged MiniLM, behind a handle in this process, against the embedding classifier (`mlp`) in the
same run. First p50 and p99 per call, of one query and of 64; then one query as the pool grows. Weights are
untrained, which makes no difference to the time.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from protocols.messages import Prompt
from protocols.router import RouterConfig, RouteRequest, RouterService

QUERY = (
    "A farmer has {} hens and sells the eggs at the market for {} dollars a dozen. Each hen lays {} eggs a week."
    " How much money does the farmer make in {} weeks, if one egg in ten breaks on the way?"
)
ARMS = {
    "mlp on embeddings": {"kind": "mlp"},
    "classifier": {"kind": "classifier"},
    "lookahead, m 8": {"kind": "lookahead", "response_tokens": 8},
    "lookahead, m 64": {"kind": "lookahead", "response_tokens": 64},
    "lookahead apart, m 8": {"kind": "lookahead", "response_tokens": 8, "blocks": "apart"},
}
POOLS = (5, 10, 20, 50)


def queries(rng: np.random.Generator, count: int) -> list[Prompt]:
    return [Prompt(text=QUERY.format(*rng.integers(2, 900, size=4))) for _ in range(count)]


async def seconds(router: RouterService, batch: int, calls: int) -> list[float]:
    rng, taken = np.random.default_rng(0), []
    for call in range(calls + 2):
        request = RouteRequest(prompts=queries(rng, batch))
        began = time.perf_counter()
        await router.route(request)
        # The first calls allocate.
        if call >= 2:
            taken.append(time.perf_counter() - began)
    return taken


async def measured(
    cluster: Cluster, name: str, pool: int, threads: int, shapes: Sequence[tuple[int, int]]
) -> list[list[float]]:
    """Seconds of each call, for each shape: (queries per call, calls)."""
    candidates = [{"name": f"m{i}"} for i in range(pool)]
    given = {"candidates": candidates, "trainer": None, "threads": threads, **ARMS[name]}
    router = await cluster.router(RouterConfig.model_validate(given), name="router")
    taken = [await seconds(router, batch, calls) for batch, calls in shapes]
    await cluster.stop("router")
    return taken


def cell(taken: Sequence[float]) -> str:
    return f"{1e3 * np.quantile(taken, 0.5):.1f} / {1e3 * np.quantile(taken, 0.99):.1f}"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    told: dict[str, dict[str, float]] = {}
    config = MethodConfig(runs_dir=str(options.runs), wandb="disabled")
    async with Cluster(config, method="latency", run="latency") as cluster:
        print("| router, pool of 5 | 1 query, p50 / p99 ms | 64 queries, p50 / p99 ms | to mlp, p50 |")
        print("| --- | --- | --- | --- |")
        base = 0.0
        for name in ARMS:
            one, many = await measured(
                cluster, name, 5, options.threads, [(1, options.calls), (64, options.calls // 10)]
            )
            base = base or float(np.median(one))
            print(f"| {name} | {cell(one)} | {cell(many)} | {np.median(one) / base:.2f} |", flush=True)
            told[name] = {
                "p50": float(np.median(one)),
                "p99": float(np.quantile(one, 0.99)),
                "p50 of 64": float(np.median(many)),
            }
        print(f"\n| 1 query, p50 ms | {' | '.join(f'pool of {pool}' for pool in POOLS)} |")
        print(f"|{' --- |' * (len(POOLS) + 1)}")
        for name in ARMS:
            row = [(await measured(cluster, name, pool, options.threads, [(1, 30)]))[0] for pool in POOLS]
            print(f"| {name} | {' | '.join(f'{1e3 * np.median(taken):.1f}' for taken in row)} |", flush=True)
            told[name] |= {f"pool {pool}": float(np.median(taken)) for pool, taken in zip(POOLS, row, strict=True)}
    options.runs.mkdir(parents=True, exist_ok=True)
    (options.runs / "router_latency.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
