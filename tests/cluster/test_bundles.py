"""Processes of a policy that are set aside together on Ray."""

from pathlib import Path
from typing import Any

import pytest

from cluster.bundles import bundles_for
from cluster.cluster import Cluster
from cluster.config import MethodConfig
from methods.worlds.ledger import write_skeleton
from protocols.errors import DeadlineExceeded
from protocols.placement import Resources
from protocols.policy import PolicyConfig
from protocols.service import Empty
from tests.cluster.local_ray import local_ray


@pytest.mark.parametrize(
    ("sampler", "rank", "ranks", "bundles", "places"),
    [
        ((1, 0, 2), (1, 0), 1, [(1, 0), (1, 0), (1, 0)], [0, 1, 2]),
        ((2, 1, 1), (2, 1), 2, [(2, 1), (2, 1), (2, 1)], [0, 1, 2]),
        ((1, 0.5, 2), (1, 0.5), 2, [(2, 1), (2, 1)], [0, 1, 0, 1]),
        ((1, 0.5, 1), (1, 0.5), 3, [(2, 1), (1, 0.5), (1, 0.5)], [0, 0, 1, 2]),
        ((1, 0.3, 2), (2, 0.3), 1, [(3, 0.6), (1, 0.3)], [0, 1, 0]),
        # Too much for one GPU.
        ((1, 0.7, 1), (1, 0.7), 1, [(1, 0.7), (1, 0.7)], [0, 1]),
        ((1, 1, 1), (1, 0.5), 1, [(1, 1), (1, 0.5)], [0, 1]),
    ],
)
def test_what_fits_one_gpu_shares_it(
    sampler: tuple[float, float, int],
    rank: tuple[float, float],
    ranks: int,
    bundles: list[tuple[float, float]],
    places: list[int],
) -> None:
    one = Resources(cpus=sampler[0], gpus=sampler[1], replicas=sampler[2])
    found, where = bundles_for(one, Resources(cpus=rank[0], gpus=rank[1]), ranks)
    assert [(bundle.cpus, bundle.gpus) for bundle in found] == bundles
    assert where == places


@pytest.mark.ray
@pytest.mark.slow
async def test_sampler_and_rank_share_a_gpu_and_a_policy_without_room_takes_nothing(tmp_path: Path) -> None:
    """Ray is told of GPUs that are not there; it counts them all the same."""
    write_skeleton(tmp_path / "model")
    given = {
        **{"model": str(tmp_path / "model"), "init": "random", "device": "cpu", "threads": 1},
        **{"trainer": {"workers": 2}, "sampler": {"replicas": 2}, "resources": {"cpus": 0.5, "gpus": 0.5}},
    }
    config = PolicyConfig.model_validate(given)

    def run(name: str, deadline_s: float) -> Cluster:
        options = {"runs_dir": str(tmp_path / "runs"), "transport": "ray", "deadline_s": deadline_s}
        return Cluster(MethodConfig.model_validate(options), method="test", run=name)

    with local_ray(cpus=4, gpus=3) as ray:

        def gpu_of(actor: str) -> Any:
            host = ray.get_actor(actor, "first")
            return ray.get(host.__ray_call__.remote(lambda _: ray.get_gpu_ids()))

        async with run("first", 300) as cluster:
            policy = await cluster.policy(config)
            pairs = [[gpu_of(f"policy-{kind}-{i}") for kind in ("sampler", "trainer")] for i in range(2)]
            assert [one == other and len(one) == 1 for one, other in pairs] == [True, True]
            assert pairs[0] != pairs[1]
            assert (await policy.publish(Empty())).version == 0
            # One GPU is free, and this policy wants two.
            async with run("second", 2) as other:
                with pytest.raises(DeadlineExceeded, match="no room for the processes of 'policy' within 2 s"):
                    await other.policy(config)
            assert ray.available_resources()["GPU"] == 1
        async with run("second", 300) as other:
            await other.policy(config)
