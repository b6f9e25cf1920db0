"""Services query the policy of a run while it learns."""

import asyncio
import json
from pathlib import Path

import pytest

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.configure import configure
from methods import spell
from methods.worlds.ledger_base import ledger_base
from protocols.client import connect
from protocols.messages import Prompt, SamplingParams
from protocols.policy import PolicyService, SampleRequest
from tests.methods.test_spell_run import SMALL

CLIENTS = 8


async def play(folder: Path, name: str, *words: str) -> tuple[list[dict[str, float]], list[list[int]]]:
    """A run's metrics, and the weight versions that each client met, in order."""
    config = configure(spell.Config, (*SMALL, f"runs_dir={folder}", f"run={name}", *words), None, spell.preset)
    async with Cluster(config, method="spell", run=name) as cluster:
        learning = asyncio.ensure_future(spell.run(cluster, config))
        clients = []
        if cluster._gateway is not None:
            while "policy" not in cluster._handles and not learning.done():
                await asyncio.sleep(0.01)
            policy = connect(cluster._gateway.address, PolicyService)
            clients = [asyncio.ensure_future(query(policy, i, learning)) for i in range(CLIENTS)]
        await learning
        versions = await asyncio.gather(*clients)
        return cluster.metrics(), versions


async def query(policy: PolicyService, client: int, learning: "asyncio.Future[None]") -> list[int]:
    versions, asked = [], 0
    while not learning.done():
        asked += 1
        prompt = Prompt(tokens=[5 + client, 6, 7], seed=asked)
        request = SampleRequest(prompts=[prompt], params=SamplingParams(max_tokens=4))
        (result,) = (await policy.sample(request)).results
        versions += result.completions[0].versions.tolist()
    return versions


@pytest.mark.slow
async def test_eight_clients_during_a_run_change_nothing_in_it(tmp_path: Path) -> None:
    alone, _ = await play(tmp_path, "alone")
    served, versions = await play(tmp_path, "served", "gateway.address=127.0.0.1:0")
    assert json.dumps(served) == json.dumps(alone)
    assert len(versions) == CLIENTS
    for met in versions:
        assert len(met) > 20
        assert met == sorted(met)
        assert met[0] == 0 and met[-1] >= 2
    log = (tmp_path / "served" / "gateway.log").read_text()
    assert log.count("method=PolicyService.sample code=OK") >= CLIENTS
    assert log.count("\n") == log.count("code=OK")


@pytest.mark.slow
async def test_a_policy_that_serves_already_gives_the_same_run(tmp_path: Path) -> None:
    alone, _ = await play(tmp_path, "alone")
    config = configure(spell.Config, (*SMALL, f"runs_dir={tmp_path}"), None, spell.preset)
    given = {"runs_dir": str(tmp_path), "gateway": {"address": "127.0.0.1:0"}}
    async with Cluster(MethodConfig.model_validate(given), method="serve", run="serve") as cluster:
        base = await ledger_base(cluster, config.ledger, config.policy, config.seed)
        await cluster.policy(config.policy.model_copy(update={"model": base}))
        gateway = cluster._gateway
        assert gateway is not None
        gateway.admission.checkpoints = cluster.directory.path / "remote"
        over, _ = await play(tmp_path, "over", f"policy.at.address={gateway.address}")
    # A message's maps have no order of their own.
    assert json.dumps(over, sort_keys=True) == json.dumps(alone, sort_keys=True)
