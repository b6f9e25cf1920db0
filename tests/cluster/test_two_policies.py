"""Two policies of different make train side by side in one loop, each with its own version and commit."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.steps import LoopState
from methods.worlds.ledger import write_skeleton
from protocols.losses import SFTLoss
from protocols.messages import Prompt, SamplingParams
from protocols.policy import PolicyConfig, PolicyService, SampleRequest, TokenizeRequest
from protocols.service import Empty
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow

TEXT = "What is K0? K0 is V0."


class State(LoopState):
    pass


async def learn(policy: PolicyService, seed: int) -> dict[str, float]:
    """Sample, train on the samples, publish."""
    params = SamplingParams(max_tokens=8)
    (sampled,) = (
        await policy.sample(SampleRequest(prompts=[Prompt(text=TEXT, seed=seed)], n=4, params=params))
    ).results
    rows = [
        TrainRow(
            row_id=f"{seed}/{i}",
            tokens=np.r_[sampled.prompt_tokens.array, one.tokens.array],
            terms={"sft": np.r_[np.zeros(len(sampled.prompt_tokens)), np.ones(len(one.tokens))]},
        )
        for i, one in enumerate(sampled.completions)
    ]
    loss = (await policy.forward_backward(ForwardBackwardRequest(rows=rows, losses={"sft": SFTLoss()}))).loss
    await policy.optim_step(OptimStepRequest())
    return {"loss": loss, "version": (await policy.publish(Empty())).version}


async def run(folder: Path, model: Path, steps: int) -> list[dict[str, float]]:
    config = MethodConfig(runs_dir=str(folder), steps=steps, wandb="disabled")
    given: dict[str, Any] = {"threads": 1, "device": "cpu", "trainer": {"learning_rate": 1e-3}}
    async with Cluster(config, method="test", run="two") as cluster:
        # One shares its module between sampler and trainer, the other has them apart.
        ledger = PolicyConfig.model_validate(
            given | {"model": str(model), "init": "random", "sampler": {"replicas": 2}}
        )
        policies = {
            "one": await cluster.policy(PolicyConfig.model_validate(given), name="one"),
            "other": await cluster.policy(ledger, name="other"),
        }
        tokens = [
            (await p.tokenize(TokenizeRequest(prompts=[Prompt(text=TEXT)]))).tokens[0] for p in policies.values()
        ]
        assert tokens[0] != tokens[1]
        async for step in cluster.steps(State()):
            for name, policy in policies.items():
                # The second one learns twice as often.
                for turn in range(1 + (name == "other")):
                    report = await learn(policy, step.seed(name, turn))
                step.log({f"{name}/{key}": value for key, value in report.items()})
        return cluster.metrics()


async def test_each_has_its_own_version_and_goes_on_from_its_own_commit(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_skeleton(model)
    whole = await run(tmp_path / "whole", model, 4)
    assert [(row["one/version"], row["other/version"]) for row in whole] == [(1, 2), (2, 4), (3, 6), (4, 8)]
    await run(tmp_path / "parts", model, 2)
    assert await run(tmp_path / "parts", model, 4) == whole
    saved = [
        {
            name: load_file(tmp_path / kind / "two/checkpoints/step-000004" / name / "model.safetensors")
            for name in ("one", "other")
        }
        for kind in ("whole", "parts")
    ]
    for name in ("one", "other"):
        assert saved[0][name].keys() == saved[1][name].keys()
        assert all((saved[0][name][key] == saved[1][name][key]).all() for key in saved[0][name])
