"""Cost of the typed handle, against the bare call that it wraps: python benchmarks/handle.py

One call sends a message with an array and gets its sum back: inline against awaiting the method itself, through Ray
against a bare Ray actor that takes the same array. The two take turns. Prints Markdown and writes handle.json.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from sum_service import Array, Bare, SumActor, SumService

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from protocols.placement import Resources

SIZES = {"1 KB": 1 << 10, "10 MB": 10 << 20}


async def seconds(call: Callable[[], Awaitable[Any]], repeat: int) -> float:
    began = time.perf_counter()
    for _ in range(repeat):
        await call()
    return (time.perf_counter() - began) / repeat


async def compare(
    bare: Callable[[], Awaitable[Any]], typed: Callable[[], Awaitable[Any]], size: int
) -> dict[str, Any]:
    """Medians of both over interleaved turns, in milliseconds."""
    repeat = 200 if size < 1 << 20 else 10
    for call in (bare, typed):
        await seconds(call, repeat)
    turns = [(await seconds(bare, repeat), await seconds(typed, repeat)) for _ in range(15)]
    bare_ms, typed_ms = (1e3 * statistics.median(column) for column in zip(*turns, strict=True))
    extra = [1e3 * (typed - bare) for bare, typed in turns]
    return {
        "bare_ms": bare_ms,
        "typed_ms": typed_ms,
        "extra_ms": statistics.median(extra),
        "spread_ms": [min(extra), max(extra)],
    }


async def measure(transport: str, size: int) -> dict[str, Any]:
    values = np.random.default_rng(0).normal(size=size // 8)
    request = Array(values=values)
    with tempfile.TemporaryDirectory() as runs:
        config = MethodConfig.model_validate({"runs_dir": runs, "transport": transport})
        async with Cluster(config, method="benchmark", run="handle") as cluster:
            handle = await cluster._spawn(SumService, "sum", SumActor, Resources())
            if transport == "inline":
                actor = SumActor()
                return await compare(lambda: actor.total(request), lambda: handle.total(request), size)
            import ray

            bare = ray.remote(Bare).options(num_cpus=0).remote()

            async def call() -> float:
                result: float = await bare.total.remote(values)
                return result

            return await compare(call, lambda: handle.total(request), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("handle.json"))
    options = parser.parse_args()
    results = {}
    print("| transport | message | bare call, ms | handle, ms | more, ms (range) | more, share |")
    print("|---|---|---|---|---|---|")
    for transport in ("inline", "ray"):
        for name, size in SIZES.items():
            row = asyncio.run(measure(transport, size))
            results[f"{transport} {name}"] = row
            low, high = row["spread_ms"]
            print(
                f"| {transport} | {name} | {row['bare_ms']:.3f} | {row['typed_ms']:.3f}"
                f" | {row['extra_ms']:.3f} ({low:.3f} to {high:.3f}) | {row['extra_ms'] / row['bare_ms']:.1%} |",
                flush=True,
            )
    options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
