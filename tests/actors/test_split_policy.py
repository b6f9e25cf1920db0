"""A policy whose samplers and trainer live apart gives what one with a shared module gives."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.inline import InlineTransport
from protocols.errors import BadInput, Corrupt, Stale
from protocols.losses import GRPOLoss, SFTLoss
from protocols.messages import Prompt, SamplingParams
from protocols.policy import EmbedRequest, PolicyConfig, PolicyService, SampleRequest, SampleResponse, ScoreRequest
from protocols.service import CheckpointRequest, Empty
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow

PROMPTS = [Prompt(tokens=np.arange(3, 9), seed=1), Prompt(tokens=np.arange(20, 24), seed=2)]
SHARED: dict[str, Any] = {"learning_rate": 1e-2, "micro_batch_tokens": 32}
EMBEDDED = EmbedRequest(prompts=[Prompt(tokens=[3, 4, 5]), Prompt(tokens=[6])])
PROBED = ScoreRequest(sequences=[np.arange(1, 15, dtype=np.int32), np.arange(30, 60, 3, dtype=np.int32)])


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(MethodConfig(runs_dir=str(tmp_path)), method="test", run="one") as cluster:
        yield cluster


def a_policy(model: Path, **options: Any) -> PolicyConfig:
    return PolicyConfig.model_validate({"model": str(model), "threads": 1, "device": "cpu"} | options)


def rows(seed: int = 0) -> list[TrainRow]:
    rng = np.random.default_rng(seed)
    lengths = [14, 5, 9, 22, 7]
    return [
        TrainRow(
            row_id=str(i),
            tokens=rng.integers(1, 180, length),
            terms={"a": np.r_[0.0, 0.0, np.ones(length - 2)], "b": np.r_[0.0, 0.0, np.ones(length - 2)]},
            advantages=rng.normal(size=length),
        )
        for i, length in enumerate(lengths)
    ]


async def update(policy: PolicyService, seed: int = 0) -> float:
    losses = {"a": SFTLoss(), "b": GRPOLoss(entropy_coef=0.01)}
    loss = (await policy.forward_backward(ForwardBackwardRequest(rows=rows(seed), losses=losses))).loss
    await policy.optim_step(OptimStepRequest())
    return loss


async def sample(policy: PolicyService) -> SampleResponse:
    return await policy.sample(SampleRequest(prompts=PROMPTS, n=3, params=SamplingParams(max_tokens=12)))


def inner(cluster: Cluster, name: str) -> Any:
    """The actor itself."""
    transport = cluster._started[name][0]
    assert isinstance(transport, InlineTransport)
    return transport.actor


@pytest.fixture
async def two(cluster: Cluster, model_dirs: dict[str, Path]) -> tuple[PolicyService, PolicyService]:
    """One policy whose sampler and trainer share a module, one with two samplers and a trainer."""
    model = model_dirs["qwen2"]
    shared = await cluster.policy(a_policy(model, trainer=SHARED), name="shared")
    split = await cluster.policy(a_policy(model, trainer=SHARED, sampler={"replicas": 2}), name="split")
    return shared, split


async def test_five_updates_are_the_same(two: tuple[PolicyService, PolicyService]) -> None:
    shared, split = two
    for step in range(5):
        assert await sample(split) == await sample(shared)
        assert await update(split, step) == await update(shared, step)
        published = await split.publish(Empty())
        assert published.version == step + 1
        # What a sampler draws with its cache differs from a whole pass in the last bits.
        assert published.gap < 1e-5
        assert await split.score(PROBED) == await shared.score(PROBED)
        assert await split.embed(EMBEDDED) == await shared.embed(EMBEDDED)
    assert (await split.info(Empty())) == (await shared.info(Empty()))


async def test_samplers_keep_the_published_weights_until_the_next_publication(
    two: tuple[PolicyService, PolicyService],
) -> None:
    _, split = two
    before = await sample(split)
    await update(split)
    assert await sample(split) == before
    await split.publish(Empty())
    after = await sample(split)
    assert after != before
    assert {int(v) for result in after.results for one in result.completions for v in one.versions.array} == {1}


async def test_a_request_under_way_keeps_its_weights(two: tuple[PolicyService, PolicyService]) -> None:
    shared, split = two
    expected = await sample(shared)
    await update(split)
    under_way = [asyncio.ensure_future(sample(split)) for _ in range(6)]
    await asyncio.sleep(0)  # All are handed to the samplers before the publication begins.
    published = asyncio.ensure_future(split.publish(Empty()))
    for response in await asyncio.gather(*under_way):
        versions = {int(v) for r in response.results for one in r.completions for v in one.versions.array}
        assert len(versions) == 1
        assert (response == expected) == (versions == {0})
    assert (await published).version == 1


async def test_a_checkpoint_of_one_kind_is_read_by_the_other(
    two: tuple[PolicyService, PolicyService], tmp_path: Path
) -> None:
    shared, split = two
    await update(split)
    await split.save(CheckpointRequest(path=str(tmp_path / "saved")))
    await shared.load(CheckpointRequest(path=str(tmp_path / "saved")))
    await update(split, 1)
    await split.publish(Empty())
    await split.load(CheckpointRequest(path=str(tmp_path / "saved")))
    assert await sample(split) == await sample(shared)
    assert await update(split, 2) == await update(shared, 2)


async def test_only_the_adapter_is_published(cluster: Cluster, model_dirs: dict[str, Path]) -> None:
    options = {"trainer": SHARED, "lora": {"rank": 2}}
    shared = await cluster.policy(a_policy(model_dirs["qwen2"], **options), name="shared")
    split = await cluster.policy(a_policy(model_dirs["qwen2"], sampler={"replicas": 2}, **options), name="split")
    for step in range(2):
        assert await update(split, step) == await update(shared, step)
        published = await split.publish(Empty())
        assert published.bytes == 4 * (await split.info(Empty())).trainable_parameters
        assert await split.score(PROBED) == await shared.score(PROBED)
    assert published.bytes < (await split.info(Empty())).parameters


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
async def test_weights_may_be_broadcast(
    lora: dict[str, int] | None, cluster: Cluster, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.policy.trainer_worker.BUCKET", 10_000)
    options = {"trainer": SHARED, "lora": lora}
    sampler = {"replicas": 2, "publication": "broadcast"}
    shared = await cluster.policy(a_policy(model_dirs["qwen2"], **options), name="shared")
    split = await cluster.policy(a_policy(model_dirs["qwen2"], sampler=sampler, **options), name="split")
    for step in range(3):
        under_way = [asyncio.ensure_future(sample(split)) for _ in range(4)]
        assert await update(split, step) == await update(shared, step)
        published = await split.publish(Empty())
        assert (published.version, published.gap < 1e-5) == (step + 1, True)
        assert published.bytes == 4 * (await split.info(Empty())).trainable_parameters
        assert await split.score(PROBED) == await shared.score(PROBED)
        for response in await asyncio.gather(*under_way):
            assert {int(v) for r in response.results for one in r.completions for v in one.versions.array} < {
                step,
                step + 1,
            }


async def test_a_broadcast_of_swapped_shards_is_caught(
    cluster: Cluster, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = {"replicas": 2, "publication": "broadcast"}
    policy = await cluster.policy(a_policy(model_dirs["qwen2"], trainer=SHARED, sampler=sampler))
    trainer = inner(cluster, "policy-trainer")._trainer
    whole = trainer.buckets
    monkeypatch.setattr(trainer, "buckets", lambda limit: (swapped(piece) for piece in whole(limit)))
    await update(policy)
    with pytest.raises(Corrupt, match="sampler 0 at version 1 differs from the trainer at version 1 by"):
        await policy.publish(Empty())


def test_a_broadcast_does_not_reach_what_is_spread() -> None:
    with pytest.raises(ValidationError, match=r"publication: broadcast does not reach .* tensor_parallel"):
        PolicyConfig.model_validate({"sampler": {"publication": "broadcast", "tensor_parallel": 2, "engine": "vllm"}})


def swapped(piece: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two shards of the same shape, each under the other's name."""
    one, other = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    return piece | {one: piece[other], other: piece[one]}


@pytest.fixture
def fault(two: tuple[PolicyService, PolicyService], cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Any:
    trainer = inner(cluster, "split-trainer")._trainer
    whole = trainer.buckets

    def inject(change: Any) -> None:
        monkeypatch.setattr(trainer, "buckets", lambda limit: (change(piece) for piece in whole(limit)))

    return inject


async def test_the_probe_catches_swapped_shards(two: tuple[PolicyService, PolicyService], fault: Any) -> None:
    fault(swapped)
    await update(two[1])
    with pytest.raises(Corrupt, match="sampler 0 at version 1 differs from the trainer at version 1 by"):
        await two[1].publish(Empty())


async def test_the_probe_catches_a_tensor_that_stayed_old(
    two: tuple[PolicyService, PolicyService], fault: Any
) -> None:
    old: dict[str, torch.Tensor] = {}

    def skip(piece: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "model.embed_tokens.weight"
        old.setdefault(name, piece[name].clone())
        return piece | old

    fault(skip)
    await update(two[1])
    await two[1].publish(Empty())
    await update(two[1])
    with pytest.raises(Corrupt, match="differs from the trainer"):
        await two[1].publish(Empty())


async def test_a_missing_tensor_is_named_and_the_old_weights_stay(
    two: tuple[PolicyService, PolicyService], fault: Any
) -> None:
    before = await sample(two[1])
    fault(lambda piece: {name: w for name, w in piece.items() if name != "model.norm.weight"})
    await update(two[1])
    with pytest.raises(Corrupt, match=r"model\.norm\.weight as nothing, the sampler has \(32,\) there; it keeps"):
        await two[1].publish(Empty())
    assert await sample(two[1]) == before


async def test_the_probe_catches_a_sampler_that_does_not_switch(
    two: tuple[PolicyService, PolicyService], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = cluster._started["split-sampler"][1]
    assert isinstance(lazy, InlineTransport)

    async def stay(*_: Any) -> None:
        pass

    monkeypatch.setattr(lazy.actor, "_switch", stay)
    await update(two[1])
    with pytest.raises(Corrupt, match="sampler 1 at version 0 differs from the trainer at version 1"):
        await two[1].publish(Empty())


async def test_bad_rows_are_refused_with_the_same_words(two: tuple[PolicyService, PolicyService]) -> None:
    row = TrainRow(row_id="r7", tokens=[5, 10**6], terms={"a": [0.0, 1.0]})
    for policy in two:
        with pytest.raises(BadInput, match=r"row 'r7': got token ids 5 to 1000000, expected 0 to \d+"):
            await policy.forward_backward(ForwardBackwardRequest(rows=[row], losses={"a": SFTLoss()}))


@pytest.mark.parametrize("engine", ["torch", pytest.param("deepspeed", marks=pytest.mark.slow)])
async def test_a_step_without_a_gradient_is_refused(
    engine: str, cluster: Cluster, model_dirs: dict[str, Path]
) -> None:
    policy = await cluster.policy(a_policy(model_dirs["qwen2"], trainer=SHARED | {"engine": engine}))
    for done in range(2):
        with pytest.raises(Stale, match="optim_step: no gradient was accumulated"):
            await policy.optim_step(OptimStepRequest())
        await update(policy)
        assert (await policy.publish(Empty())).version == done + 1


async def test_several_ranks_need_processes(cluster: Cluster, model_dirs: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=r"policy\.trainer\.workers: more than one rank needs transport=ray"):
        await cluster.policy(a_policy(model_dirs["qwen2"], trainer={"workers": 2}))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
async def test_an_adapter_is_saved_whole_from_shards(
    stage: int, cluster: Cluster, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    options = {"lora": {"rank": 2}}
    shared = await cluster.policy(a_policy(model_dirs["qwen2"], trainer=SHARED, **options), name="shared")
    sharded = SHARED | {"engine": "deepspeed", "zero_stage": stage}
    split = await cluster.policy(a_policy(model_dirs["qwen2"], trainer=sharded, **options), name="split")
    for name, policy in (("shared", shared), ("split", split)):
        await update(policy)
        await policy.save(CheckpointRequest(path=str(tmp_path / name)))
    expected = load_file(tmp_path / "shared" / "adapter_model.safetensors")
    found = load_file(tmp_path / "split" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("done", [0, 2])
async def test_a_new_engine_goes_on_from_a_checkpoint_even_of_the_start(
    stage: int, done: int, cluster: Cluster, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    config = a_policy(model_dirs["qwen2"], trainer=SHARED | {"engine": "deepspeed", "zero_stage": stage})
    one = await cluster.policy(config, name="one")
    for step in range(done):
        await update(one, step)
    await one.save(CheckpointRequest(path=str(tmp_path / "saved")))
    new = await cluster.policy(config, name="new")
    await new.load(CheckpointRequest(path=str(tmp_path / "saved")))
    for step in range(done, done + 3):
        assert await update(new, step) == pytest.approx(await update(one, step), abs=1e-6)
