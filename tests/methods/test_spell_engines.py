"""The same script on other engines: vLLM samplers, and a trainer whose optimiser is sharded over two processes."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster
from cluster.configure import configure
from methods import spell
from methods.worlds import corpus
from tests.cluster.local_ray import local_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.vllm]
ENGINES = (
    "transport=ray", "policy.sampler.engine=vllm", "policy.trainer.engine=deepspeed", "policy.trainer.workers=2",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    with local_ray(cpus=8) as ray:
        yield ray


async def rows(folder: Path, name: str, *words: str) -> list[dict[str, float]]:
    given = (
        f"documents={folder / 'texts'}", f"runs_dir={folder}", f"run={name}", "wandb=disabled", "steps=2",
        "questions_per_step=4", "generation_batch=8", "chunk=8", "test_questions=24", "audit.proposals=10",
        "audit.enforce=false", "policy.threads=1", "test_every=2",
    )  # fmt: skip
    config = configure(spell.Config, [*given, *words], None, spell.preset)
    async with Cluster(config, method="spell", run=name) as cluster:
        await spell.run(cluster, config)
        return cluster.metrics()


async def test_other_engines_play_the_same_game(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(12):
        text = "\n\n".join(corpus.documents(random.Random(i), 3, 30, heldout=True))
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    plain = await rows(tmp_path, "plain")
    engines = await rows(tmp_path, "engines", *ENGINES)
    assert [row["step"] for row in engines] == [0, 1, 2]
    # All samplers draw the same tokens for the same seed, so the same weights have the same marks.
    assert engines[0] == plain[0]
    for row in engines[1:]:
        assert row["rounds/good"] >= 1
        assert row["train/publish_gap"] < 1e-3
    assert engines[1]["train/loss"] == pytest.approx(plain[1]["train/loss"], abs=1e-3)
    assert engines[1]["train/grad_norm"] == pytest.approx(plain[1]["train/grad_norm"], rel=1e-2)
