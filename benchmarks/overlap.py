"""Wall time per step at staleness 0 and 1, against rollout and training alone: python benchmarks/overlap.py

A sampler and a trainer in two processes of one thread each. The same loop runs twice; at staleness 1 the rollouts of
the next step go on while the trainer works. Prints Markdown and writes overlap.json.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from trl_ratio import PROMPTS, REGIMES, SAMPLES, SHAPES, prompts, write_model

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.steps import LoopState, Step
from protocols.losses import GRPOLoss
from protocols.messages import Prompt, SamplingParams
from protocols.policy import PolicyConfig, SampleRequest
from protocols.service import Empty
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow


class Cursor(LoopState):
    """Nothing is carried."""


class State(LoopState):
    """Nothing but that."""

    rollout: Cursor = Cursor()


async def measure(model: Path, regime_name: str, staleness: int, steps: int) -> dict[str, float]:
    """Medians over the steps after the first two, in seconds."""
    regime = REGIMES[regime_name]
    rollout_s: list[float] = []
    train_s: list[float] = []
    ends: list[float] = []
    run = f"{regime_name.replace(' ', '-')}-{staleness}"
    config = MethodConfig.model_validate(
        {
            "runs_dir": str(model / "runs"),
            "transport": "ray",
            "steps": steps,
            "checkpoint_every": 1000,
            "wandb": "disabled",
        }
    )
    given: dict[str, Any] = {
        "model": str(model), "device": "cpu", "threads": 1, "sampler": {"engine": "vllm"},
        "trainer": {"learning_rate": 1e-6, "micro_batch_tokens": 2048}, "resources": {"cpus": 1},
    }  # fmt: skip
    async with Cluster(config, method="benchmark", run=run) as cluster:
        policy = await cluster.policy(PolicyConfig.model_validate(given))

        async def produce(step: Step, cursor: Cursor) -> list[TrainRow]:
            began = time.perf_counter()
            asked = [Prompt(text=text, seed=step.seed(i)) for i, text in enumerate(prompts(regime))]
            params = SamplingParams(max_tokens=regime.longest)
            sampled = await policy.sample(SampleRequest(prompts=asked, n=SAMPLES, params=params))
            rollout_s.append(time.perf_counter() - began)
            rng = step.rng("advantages")
            return [
                TrainRow(
                    row_id=str(p),
                    tokens=np.r_[result.prompt_tokens.array, one.tokens.array],
                    terms={"grpo": np.r_[np.zeros(len(result.prompt_tokens)), np.ones(len(one.tokens))]},
                    advantages=np.r_[np.zeros(len(result.prompt_tokens)), np.full(len(one.tokens), rng.normal())],
                    sampled_logprobs=np.r_[np.zeros(len(result.prompt_tokens)), one.logprobs.array],
                )
                for p, result in enumerate(sampled.results)
                for one in result.completions
            ]

        async for _, rows in cluster.overlapped(State(), produce, staleness=staleness):
            began = time.perf_counter()
            await policy.forward_backward(ForwardBackwardRequest(rows=rows, losses={"grpo": GRPOLoss()}))
            await policy.optim_step(OptimStepRequest())
            await policy.publish(Empty())
            ends.append(time.perf_counter())
            train_s.append(ends[-1] - began)
    return {
        "rollout_s": statistics.median(rollout_s[2:]),
        "train_s": statistics.median(train_s[2:]),
        "step_s": statistics.median(np.diff(ends)[1:].tolist()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("overlap.json"))
    options = parser.parse_args()
    results = {}
    print(f"{len(os.sched_getaffinity(0))} cores; {PROMPTS} prompts x {SAMPLES} samples, the 10M model\n")
    print("| regime | rollout alone | training alone | step at 0 | step at 1 | to max(rollout, training) | faster |")
    print("|---|---|---|---|---|---|---|")
    for name, regime in REGIMES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), SHAPES["10M"], regime.mean)
            zero, one = (asyncio.run(measure(Path(folder), name, s, options.steps)) for s in (0, 1))
        results[name] = {"0": zero, "1": one}
        bound = max(zero["rollout_s"], zero["train_s"])
        seconds = (zero["rollout_s"], zero["train_s"], zero["step_s"], one["step_s"])
        print(
            f"| {name} | {' | '.join(f'{value:.2f} s' for value in seconds)}"
            f" | {one['step_s'] / bound:.2f}x | {zero['step_s'] / one['step_s']:.2f}x |",
            flush=True,
        )
    options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
