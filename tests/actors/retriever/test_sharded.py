"""Documents spread over several actors give what one index gives."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.steps import LoopState
from protocols.errors import BadInput, Corrupt
from protocols.retriever import (
    Document,
    IndexRequest,
    Pattern,
    PatternSet,
    RetrieverConfig,
    RetrieverService,
    SearchRequest,
    SnippetsRequest,
)
from protocols.service import CheckpointRequest, Empty
from tests.actors.retriever.conftest import hits, ids
from tests.cluster.local_ray import local_ray

TOPICS = ("asthma", "fracture", "fever", "pasta", "football", "violin", "tax", "rain")
NOTES = [
    Document(id=f"{topic}-{i}", text=f"{'About ' * i}{topic} again: {topic}", metadata={"topic": topic})
    for topic in TOPICS
    for i in range(3)
]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(MethodConfig(runs_dir=str(tmp_path / "runs")), method="test", run="one") as opened:
        yield opened


async def begun(cluster: Cluster, name: str, **given: Any) -> RetrieverService:
    config = RetrieverConfig.model_validate({"threads": 1, "device": "cpu", **given})
    return await cluster.retriever(config, name=name)


async def test_shards_give_what_one_index_gives(cluster: Cluster) -> None:
    one = await begun(cluster, "one", kind="hybrid")
    several = await begun(cluster, "several", kind="hybrid", shards=3)
    for retriever in (one, several):
        told = await retriever.index(IndexRequest(documents=NOTES))
        assert (told.added, told.documents) == (24, 24)
        told = await retriever.index(IndexRequest(documents=NOTES[:2], remove=["rain-0", "nobody"]))
        assert (told.added, told.replaced, told.removed, told.documents) == (0, 2, 1, 23)
    assert (await several.info(Empty())).model_dump() == (await one.info(Empty())).model_dump() | {"shards": 3}
    parts = [await cluster._handles[f"several-shard-{i}"].info(Empty()) for i in range(3)]  # type: ignore[attr-defined]
    assert min(part.documents for part in parts) > 0
    for query in ("lung disease", "music", "asthma or a fracture"):
        near, expected = [await hits(each, query, k=5, kind="dense") for each in (several, one)]
        assert [hit.id for hit in near] == [hit.id for hit in expected]
        assert [hit.score for hit in near] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    assert set(await ids(several, "asthma", k=3, kind="bm25")) == set(await ids(one, "asthma", k=3, kind="bm25"))
    fused = await hits(several, "asthma", k=3)
    assert {hit.id for hit in fused} == {"asthma-0", "asthma-1", "asthma-2"}
    # Places among all documents, not among those of a shard.
    assert sorted(hit.ranks["dense"] for hit in fused) == [1, 2, 3]
    request = SearchRequest.model_validate({"queries": ["rain", "tax"], "k": 2, "where": {"topic": ["tax"]}})
    found = (await several.search(request)).results
    assert [{hit.metadata["topic"] for hit in result.hits} for result in found] == [{"tax"}, {"tax"}]


async def test_any_shard_cuts_snippets(cluster: Cluster) -> None:
    retriever = await begun(cluster, "several", shards=2)
    sets = [PatternSet(id="s", include=[Pattern(expression="tax")])]
    told = await retriever.snippets(SnippetsRequest(documents=NOTES, sets=sets))
    assert [snippet.document for snippet in told.snippets] == ["tax-0", "tax-1", "tax-2"]
    with pytest.raises(BadInput, match="documents: got the id 'tax-0' 2 times"):
        await retriever.index(IndexRequest(documents=[NOTES[18], NOTES[18]]))
    with pytest.raises(BadInput, match="kind: got 'dense', expected 'bm25'"):
        await ids(retriever, "tax", kind="dense")


async def test_shards_are_saved_and_found_again(cluster: Cluster, tmp_path: Path) -> None:
    path, saved = str(tmp_path / "index"), CheckpointRequest(path=str(tmp_path / "saved"))
    first = await begun(cluster, "first", shards=2, path=path)
    await first.index(IndexRequest(documents=NOTES))
    expected = await hits(first, "tax")
    assert len(expected) == 3
    files = (await first.save(saved)).files
    assert "shards.json" in files
    for name in ("first", "first-shard-0", "first-shard-1"):
        await cluster.stop(name)
    again = await begun(cluster, "again", shards=2, path=path)
    assert await hits(again, "tax") == expected
    other = await begun(cluster, "other", shards=2)
    assert (await other.load(saved)).files == files
    assert await hits(other, "tax") == expected
    with pytest.raises(BadInput, match="shards: got 3, expected 2, as the index in"):
        await begun(cluster, "three", shards=3, path=path)
    with pytest.raises(BadInput, match=r"path: got .* which holds something else"):
        await begun(cluster, "single", path=path)
    with pytest.raises(Corrupt, match="is not a saved retriever of several shards"):
        await other.load(CheckpointRequest(path=str(tmp_path)))


async def test_only_an_index_without_a_folder_is_committed(cluster: Cluster, tmp_path: Path) -> None:
    await begun(cluster, "words")
    await begun(cluster, "spread", shards=2)
    await begun(cluster, "patterns", kind="pattern")
    await begun(cluster, "kept", path=str(tmp_path / "index"))
    assert set(cluster._committed) == {"words", "spread"}


class Loop(LoopState):
    pass


@pytest.mark.parametrize("shards", [1, 2])
async def test_a_run_that_goes_on_has_its_index_as_it_was_committed(tmp_path: Path, shards: int) -> None:
    async def run(last: int) -> list[str]:
        config = MethodConfig(runs_dir=str(tmp_path), steps=last, wandb="disabled")
        async with Cluster(config, method="test", run="grows") as cluster:
            retriever = await begun(cluster, "retriever", shards=shards)
            async for step in cluster.steps(Loop()):
                await retriever.index(IndexRequest(documents=[Document(id=str(step.index), text="tax")]))
            return await ids(retriever, "tax")

    assert sorted(await run(2)) == ["1", "2"]
    assert sorted(await run(3)) == ["1", "2", "3"]


@pytest.mark.ray
async def test_shards_are_processes_on_ray(tmp_path: Path) -> None:
    config = MethodConfig(transport="ray", runs_dir=str(tmp_path), wandb="disabled")
    with local_ray(cpus=3):
        async with Cluster(config, method="test", run="shards") as cluster:
            retriever = await begun(cluster, "retriever", shards=2)
            await retriever.index(IndexRequest(documents=NOTES))
            assert set(await ids(retriever, "tax", k=3)) == {"tax-0", "tax-1", "tax-2"}
            sets = [PatternSet(id="s", include=[Pattern(expression="(")])]
            with pytest.raises(BadInput, match=r"sets: 's': include.0: got '\('"):
                await retriever.snippets(SnippetsRequest(sets=sets))
