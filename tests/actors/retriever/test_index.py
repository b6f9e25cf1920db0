"""What is indexed: words, changes, what survives, and folders that hold something else."""

import asyncio
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from actors.actor import start
from actors.retriever import lexical
from actors.retriever.retriever import RetrieverActor
from protocols.errors import BadInput, Corrupt, Internal
from protocols.retriever import Document, IndexRequest, IndexResponse, RetrieverConfig
from protocols.service import CheckpointRequest, Empty
from tests.actors.retriever.conftest import Starter, documents, hits, ids
from tests.contracts.sources import ROOT

ABC = documents(a="the knee is sore", b="a sore throat, a sore knee and a sore back", c="nothing of the kind")


def counts(response: IndexResponse) -> tuple[int, int, int, int]:
    return response.added, response.replaced, response.removed, response.documents


async def test_words_are_ranked_by_bm25(started: Starter) -> None:
    retriever = await started()
    assert counts(await retriever.index(IndexRequest(documents=ABC))) == (3, 0, 0, 3)
    found = await hits(retriever, "sore")
    assert [hit.id for hit in found] == ["b", "a"]
    # Lengths 4, 10 and 4 words, mean 6; k1 1.2, b 0.75.
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    expected = [idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / 6)) for tf, length in ((3, 10), (1, 4))]
    assert [hit.score for hit in found] == pytest.approx(expected, rel=1e-5)
    assert found[0].text == ABC[1].text
    assert (await retriever.info(Empty())).documents == 3


async def test_nothing_in_a_query_is_syntax(started: Starter) -> None:
    retriever = await started()
    await retriever.index(IndexRequest(documents=[*ABC, *documents(d="AND text: NOT knees")]))
    assert await ids(retriever, 'text:throat AND NOT "sore') == ["d", "b", "a"]
    assert await ids(retriever, "KNEE") == await ids(retriever, "knees") != []
    assert [await ids(retriever, query) for query in ("", "*", "~^", "id:*")] == [[]] * 4
    assert set(await ids(retriever, "-knee +(")) == {"a", "b", "d"}


async def test_equal_scores_are_in_the_order_of_ids(started: Starter) -> None:
    retriever = await started()
    names = [f"{i:03}" for i in range(300)]
    for part in (names[200:], names[:100], names[100:200]):
        await retriever.index(IndexRequest(documents=[Document(id=name, text="one knee") for name in part]))
    assert await ids(retriever, "knee", k=5) == names[:5]
    assert await ids(retriever, "knee", k=1000) == names


async def test_documents_are_added_replaced_and_forgotten(started: Starter) -> None:
    retriever = await started()
    await retriever.index(IndexRequest(documents=ABC))
    change = IndexRequest(documents=documents(a="an elbow", d="a knee"), remove=["b", "nobody", "b"])
    assert counts(await retriever.index(change)) == (1, 1, 1, 3)
    assert await ids(retriever, "knee sore") == ["d"]
    assert await ids(retriever, "elbow") == ["a"]
    assert counts(await retriever.index(change)) == (0, 2, 0, 3)
    assert counts(await retriever.index(IndexRequest())) == (0, 0, 0, 3)


async def test_a_search_is_narrowed_by_metadata(started: Starter) -> None:
    retriever = await started()
    given = [
        Document(id=f"{ward}{year}", text="knee", metadata={"ward": ward, "year": year})
        for ward in ("a", "b", "a b")
        for year in ("1", "2")
    ]
    await retriever.index(IndexRequest(documents=[*given, Document(id="none", text="knee")]))
    assert await ids(retriever, "knee", where={"ward": ["a"]}) == ["a1", "a2"]
    assert await ids(retriever, "knee", where={"ward": ["a", "a b"], "year": ["2"]}) == ["a b2", "a2"]
    assert await ids(retriever, "knee", where={"ward": ["nowhere"]}) == []
    assert await ids(retriever, "elbow", where={"ward": ["a"]}) == []
    everywhere, narrowed = await hits(retriever, "knee"), await hits(retriever, "knee", where={"ward": ["b"]})
    assert {hit.score for hit in everywhere} == {hit.score for hit in narrowed}
    assert narrowed[0].metadata == {"ward": "b", "year": "1"}


async def test_what_was_indexed_is_there_when_the_folder_is_opened_again(started: Starter, tmp_path: Path) -> None:
    first = await started(path=str(tmp_path / "index"))
    await first.index(IndexRequest(documents=ABC))
    expected = await hits(first, "sore knee")
    # As after a kill: the first one has not been closed.
    second = await started(path=str(tmp_path / "index"))
    assert await hits(second, "sore knee") == expected
    with pytest.raises(BadInput, match=r"path: got '.*index', which another retriever changes; expected one of its"):
        await second.index(IndexRequest(remove=["a"]))
    await first.index(IndexRequest(remove=["a"]))
    assert await ids(await started(path=str(tmp_path / "index")), "sore knee") == ["b"]


async def test_a_change_that_fails_leaves_what_was_there(
    started: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = await started(path=str(tmp_path))
    await retriever.index(IndexRequest(documents=ABC))
    expected = await hits(retriever, "sore knee")
    written = lexical.Store._written

    def failing(self: lexical.Store, entry: lexical.Entry) -> Any:
        if entry.document.id == "e":
            raise OSError("no space left")
        return written(self, entry)

    change = IndexRequest(documents=documents(a="gone", d="sore", e="sore"), remove=["b"])
    with monkeypatch.context() as patch:
        patch.setattr(lexical.Store, "_written", failing)
        with pytest.raises(Internal, match="no space left"):
            await retriever.index(change)
    assert await hits(retriever, "sore knee") == expected
    assert await hits(await started(path=str(tmp_path)), "sore knee") == expected
    assert counts(await retriever.index(change)) == (2, 1, 1, 4)
    assert await ids(retriever, "sore") == ["d", "e"]


KILLED = """
import asyncio, os
from actors.actor import start
from actors.retriever import lexical
from actors.retriever.retriever import RetrieverActor
from protocols.retriever import Document, IndexRequest, RetrieverConfig

async def main():
    actor = RetrieverActor(RetrieverConfig(path={path!r}))
    await start(actor)
    await actor.index(IndexRequest(documents=[Document(id="a", text="knee"), Document(id="b", text="knee")]))
    lexical.Store.refresh = lexical.Store._written = lambda *_: os._exit({code})
    await actor.index(IndexRequest(documents=[Document(id="c", text="knee")] * {added}, remove=["a"]))

asyncio.run(main())
"""


@pytest.mark.parametrize(("added", "expected"), [(1, ["a", "b"]), (0, ["b"])])
async def test_a_process_that_dies_leaves_what_was_or_what_is_to_be(
    started: Starter, tmp_path: Path, added: int, expected: list[str]
) -> None:
    """In the middle of a change, and right behind its commit."""
    code = KILLED.format(path=str(tmp_path), code=7, added=added)
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 7
    retriever = await started(path=str(tmp_path))
    assert await ids(retriever, "knee") == expected
    assert counts(await retriever.index(IndexRequest(remove=["b"]))) == (0, 0, 1, len(expected) - 1)


async def test_searches_go_on_while_documents_change(started: Starter) -> None:
    retriever = await started(kind="hybrid", threads=1, device="cpu")
    await retriever.index(IndexRequest(documents=documents(stays="a knee", goes="a knee")))

    async def change(i: int) -> None:
        await retriever.index(IndexRequest(documents=documents(goes=f"a knee, number {i}", **{f"new{i}": "a knee"})))

    async def search() -> list[str]:
        return await ids(retriever, "knee")

    found = await asyncio.gather(*(work for i in range(8) for work in (search(), change(i), search())), search())
    told = [names for names in found if names is not None]
    # Each of them has one of the states: the two that were there at first, and some of the new ones.
    assert all({"stays", "goes"} <= set(names) for names in told)
    assert set(await search()) == {"stays", "goes", *(f"new{i}" for i in range(8))}


async def test_a_temporary_index_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    actor = RetrieverActor(RetrieverConfig())
    await start(actor)
    await actor.index(IndexRequest(documents=ABC))
    assert len(list(tmp_path.iterdir())) == 1
    await actor.close()
    assert list(tmp_path.iterdir()) == []


async def test_an_index_is_saved_and_taken_over(started: Starter, tmp_path: Path) -> None:
    first, second = await started(), await started(path=str(tmp_path / "own"))
    await first.index(IndexRequest(documents=ABC))
    expected = await hits(first, "sore knee")
    saved = CheckpointRequest(path=str(tmp_path / "saved"))
    files = (await first.save(saved)).files
    assert "index.json" in files
    # Saving again replaces, and the first one goes on.
    await first.index(IndexRequest(documents=documents(d="sore")))
    await first.save(CheckpointRequest(path=str(tmp_path / "other")))
    await second.index(IndexRequest(documents=documents(z="sore knee")))
    assert (await second.load(saved)).files == files
    assert await hits(second, "sore knee") == expected
    assert await hits(await started(path=str(tmp_path / "own")), "sore knee") == expected
    assert await hits(await started(path=saved.path), "sore knee") == expected
    shutil.rmtree(tmp_path / "saved")
    assert await hits(second, "sore knee") == expected
    with pytest.raises(Corrupt, match="is not a saved retriever"):
        await second.load(saved)
    assert await hits(second, "sore knee") == expected


async def test_a_folder_of_something_else_is_refused(started: Starter, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("dear Ada")
    with pytest.raises(BadInput, match=r"path: got '.*notes', which holds something else"):
        await started(path=str(tmp_path / "notes"))
    with pytest.raises(BadInput, match=r"path: got '.*letter.txt', expected a folder"):
        await started(path=str(tmp_path / "notes" / "letter.txt"))
    await started(path=str(tmp_path / "words"))
    with pytest.raises(BadInput, match=r"kind: got 'dense', expected 'bm25', as the index in .*words has it"):
        await started(path=str(tmp_path / "words"), kind="dense")
    (tmp_path / "words" / "index.json").write_text("{")
    with pytest.raises(Corrupt, match=r"index\.json is damaged"):
        await started(path=str(tmp_path / "words"))


SECRET = "Jane Roe, born 1 May"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (IndexRequest(documents=[*documents(a=SECRET), *documents(a=SECRET)]), "documents: got the id 'a' 2 times"),
        (IndexRequest(documents=documents(a=SECRET), remove=["a"]), "remove: got 'a', which is among the documents"),
        (
            IndexRequest(documents=documents(a=SECRET + "\ud800")),
            "documents: 'a': text: got half of a surrogate pair",
        ),
        (
            IndexRequest(documents=[Document(id="a", text=SECRET, metadata={"k": "\udfff"})]),
            "documents: 'a': metadata: got half of a surrogate pair as character 0",
        ),
    ],
)
async def test_documents_that_are_refused(started: Starter, request_: IndexRequest, message: str) -> None:
    retriever = await started()
    with pytest.raises(BadInput) as caught:
        await retriever.index(request_)
    assert caught.value.message.startswith(message)
    assert "Jane" not in caught.value.message
    assert (await retriever.info(Empty())).documents == 0


async def test_odd_ids_and_texts_come_back_as_they_were(started: Starter) -> None:
    retriever = await started()
    given = [Document(id="\0 é/😀" + "x" * 70_000, text="knee\0\r\n😀", metadata={"": "", "k\x1f": "v" * 70_000})]
    await retriever.index(IndexRequest(documents=given))
    assert counts(await retriever.index(IndexRequest(documents=given))) == (0, 1, 0, 1)
    (hit,) = await hits(retriever, "knee", where={"k\x1f": ["v" * 70_000], "": [""]})
    assert (hit.id, hit.text, hit.metadata) == (given[0].id, given[0].text, given[0].metadata)


async def test_a_ranking_that_is_not_there_is_refused(started: Starter) -> None:
    retriever = await started()
    with pytest.raises(BadInput, match="kind: got 'hybrid', expected 'bm25', the only ranking of this retriever"):
        await ids(retriever, "x", kind="hybrid")
