"""vLLM samplers in processes of their own: one that dies costs nobody an answer."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from protocols.errors import Unavailable
from protocols.messages import Prompt, SamplingParams
from protocols.policy import PolicyConfig, SampleRequest, SampleResponse, ScoreRequest
from protocols.service import Empty
from tests.cluster.local_ray import local_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    with local_ray(cpus=8) as ray:
        yield ray


async def test_a_sampler_that_dies_amid_requests_costs_no_answer(ray: Any, tmp_path: Path) -> None:
    given = MethodConfig.model_validate({"runs_dir": str(tmp_path), "transport": "ray", "deadline_s": 300})
    config = PolicyConfig.model_validate({"threads": 1, "sampler": {"engine": "vllm", "replicas": 2}})
    prompts = [Prompt(text=f"{i} and {i + 1} are", seed=i) for i in range(4)]
    request = SampleRequest(prompts=prompts, n=2, params=SamplingParams(max_tokens=300))
    async with Cluster(given, method="test", run="vllm-ray") as cluster:
        policy = await cluster.policy(config)
        expected = await policy.sample(request)
        assert (await policy.publish(Empty())).version == 0

        host = ray.get_actor("policy-sampler-1", "vllm-ray")
        pid = ray.get(host.__ray_call__.remote(lambda _: os.getpid()))
        under_way = [asyncio.ensure_future(policy.sample(request)) for _ in range(6)]
        # Killed while it decodes what three of the calls asked of it.
        while ray.get(host.__ray_call__.remote(lambda one: len(one._actor._engine._tickets))) < 24:
            await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        for response in await asyncio.gather(*under_way):
            assert tokens(response) == tokens(expected)
        # New weights would reach one of them alone.
        with pytest.raises(Unavailable, match="the actor 'policy-sampler-1' has died"):
            await policy.publish(Empty())
        assert (await policy.score(ScoreRequest(sequences=[[5, 6, 7]]))).version == 0


def tokens(response: SampleResponse) -> list[list[int]]:
    return [one.tokens.tolist() for result in response.results for one in result.completions]
