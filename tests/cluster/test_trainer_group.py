"""Ranks in processes of their own train as one process does."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.cluster import Cluster
from protocols.errors import Stale, Unavailable
from protocols.losses import GRPOLoss, LossSpec, SFTLoss
from protocols.messages import Prompt, SamplingParams
from protocols.policy import PolicyConfig, PolicyService, SampleRequest
from protocols.service import CheckpointRequest, Empty
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TOLERANCE = 2e-5
"""Of losses, relative to their size, and of weights, absolute, after 5 steps."""
LOSSES: dict[str, dict[str, LossSpec]] = {
    "sft": {"a": SFTLoss(normalize="sequence", temperature=0.7)},
    "grpo": {"a": GRPOLoss(kl_coef=0.3, dual_clip=1.5, entropy_coef=0.1)},
    "both": {"a": SFTLoss(coef=0.5), "b": GRPOLoss(normalize="sequence", clip_high=0.28)},
}
GROUPS: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch"},
    "zero-1": {"engine": "deepspeed", "zero_stage": 1},
    "zero-2": {"engine": "deepspeed", "zero_stage": 2},
    "zero-3": {"engine": "deepspeed", "zero_stage": 3},
}
TRAINER = {
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup_steps": 2,
    "total_steps": 20,
    "micro_batch_tokens": 40,
}


def a_policy(model: str, **trainer: Any) -> PolicyConfig:
    given = {"model": model, "init": "random", "threads": 1, "device": "cpu", "trainer": TRAINER | trainer}
    return PolicyConfig.model_validate(given)


def rows(seed: int, losses: dict[str, LossSpec]) -> list[TrainRow]:
    """Rows of their own, and three that share a prompt."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(1, 180, 16)
    return [
        TrainRow(
            row_id=f"{prompt}-{length}",
            tokens=np.r_[shared[:prompt], rng.integers(1, 180, length - prompt)],
            terms={name: np.r_[[0.0] * prompt, rng.choice([0.5, 1.0], length - prompt)] for name in losses},
            advantages=rng.normal(size=length),
            reference_logprobs=-rng.random(length) * 5,
        )
        for prompt, length in [
            (2, 14),
            (2, 5),
            (2, 9),
            (16, 19),
            (2, 22),
            (16, 18),
            (2, 7),
            (2, 18),
            (16, 20),
            (2, 11),
        ]
    ]


async def updates(policy: PolicyService, losses: dict[str, LossSpec], seeds: range) -> list[float]:
    """The loss before each update, and the norm of its gradient."""
    found = []
    for seed in seeds:
        report = await policy.forward_backward(ForwardBackwardRequest(rows=rows(seed, losses), losses=losses))
        step = await policy.optim_step(OptimStepRequest())
        found += [report.loss, step.grad_norm, *(v for r in report.terms.values() for v in r.metrics.values())]
    return found


async def saved(policy: PolicyService, directory: Path) -> dict[str, torch.Tensor]:
    await policy.save(CheckpointRequest(path=str(directory)))
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("group", GROUPS)
async def test_two_ranks_are_as_one(group: str, model: str, inline: Cluster, on_ray: Cluster, tmp_path: Path) -> None:
    one = await inline.policy(a_policy(model))
    two = await on_ray.policy(a_policy(model, workers=2, **GROUPS[group]))
    for name, losses in LOSSES.items():
        expected = await updates(one, losses, range(5))
        np.testing.assert_allclose(await updates(two, losses, range(5)), expected, rtol=TOLERANCE, atol=TOLERANCE)
        weights, others = await saved(one, tmp_path / name / "one"), await saved(two, tmp_path / name / "two")
        assert weights.keys() == others.keys()
        for key in weights:
            torch.testing.assert_close(others[key], weights[key], atol=TOLERANCE, rtol=0, msg=key)
    published = await two.publish(Empty())
    assert published.version == 15
    assert published.gap < 1e-4


async def test_shards_of_two_ranks_are_broadcast_to_two_samplers(model: str, on_ray: Cluster, ray: Any) -> None:
    sampler = {"replicas": 2, "publication": "broadcast"}
    given = a_policy(model, workers=2, **GROUPS["zero-3"]).model_dump() | {"sampler": sampler}
    policy = await on_ray.policy(PolicyConfig.model_validate(given))
    for step in range(2):
        await updates(policy, LOSSES["both"], range(step, step + 1))
        published = await policy.publish(Empty())
        assert published.version == step + 1
        assert published.gap < 1e-4
    host = ray.get_actor("policy-sampler-1", "group-ray")
    os.kill(ray.get(host.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    with pytest.raises(Unavailable, match=r"the actor 'policy-sampler-1' has died|a member of the broadcast is gone"):
        await policy.publish(Empty())


@pytest.mark.parametrize("group", ["torch", "zero-2"])
async def test_callers_of_two_ranks_take_turns_and_a_step_needs_a_gradient(
    group: str, model: str, inline: Cluster, on_ray: Cluster
) -> None:
    one = await inline.policy(a_policy(model))
    two = await on_ray.policy(a_policy(model, workers=2, **GROUPS[group]))
    with pytest.raises(Stale, match="no gradient was accumulated"):
        await two.optim_step(OptimStepRequest())
    request = ForwardBackwardRequest(rows=rows(0, LOSSES["sft"]), losses=LOSSES["sft"])
    several = [asyncio.ensure_future(two.forward_backward(request)) for _ in range(6)]
    await asyncio.wait(several[:1])
    several[3].cancel()
    await asyncio.wait(several)
    done = sum(not call.cancelled() for call in several)
    norm = (await two.optim_step(OptimStepRequest())).grad_norm
    await one.forward_backward(request)
    single = (await one.optim_step(OptimStepRequest())).grad_norm
    # The call that was cancelled ran on both ranks or on neither.
    assert norm / single in [pytest.approx(ran, rel=1e-4) for ran in range(done, len(several) + 1)]


@pytest.mark.parametrize("group", ["zero-2", "zero-3"])
async def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    group: str, model: str, inline: Cluster, on_ray: Cluster, tmp_path: Path
) -> None:
    two = await on_ray.policy(a_policy(model, workers=2, **GROUPS[group]))
    await updates(two, LOSSES["both"], range(3))
    await two.save(CheckpointRequest(path=str(tmp_path / "saved")))
    one = await inline.policy(a_policy(model, **GROUPS[group]))
    await updates(one, LOSSES["sft"], range(2))
    await one.load(CheckpointRequest(path=str(tmp_path / "saved")))
    assert (await one.info(Empty())).version == 3
    expected = await updates(two, LOSSES["both"], range(3, 6))
    np.testing.assert_allclose(
        await updates(one, LOSSES["both"], range(3, 6)), expected, rtol=TOLERANCE, atol=TOLERANCE
    )


async def test_a_rank_that_dies_fails_the_step_by_name(model: str, on_ray: Cluster, ray: Any) -> None:
    policy = await on_ray.policy(a_policy(model, workers=2, **GROUPS["zero-2"]))
    await updates(policy, LOSSES["sft"], range(1))
    host = ray.get_actor("policy-trainer-1", "group-ray")
    pid = ray.get(host.__ray_call__.remote(lambda _: os.getpid()))
    under_way = asyncio.ensure_future(updates(policy, LOSSES["sft"], range(1, 200)))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="the actor 'policy-trainer-1' has died"):
        await under_way
    # The samplers answer on.
    await policy.sample(SampleRequest(prompts=[Prompt(tokens=[5, 6])], params=SamplingParams(max_tokens=2)))
