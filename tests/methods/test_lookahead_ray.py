"""Lookahead routing on Ray actors: the numbers of a run in one process, and service when a model of the pool dies."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from cluster import serve
from cluster.cluster import Cluster
from cluster.configure import configure
from methods import lookahead
from methods.worlds.tiny import write_tiny
from protocols.messages import Prompt
from protocols.router import RouterConfig, RouteRow, RouteTrainRequest
from tests.cluster.local_ray import local_ray
from tests.methods.test_lookahead_run import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    with local_ray(cpus=8) as ray:
        yield ray


async def rows(folder: Path, name: str, *words: str) -> list[dict[str, float]]:
    config = configure(lookahead.Config, [*SMALL, f"runs_dir={folder}", *words], None, lookahead.preset)
    async with Cluster(config, method="lookahead", run=name) as cluster:
        await lookahead.run(cluster, config)
        return cluster.metrics()


async def test_the_same_numbers_on_ray(tmp_path: Path) -> None:
    assert await rows(tmp_path, "there", "transport=ray") == await rows(tmp_path, "here")


async def test_a_model_that_dies_is_passed_over(tmp_path: Path, ray: Any) -> None:
    write_tiny(tmp_path / "tiny", ["one", "two"], width=16, masked=False, spread=0.1)
    member = {"model": str(tmp_path / "tiny"), "init": "random", "threads": 1}
    config = serve.Config.model_validate(
        {
            "runs_dir": str(tmp_path),
            "transport": "ray",
            "policy": member | {"trainer": None},
            "pool": {"first": member, "second": member},
            "gateway": {"address": "127.0.0.1:0", "http": "127.0.0.1:0"},
        }
    )
    async with Cluster(config, method="serve", run="serve") as cluster:
        for name, policy in config.pool.items():
            await cluster.policy(policy, name=name)
        pool = [{"name": name} for name in config.pool]
        router = await cluster.router(RouterConfig.model_validate({"kind": "best", "candidates": pool}))
        row = RouteRow(uid="r", prompt=Prompt(text="one"), scores=[1.0, 0.0])
        await router.train(RouteTrainRequest(rows=[row]))
        assert cluster._gateway is not None
        async with AsyncOpenAI(api_key="none", base_url=cluster._gateway.base_url, max_retries=0) as client:
            first = await asked(client)
            assert (first["model"], first["down"]) == ("first", [])
            host = ray.get_actor("first", "serve")
            os.kill(ray.get(host.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
            second = await asked(client)
            assert (second["model"], second["down"]) == ("second", ["first"])


async def asked(client: AsyncOpenAI) -> dict[str, Any]:
    messages: list[Any] = [{"role": "user", "content": "one"}]
    create = client.chat.completions.with_raw_response.create
    answer = await create(model="auto", messages=messages, max_tokens=3)
    route: dict[str, Any] = json.loads(answer.headers["x-repertory-route"])
    assert answer.parse().model == route["model"]
    return route
