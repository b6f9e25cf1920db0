"""Meaning: embeddings, the vectors' file, and both rankings fused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.retriever import dense
from actors.retriever.dense import Encoder, Vectors, batches
from actors.retriever.fusion import best, fused, with_equals
from protocols.errors import BadInput, Internal
from protocols.retriever import Document, Hit, IndexRequest, RetrieverConfig
from protocols.service import CheckpointRequest, Empty
from tests.actors.retriever.conftest import Starter, documents, hits, ids

GIVEN: dict[str, Any] = {"kind": "dense", "threads": 1, "device": "cpu"}
NOTES = documents(
    lungs="The patient is short of breath and wheezes.",
    heart="Atrial fibrillation was seen on the electrocardiogram.",
    knee="She twisted her leg while playing football.",
    meal="Boil the pasta for ten minutes and add salt.",
)


async def test_meaning_is_found_without_a_common_word(started: Starter) -> None:
    retriever = await started(**GIVEN)
    await retriever.index(IndexRequest(documents=NOTES))
    found = await hits(retriever, "breathing difficulties")
    assert found[0].id == "lungs"
    assert len(found) == 4
    assert all(-1 <= hit.score <= 1 + 1e-6 for hit in found)
    assert await ids(retriever, "arrhythmia", k=1) == ["heart"]
    assert await ids(retriever, "recipe", k=1) == ["meal"]
    (same,) = await hits(retriever, NOTES[2].text, k=1)
    assert same.score == pytest.approx(1, abs=1e-5)
    info = await retriever.info(Empty())
    assert (info.encoder, info.dimensions, info.documents) == ("minilm", 384, 4)
    with pytest.raises(BadInput, match="kind: got 'bm25', expected 'dense'"):
        await ids(retriever, "x", kind="bm25")


def test_a_vector_does_not_depend_on_the_rest_of_its_batch() -> None:
    encoder = Encoder(RetrieverConfig.model_validate(GIVEN))
    texts = [*(note.text for note in NOTES), "", "x " * 1000]
    together = encoder.embed(texts)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(together, np.concatenate([encoder.embed([text]) for text in texts]), atol=1e-5)
    # What is behind the last token that is read has no bearing.
    np.testing.assert_array_equal(encoder.embed(["x " * 1000]), encoder.embed(["x " * 2000]))


def test_texts_of_like_length_are_computed_together() -> None:
    assert batches([3, 9, 4, 9, 2], most=18) == [[1, 3], [2, 0, 4]]
    assert batches([50, 1], most=18) == [[0], [1]]
    assert batches([]) == []


async def test_changes_and_conditions(started: Starter) -> None:
    retriever = await started(**GIVEN)
    await retriever.index(IndexRequest(documents=NOTES))
    pasta = Document(id="knee", text="Cook spaghetti in hot water.", metadata={"kind": "recipe"})
    await retriever.index(IndexRequest(documents=[pasta], remove=["meal"]))
    assert (await ids(retriever, "pasta"))[0] == "knee"
    assert set(await ids(retriever, "pasta")) == {"lungs", "heart", "knee"}
    whole, narrowed = await hits(retriever, "breath"), await hits(retriever, "breath", where={"kind": ["recipe"]})
    assert [hit.id for hit in narrowed] == ["knee"]
    assert narrowed[0] in whole
    assert await ids(retriever, "breath", where={"kind": ["x"]}) == []


async def test_the_vectors_are_made_whole_from_the_documents(
    started: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = GIVEN | {"path": str(tmp_path)}
    first = await started(**given)
    await first.index(IndexRequest(documents=NOTES[:2]))

    def killed(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        # Between the two writes: documents are committed, their vectors are not.
        patch.setattr(Vectors, "change", killed)
        with pytest.raises(Internal, match="killed"):
            await first.index(IndexRequest(documents=NOTES[2:], remove=["heart"]))
    expected = ["lungs", "knee", "meal"]
    second = await started(**given)
    assert sorted(await ids(second, "breath")) == sorted(expected)
    assert await ids(second, "breath", k=1) == ["lungs"]
    assert await hits(first, "breath") == await hits(second, "breath")
    (tmp_path / "vectors.usearch").unlink()
    assert await hits(await started(**given), "breath") == await hits(first, "breath")
    (tmp_path / "vectors.usearch").write_bytes(b"damaged")
    assert await hits(await started(**given), "breath") == await hits(first, "breath")


async def test_a_folder_is_opened_by_memory_map_and_changed(started: Starter, tmp_path: Path) -> None:
    given = GIVEN | {"path": str(tmp_path / "index")}
    first = await started(**given)
    await first.index(IndexRequest(documents=NOTES))
    expected = await hits(first, "breath")
    await first.save(CheckpointRequest(path=str(tmp_path / "saved")))
    second = await started(**given)
    assert await hits(second, "breath") == expected
    await second.index(IndexRequest(remove=["lungs"]))
    assert await ids(second, "breath") == [hit.id for hit in expected if hit.id != "lungs"]
    await second.load(CheckpointRequest(path=str(tmp_path / "saved")))
    assert await hits(second, "breath") == expected


async def test_another_encoder_is_refused(started: Starter, tmp_path: Path) -> None:
    await started(**GIVEN, path=str(tmp_path))
    with pytest.raises(BadInput, match=r"kind: got 'hybrid', expected 'dense', as the index in"):
        await started(**GIVEN | {"path": str(tmp_path), "kind": "hybrid"})
    with pytest.raises(BadInput, match=r"encoder: .*'nowhere/at/all'"):
        await started(**GIVEN | {"encoder": "nowhere/at/all"})


def test_the_graph_of_many_finds_what_comparing_all_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = Vectors(tmp_path / "x", 16)
    assert index.nearest(vectors[0], 3) == []
    index.change(np.array([], np.uint64), np.arange(500, dtype=np.uint64), vectors)
    index.save()
    exact = index.nearest(vectors[7], 10)
    order = np.argsort(-(vectors @ vectors[7]), kind="stable")[:10]
    assert [key for _, key in exact] == order.tolist()
    monkeypatch.setattr(dense, "EXACT", 0)
    assert Vectors(tmp_path / "x", 16).nearest(vectors[7], 10) == exact


def a_hit(name: str, score: float = 0.0) -> Hit:
    return Hit(id=name, text="", score=score)


def test_ranks_are_fused() -> None:
    rankings = {"bm25": [a_hit(name) for name in "abc"], "dense": [a_hit(name) for name in "cda"]}
    told = fused(rankings, 60, 3)
    assert [(hit.id, hit.ranks) for hit in told] == [
        ("a", {"bm25": 1, "dense": 3}),
        ("c", {"bm25": 3, "dense": 1}),
        ("b", {"bm25": 2}),
    ]
    assert [hit.score for hit in told] == pytest.approx([1 / 61 + 1 / 63, 1 / 61 + 1 / 63, 1 / 62], rel=1e-12)
    assert fused({"bm25": [], "dense": []}, 60, 3) == []


def test_of_equal_scores_the_lower_id_is_first() -> None:
    assert [hit.id for hit in best([a_hit("b", 1), a_hit("a", 1), a_hit("c", 2)], 2)] == ["c", "a"]
    ranking = [(2.0, "c"), *((1.0, str(i)) for i in range(50)), (0.5, "x")]
    assert with_equals(lambda limit: ranking[:limit], 3) == ranking[:51]
    assert with_equals(lambda limit: ranking[:limit], 1) == ranking[:1]
    assert with_equals(lambda limit: ranking[:limit], 100) == ranking
    assert with_equals(lambda limit: ranking[:0], 1) == []


async def test_a_hybrid_has_both_rankings(started: Starter) -> None:
    retriever = await started(**GIVEN | {"kind": "hybrid", "fusion": 10})
    await retriever.index(IndexRequest(documents=NOTES))
    words, meaning = (
        await ids(retriever, "salt breath", kind="bm25"),
        await ids(retriever, "salt breath", kind="dense"),
    )
    assert set(words) == {"lungs", "meal"} and len(meaning) == 4
    for hit in await hits(retriever, "salt breath"):
        ranks = {"dense": meaning.index(hit.id) + 1}
        if hit.id in words:
            ranks["bm25"] = words.index(hit.id) + 1
        assert hit.ranks == ranks
        assert hit.score == pytest.approx(sum(1 / (10 + rank) for rank in ranks.values()), rel=1e-12)
