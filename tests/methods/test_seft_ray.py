"""SEFT on Ray actors: the numbers of a run in one process, also with samplers and trainer apart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster
from cluster.configure import configure
from methods import seft
from methods.worlds import sorting
from tests.cluster.local_ray import local_ray
from tests.methods.test_seft_run import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow]
APART = ["policy.sampler.replicas=2", "policy.resources.cpus=0.4"]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    with local_ray(cpus=8) as ray:
        yield ray


async def rows(folder: Path, name: str, *words: str) -> list[dict[str, float]]:
    config = configure(seft.Config, [*SMALL, f"runs_dir={folder}", *words], None, seft.preset)
    async with Cluster(config, method="seft", run=name) as cluster:
        await seft.run(cluster, config)
        return cluster.metrics()


async def test_the_same_numbers_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "STEPS", 30)
    here = await rows(tmp_path, "here")
    there = await rows(tmp_path, "there", "transport=ray", *APART)
    assert len(here) == len(there) == 7
    for one, other in zip(here, there, strict=True):
        # What could not be measured is null.
        assert {name for name, value in one.items() if value is None} == {n for n, v in other.items() if v is None}
        known = {name: value for name, value in one.items() if value is not None}
        assert {name: other[name] for name in other if other[name] is not None} == pytest.approx(known, rel=1e-4)
