"""Time to publish weights, against the time to copy the same bytes: python benchmarks/publication.py

A trainer brings its weights to a sampler in another process through Ray. The copy: a bare Ray actor takes the same
arrays in messages of the same size and writes them over its own. Both take turns. Prints Markdown and writes
publication.json.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from trl_ratio import write_model

from actors.policy.trainer_worker import BUCKET
from cluster.cluster import Cluster
from cluster.config import MethodConfig
from protocols.policy import PolicyConfig
from protocols.service import Empty

SHAPES = {
    "10M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 12},
    "100M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 9, "num_attention_heads": 32},
}


class Copy:
    """Holds the same arrays as a model."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.held = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    async def take(self, arrays: dict[str, Any]) -> None:
        for name, array in arrays.items():
            np.copyto(self.held[name], array)


def buckets(arrays: dict[str, Any]) -> Iterator[dict[str, Any]]:
    piece: dict[str, Any] = {}
    for name, array in arrays.items():
        if piece and sum(one.nbytes for one in piece.values()) + array.nbytes > BUCKET:
            yield piece
            piece = {}
        piece[name] = array
    yield piece


async def measure(shape: dict[str, int], engine: str, turns: int) -> dict[str, Any]:
    import ray
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape, 0)
        arrays = load_file(Path(folder) / "model.safetensors")
        config = MethodConfig.model_validate({"runs_dir": folder, "transport": "ray"})
        sampler = {"engine": engine} if engine == "vllm" else {"replicas": 2}
        given = {"model": folder, "device": "cpu", "threads": 1, "sampler": sampler, "resources": {"cpus": 0.5}}
        async with Cluster(config, method="benchmark", run="publication") as cluster:
            policy = await cluster.policy(PolicyConfig.model_validate(given))
            copies = [
                ray.remote(Copy).options(num_cpus=0).remote({name: a.shape for name, a in arrays.items()})
                for _ in range(1 if engine == "vllm" else 2)
            ]
            times: list[tuple[float, float]] = []
            for turn in range(turns + 1):
                began = time.perf_counter()
                for piece in buckets(arrays):
                    # The trainer goes on training, so it publishes a copy.
                    reference = ray.put({name: array.copy() for name, array in piece.items()})
                    await asyncio.gather(*(copy.take.remote(reference) for copy in copies))
                copied = time.perf_counter() - began
                began = time.perf_counter()
                published = await policy.publish(Empty())
                if turn:
                    times.append((copied, time.perf_counter() - began))
    copy_s, publish_s = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "mb": published.bytes / 1e6,
        "copy_s": copy_s,
        "publish_s": publish_s,
        "ratio": statistics.median(publish / copy for copy, publish in times),
        "range": [min(p / c for c, p in times), max(p / c for c, p in times)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("publication.json"))
    options = parser.parse_args()
    results = {}
    print("| model | samplers | MB | copy, s | publication, s | ratio (range) |\n|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for engine, label in (("transformers", "2 transformers"), ("vllm", "1 vllm")):
            row = asyncio.run(measure(shape, engine, options.turns))
            results[f"{name} {label}"] = row
            low, high = row["range"]
            print(
                f"| {name} | {label} | {row['mb']:.0f} | {row['copy_s']:.3f} | {row['publish_s']:.3f}"
                f" | {row['ratio']:.2f}x ({low:.2f}-{high:.2f}) |",
                flush=True,
            )
    options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
