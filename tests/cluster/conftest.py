"""A small model, and clusters in this process and on Ray, for tests of ranks that train together."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from methods.worlds.ledger import write_skeleton
from tests.cluster.local_ray import local_ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    write_skeleton(directory)
    return str(directory)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for all tests of this file; its processes outnumber the cores of a small machine."""
    with local_ray(cpus=8) as ray:
        yield ray


def a_cluster(folder: Path, transport: str) -> Cluster:
    config = MethodConfig.model_validate({"runs_dir": str(folder), "transport": transport, "deadline_s": 300})
    return Cluster(config, method="test", run=f"group-{transport}")


@pytest.fixture
async def inline(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with a_cluster(tmp_path, "inline") as cluster:
        yield cluster


@pytest.fixture
async def on_ray(ray: Any, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with a_cluster(tmp_path, "ray") as cluster:
        yield cluster
