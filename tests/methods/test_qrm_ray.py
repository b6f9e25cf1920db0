"""Q-RM on Ray actors, its reward model over two ranks: the numbers of a run in one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster
from cluster.configure import configure
from methods import qrm
from tests.cluster.local_ray import local_ray
from tests.methods.test_qrm_run import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RANKS = ("transport=ray", "reward.trainer.engine=deepspeed", "reward.trainer.workers=2")


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    with local_ray(cpus=8) as ray:
        yield ray


async def rows(folder: Path, name: str, *words: str) -> list[dict[str, float]]:
    config = configure(qrm.Config, [*SMALL, f"runs_dir={folder}", f"run={name}", *words], None, qrm.preset)
    async with Cluster(config, method="qrm", run=name) as cluster:
        await qrm.run(cluster, config)
        return cluster.metrics()


async def test_the_same_numbers_on_ray_and_ranks(tmp_path: Path) -> None:
    here, there = await rows(tmp_path, "here"), await rows(tmp_path, "ranks", *RANKS)
    assert len(there) == len(here) > 6
    for one, other in zip(here, there, strict=True):
        # Ranks add up in another order.
        assert other == pytest.approx(one, rel=1e-4)
