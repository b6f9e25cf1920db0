"""A run over a policy that serves already: what it computes, and what it finds when it is continued."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.gateway.auth import new_token
from cluster.steps import LoopState
from methods.worlds.ledger import write_skeleton
from protocols.client import connect
from protocols.errors import BadInput, Corrupt, Unavailable
from protocols.losses import SFTLoss
from protocols.messages import Prompt, SamplingParams
from protocols.policy import PolicyConfig, PolicyService, SampleRequest
from protocols.service import Empty
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow


class Broken(Exception):
    pass


class Config(MethodConfig):
    policy: PolicyConfig


@pytest.fixture
def model(tmp_path: Path) -> str:
    write_skeleton(tmp_path / "model")
    return str(tmp_path / "model")


def a_policy(model: str, **options: Any) -> PolicyConfig:
    given = {"model": model, "init": "random", "threads": 1, "device": "cpu", "trainer": {"learning_rate": 1e-2}}
    return PolicyConfig.model_validate(given | options)


@asynccontextmanager
async def serving(folder: Path, config: PolicyConfig, **gateway: Any) -> AsyncIterator[str]:
    """A policy behind a gateway; its address."""
    given = {"runs_dir": str(folder), "gateway": {"address": "127.0.0.1:0"} | gateway}
    async with Cluster(MethodConfig.model_validate(given), method="serve", run="serve") as cluster:
        assert cluster._gateway is not None
        cluster._gateway.admission.checkpoints = cluster.directory.path / "remote"
        await cluster.policy(config)
        yield cluster._gateway.address


async def update(policy: PolicyService, seed: int) -> float:
    tokens = np.random.default_rng(seed).integers(1, 100, 12)
    row = TrainRow(row_id="a", tokens=tokens, terms={"sft": np.r_[0.0, np.ones(11)]})
    loss = (await policy.forward_backward(ForwardBackwardRequest(rows=[row], losses={"sft": SFTLoss()}))).loss
    await policy.optim_step(OptimStepRequest())
    return loss


async def learn(
    folder: Path, config: PolicyConfig, steps: int, *, breaks_at: int = 0, **options: int
) -> list[dict[str, float]]:
    given = Config.model_validate(
        {"runs_dir": str(folder), "run": "learn", "steps": steps, "checkpoint_every": 1, "policy": config} | options
    )
    async with Cluster(given, method="test", run="learn") as cluster:
        policy = await cluster.policy(config)
        async for step in cluster.steps(LoopState()):
            loss = await update(policy, step.index)
            if step.index == breaks_at:
                raise Broken
            version = (await policy.publish(Empty())).version
            prompt = Prompt(tokens=[3, 4], seed=step.index)
            response = await policy.sample(SampleRequest(prompts=[prompt], params=SamplingParams(max_tokens=6)))
            drawn = sum(response.results[0].completions[0].tokens.tolist())
            step.log({"loss": loss, "version": version, "drawn": drawn})
        return cluster.metrics()


async def test_a_remote_policy_learns_as_one_of_the_runs_own(tmp_path: Path, model: str) -> None:
    alone = await learn(tmp_path / "alone", a_policy(model), 6)
    async with serving(tmp_path / "served", a_policy(model)) as address:
        remote = a_policy(model, at={"address": address})
        assert await learn(tmp_path / "over", remote, 2) == alone[:2]
        # Whatever happens to it meanwhile, the run goes on with what it committed.
        policy = connect(address, PolicyService)
        await update(policy, 77)
        assert await learn(tmp_path / "over", remote, 6) == alone
        # It outlives the run.
        assert (await policy.info(Empty())).version == 6
    (places,) = (tmp_path / "served" / "serve" / "remote" / "learn").glob("*/policy")
    assert sorted(folder.name for folder in places.iterdir()) == ["0", "1", "2"]
    checkpoint = tmp_path / "over" / "learn" / "checkpoints" / "step-000006" / "policy"
    assert [file.name for file in checkpoint.iterdir()] == ["remote.txt"]


async def test_a_run_that_broke_before_its_first_commit_begins_as_it_began(tmp_path: Path, model: str) -> None:
    alone = await learn(tmp_path / "alone", a_policy(model), 4)
    async with serving(tmp_path / "served", a_policy(model)) as address:
        remote = a_policy(model, at={"address": address})
        with pytest.raises(Broken):
            await learn(tmp_path / "over", remote, 4, breaks_at=3, checkpoint_every=10)
        assert await learn(tmp_path / "over", remote, 4, checkpoint_every=10) == alone


async def test_runs_of_one_name_do_not_share_places(tmp_path: Path, model: str) -> None:
    alone = await learn(tmp_path / "alone", a_policy(model), 4)
    async with serving(tmp_path / "served", a_policy(model)) as address:
        remote = a_policy(model, at={"address": address})
        await learn(tmp_path / "a", remote, 2)
        await learn(tmp_path / "b", remote, 3)
        assert await learn(tmp_path / "a", remote, 4, keep_checkpoints=5) == alone
    places = (tmp_path / "served" / "serve" / "remote" / "learn").iterdir()
    assert len(list(places)) == 2
    notes = (tmp_path / "a" / "learn" / "checkpoints").glob("step-*/policy/remote.txt")
    named = [note.read_text() for note in notes]
    assert len(named) == len(set(named)) > 3


async def test_a_checkpoint_that_is_gone_at_the_gateway(tmp_path: Path, model: str) -> None:
    async with serving(tmp_path / "served", a_policy(model)) as address:
        await learn(tmp_path / "over", a_policy(model, at={"address": address}), 1)
    async with serving(tmp_path / "other", a_policy(model)) as address:
        with pytest.raises(Corrupt, match=r"learn/\w+/policy/1"):
            await learn(tmp_path / "over", a_policy(model, at={"address": address}), 2)


async def test_a_run_does_not_move_between_its_own_and_a_remote_policy(tmp_path: Path, model: str) -> None:
    await learn(tmp_path / "over", a_policy(model), 1)
    async with serving(tmp_path / "served", a_policy(model)) as address:
        with pytest.raises(BadInput, match=r"was made with policy\.at\.actor=None, now it is ''"):
            await learn(tmp_path / "over", a_policy(model, at={"address": address}), 2)


@pytest.mark.parametrize(
    ("served", "asked", "error", "message"),
    [
        ({}, {"model": "embedded"}, BadInput, r"policy\.model: got 'embedded', but the policy at grpc://.* is of '/"),
        ({"trainer": None}, {}, BadInput, r"policy\.trainer: the policy at grpc://.* is frozen"),
    ],
)
async def test_policies_that_do_not_fit(
    served: dict[str, Any], asked: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, model: str
) -> None:
    async with serving(tmp_path / "served", a_policy(model, **served)) as address:
        with pytest.raises(error, match=message):
            await learn(tmp_path / "over", a_policy(**{"model": model, "at": {"address": address}} | asked), 1)
    assert not (tmp_path / "over").exists()


async def test_nobody_at_the_address(tmp_path: Path, model: str) -> None:
    with pytest.raises(Unavailable, match=r"policy\.at\.address: no policy answers at grpc://127\.0\.0\.1:1: "):
        await learn(tmp_path / "over", a_policy(model, at={"address": "grpc://127.0.0.1:1"}), 1)
    with pytest.raises(BadInput, match="address: got 'there'"):
        await learn(tmp_path / "over", a_policy(model, at={"address": "there"}), 1)


async def test_a_token_comes_from_a_file(tmp_path: Path, model: str) -> None:
    token, entry = new_token("run", ["infer", "train"])
    (tmp_path / "tokens.yaml").write_text(entry)
    (tmp_path / "token").write_text(token + "\n")
    async with serving(tmp_path / "served", a_policy(model), tokens=str(tmp_path / "tokens.yaml")) as address:
        at = {"address": address, "token_file": str(tmp_path / "token")}
        assert len(await learn(tmp_path / "over", a_policy(model, at=at), 1)) == 1
        with pytest.raises(BadInput, match=r"policy\.at\.token_file: .*nowhere"):
            await learn(tmp_path / "x", a_policy(model, at=at | {"token_file": str(tmp_path / "nowhere")}), 1)
    saved = (tmp_path / "over" / "learn").rglob("*")
    assert not any(token.encode() in file.read_bytes() for file in saved if file.is_file())
