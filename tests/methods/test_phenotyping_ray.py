"""Phenotyping on Ray: notes are read by Ray Data beside retrievers in processes of their own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster
from cluster.configure import configure
from cluster.parts import each
from methods import phenotyping
from methods.phenotyping_parts import Part
from methods.worlds import wards
from protocols.errors import BadInput
from tests.cluster.local_ray import local_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SMALL = [
    "world=wards", "wandb=disabled", "wards.patients=60", "wards.lessons=200", "part_bytes=20000", "steps=3",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    with local_ray(cpus=8) as ray:
        yield ray


async def played(folder: Path, name: str, *words: str) -> tuple[str, list[dict[str, float]]]:
    config = configure(phenotyping.Config, [*SMALL, f"runs_dir={folder}", *words], None, phenotyping.preset)
    async with Cluster(config, method="phenotyping", run=name) as cluster:
        await phenotyping.run(cluster, config)
        told = (cluster.directory.path / "decisions.jsonl").read_text()
        return told.replace(f'"run":"{name}"', ""), cluster.metrics()


async def test_the_same_decisions_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wards, "STEPS", 30)
    here = await played(tmp_path, "here")
    there = await played(tmp_path, "there", "transport=ray", "parallel=2", "retriever.resources.replicas=2")
    assert len(list((tmp_path / "there" / "scan").glob("part-*.counts.json"))) > 3
    assert there == here


async def refuses(part: Part) -> Part:
    if part.index == 2:
        raise BadInput("part 2: no such thing")
    return part


async def test_what_a_part_raises_is_raised_here(ray: Any) -> None:
    parts = [Part(index=i, file=json.dumps(i), format="rows") for i in range(4)]
    with pytest.raises(BadInput, match="part 2: no such thing"):
        async for _ in each(refuses, parts, transport="ray", at_once=2):
            pass
    done = [one.index async for one in each(refuses, parts[:2], transport="ray", at_once=2)]
    assert sorted(done) == [0, 1]
