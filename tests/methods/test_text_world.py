import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from methods.worlds.text import TextConfig, TextWorld
from protocols.errors import BadInput
from protocols.questions import Cluster, Task

GENERAL, MATH, CHOICE = Task.GENERAL, Task.MATH, Task.CHOICE
Make = Callable[..., TextWorld]

DOCUMENTS = [
    {
        "id": f"d{i}",
        "title": f"Title {i}",
        "text": f"Title {i}. It weighs {100 + i} grams and costs {i}.5 euros.",
    }
    for i in range(12)
]


def rows(path: Path, content: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return str(path)


def cluster(name: str, *ids: str, **more: Any) -> dict[str, Any]:
    return {"question_id": name, "data_source": "ultrafineweb_x", "paragraph_ids": list(ids), **more}


CLUSTERS = [cluster("c0", "d0", "d1", "d2"), cluster("c1", "d3", "d4", "d5"), cluster("c2", "d6", "d7", "d8")]


def gold(name: str, about: str = "c0", **more: Any) -> dict[str, Any]:
    given = {
        "id": name, "question_id": about, "task": "doc_general_qa", "question": "What?", "answer": "100",
        "evidence_ids": [], "hops": 1,
    }  # fmt: skip
    return given | more


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A world over given documents, clusters and gold questions."""

    def build(
        documents: list[Any] = DOCUMENTS,
        clusters: list[Any] | None = None,
        qa: list[Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> TextWorld:
        config = TextConfig(
            documents=rows(tmp_path / "documents.jsonl", documents),
            clusters=rows(tmp_path / "clusters.jsonl", clusters) if clusters is not None else "",
            qa=rows(tmp_path / "qa.jsonl", qa) if qa is not None else "",
            **options,
        )
        return TextWorld(config, seed)

    return build


def everything(world: TextWorld) -> dict[str, Cluster]:
    return {one.question_id: one for one in [*world.training, *world.heldout]}


# Clusters


def test_clusters_by_ids_and_by_texts(make: Make) -> None:
    texts = {"question_id": "texts", "data_source": "docmath_x", "paragraphs": ["One.", "Two.", " ", "One."]}
    found = everything(make(clusters=[*CLUSTERS, texts, cluster("again", "d9", "d1", "d9")]))
    assert found["c1"].paragraphs == [row["text"] for row in DOCUMENTS[3:6]]
    assert found["texts"].paragraphs == ["One.", "Two."]
    assert found["again"].paragraphs == [DOCUMENTS[9]["text"], DOCUMENTS[1]["text"]]
    assert {name: one.data_source for name, one in found.items() if name != "texts"} == dict.fromkeys(
        ["c0", "c1", "c2", "again"], "ultrafineweb_x"
    )


def test_a_cluster_of_left_out_documents(make: Make) -> None:
    """Repeated documents are found as the one that is kept, empty ones are left out."""
    documents = [*DOCUMENTS, {"id": "twin", "text": DOCUMENTS[0]["text"]}, {"id": "void", "text": " "}]
    found = everything(make(documents, [*CLUSTERS, cluster("c9", "twin", "void", "d1", "d0")]))
    assert found["c9"].paragraphs == [DOCUMENTS[0]["text"], DOCUMENTS[1]["text"]]
    with pytest.raises(BadInput, match=r"clusters.jsonl line 1: .* none of the documents holds text"):
        make(documents, [cluster("c9", "void")])


def test_clusters_of_other_documents_are_counted(make: Make) -> None:
    qa = [gold("q1"), gold("q2", "elsewhere")]
    world = make(clusters=[*CLUSTERS, cluster("elsewhere", "x1", "x2")], qa=qa)
    assert set(everything(world)) == {"c0", "c1", "c2"}
    assert any("1 clusters of documents that are not here, 1 gold questions" in note for note in world.notes())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (cluster("c0", "d9"), "the question_id 'c0' occurs twice"),
        (cluster("c9", "d0", "unknown"), "field paragraph_ids: there is no document 'unknown'"),
        (cluster("c9"), "field paragraph_ids: got [], expected a list of ids"),
        ({"question_id": "c9"}, "field paragraph_ids: got None"),
        ({"question_id": "c9", "paragraph_ids": "d0"}, "field paragraph_ids: got 'd0'"),
        ({"question_id": "c9", "paragraph_ids": [1]}, "field paragraph_ids: got [1]"),
        ({"question_id": "c9", "paragraphs": []}, "field paragraphs: got [], expected a list of texts"),
        ({"question_id": "c9", "paragraphs": ["  "]}, "field paragraphs: expected at least one text"),
        ({"paragraph_ids": ["d0"]}, "field question_id: got None, expected text"),
        (cluster("", "d0"), "field question_id: got '', expected text"),
        (cluster("c9", "d0", data_source=None), "field data_source: got None, expected text"),
        ([], "expected an object"),
    ],
)
def test_bad_clusters_are_named_by_file_and_line(make: Make, row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        make(clusters=[*CLUSTERS, row])
    assert f"clusters: {tmp_path / 'clusters.jsonl'} line 4: " in str(caught.value)
    assert message in str(caught.value)


def test_files_without_a_cluster(make: Make, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no clusters"):
        make(clusters=[])
    with pytest.raises(BadInput, match=r"only paragraph_ids without a document; the first, at .* line 1, is 'x1'"):
        make(clusters=[cluster("a", "x1"), cluster("b", "x2")])
    with pytest.raises(BadInput, match=r"clusters: .* does not exist"):
        TextWorld(TextConfig(documents=rows(tmp_path / "d.jsonl", DOCUMENTS), clusters=str(tmp_path / "none")), 0)


def test_clusters_are_built_where_none_are_given(make: Make) -> None:
    world = make(cluster_size=3)
    assert [len(one.paragraphs) for one in everything(world).values()] == [3] * 4
    assert make(cluster_size=3).training == world.training
    assert sorted(text for one in everything(world).values() for text in one.paragraphs) == sorted(
        row["text"] for row in DOCUMENTS
    )


def test_one_huge_document_and_one_cluster(make: Make) -> None:
    huge = [{"id": "h", "text": " ".join(f"word{i}" for i in range(5000))}]
    with pytest.raises(BadInput, match="one cluster cannot be split"):
        make(huge)
    world = make(huge, passage_words=100, cluster_size=10)
    assert len(everything(world)) == 5
    assert " ".join(text for one in everything(world).values() for text in one.paragraphs).count("word") == 5000


def test_given_clusters_are_cut_with_their_documents(make: Make) -> None:
    world = make(clusters=CLUSTERS, passage_words=5, cluster_size=4)
    found = everything(world)
    assert {name.split("/")[0] for name in found} == {"c0", "c1", "c2"}
    assert all(len(one.paragraphs) <= 4 for one in found.values())
    assert all(len(text.split()) <= 5 for one in found.values() for text in one.paragraphs)


# Tasks and the split


@pytest.mark.parametrize(("count", "general"), [(10, 5), (11, 6), (2, 1)])
def test_web_clusters_serve_two_tasks_in_equal_halves(make: Make, count: int, general: int) -> None:
    given = [
        {"question_id": f"c{i}", "data_source": "ultrafineweb_a", "paragraphs": [f"T {i}."]} for i in range(count)
    ]
    given += [{"question_id": f"m{i}", "data_source": "docmath_a", "paragraphs": [f"M {i}."]} for i in range(3)]
    given += [{"question_id": "d", "data_source": "docmathematics", "paragraphs": ["D."]}]
    tasks = {name: one.task for name, one in everything(make(clusters=given)).items()}
    assert {tasks.pop(f"m{i}") for i in range(3)} == {MATH}
    # Only the part before the first "_" counts, and a cluster without a source is text.
    assert tasks["d"] is not MATH
    assert abs(Counter(tasks.values())[GENERAL] - Counter(tasks.values())[CHOICE]) <= 1
    assert {name: one.task for name, one in everything(make(clusters=given)).items() if name in tasks} == tasks
    seeds = {tuple(one.task for one in everything(make(clusters=given, seed=seed)).values()) for seed in range(6)}
    assert len(seeds) > 1 or general == 1


@pytest.mark.parametrize(("share", "heldout"), [(0.15, 3), (0.01, 1), (0.5, 10), (0.9, 18), (0.99, 19)])
def test_heldout_clusters_are_never_trained_on(make: Make, share: float, heldout: int) -> None:
    given = [{"question_id": f"c{i}", "paragraphs": [f"Text of number {i} here."]} for i in range(20)]
    world = make(clusters=given, heldout_share=share)
    assert len(world.heldout) == heldout
    assert len(world.training) + heldout == 20
    assert not {one.question_id for one in world.training} & {one.question_id for one in world.heldout}
    assert heldout == 1 or len({one.task for one in world.heldout}) == 2


def test_gold_questions_are_about_heldout_clusters(make: Make) -> None:
    qa = [gold(f"q{i}", f"c{i % 3}") for i in range(9)]
    clusters = [*CLUSTERS, cluster("c3", "d9", "d10")]
    world = make(clusters=clusters, qa=qa, heldout_share=0.34)
    assert len(world.heldout) == 1
    assert world.heldout[0].question_id != "c3"
    tests, lessons = world.gold(world.heldout), world.gold(world.training)
    assert (len(tests), len(lessons)) == (3, 6)
    assert not {question.id for question in tests} & {question.id for question in lessons}
    assert {question.question_id for question in lessons} <= {one.question_id for one in world.training}


def test_all_clusters_can_be_trained_on_without_their_answers(make: Make) -> None:
    world = make(clusters=CLUSTERS, qa=[gold("q0"), gold("q1", "c1")], heldout_share=0)
    assert len(world.training) == 3
    assert {one.question_id for one in world.heldout} == {"c0", "c1"}
    assert len(world.gold(world.heldout)) == 2
    assert world.gold(world.training) == []
    assert any("trained on" in note for note in world.notes())


# Given questions


def test_questions_in_the_shape_of_the_data(make: Make) -> None:
    options = {"A": "one", "B": "two", "C": "three", "D": "four"}
    qa = [
        gold("q1", answer="Paris", evidence_ids=["d2"], aliases=["Lutetia"]),
        gold("q2", task="docmath_qa", answer=101.5, hops=2, derivation="x", scale=""),
        gold("q3", task="doc_mc", answer="B", options=options, evidence_ids=["d2", "d0"], hops=4),
        gold("q4", task="doc_mc", answer="D", options=list("wxyz")),
    ]
    q1, q2, q3, q4 = make(clusters=CLUSTERS, qa=qa, heldout_share=0)._given
    assert (q1.answer, q1.aliases, q1.evidence, q1.hops) == ("Paris", ["Lutetia"], [2], 1)
    assert (q2.answer, q2.evidence, q2.hops) == ("101.5", [], 2)
    assert (q3.options, q3.answer, q3.evidence, q3.hops) == (["one", "two", "three", "four"], "B", [0, 2], 4)
    assert q4.options == list("wxyz")


def test_evidence_follows_its_documents(make: Make) -> None:
    documents = [*DOCUMENTS, {"id": "twin", "text": DOCUMENTS[1]["text"]}, {"id": "void", "text": ""}]
    clusters = [cluster("c0", "d4", "twin", "void", "d2"), *CLUSTERS[1:]]
    qa = [gold("q", evidence_ids=["d1", "void"]), gold("r", evidence_ids=["d2", "d4", "twin"])]
    q, r = make(documents, clusters, qa, heldout_share=0)._given
    assert (q.evidence, r.evidence) == ([1], [0, 1, 2])


def test_questions_about_cut_clusters(make: Make) -> None:
    """A question moves to the piece with all of its evidence; where this is cut apart, it is left out."""
    qa = [
        gold("first", evidence_ids=["d0"]),
        gold("last", evidence_ids=["d2"]),
        gold("torn", evidence_ids=["d0", "d2"]),
        gold("whole", evidence_ids=[]),
    ]
    # Every document has 10 words, two passages of five.
    world = make(clusters=CLUSTERS, qa=qa, passage_words=5, cluster_size=4, heldout_share=0)
    first, last = world._given
    assert (first.question_id, first.evidence) == ("c0/0", [0, 1])
    assert (last.question_id, last.evidence) == ("c0/1", [0, 1])
    assert any("2 gold questions" in note for note in world.notes())
    texts = everything(world)["c0/1"].paragraphs
    assert " ".join(texts[i] for i in last.evidence) == DOCUMENTS[2]["text"]
    # A document that is itself cut apart is no evidence either.
    halves = make(clusters=CLUSTERS, qa=[gold("half", evidence_ids=["d1"]), qa[0]], passage_words=5, cluster_size=3)
    assert [question.id for question in halves._given] == ["first"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (gold("q", "nowhere"), "field question_id: there is no cluster 'nowhere'"),
        (gold("first"), "the id 'first' occurs twice"),
        (gold("q", evidence_ids=["d9"]), "field evidence_ids: the cluster has no document 'd9'"),
        (gold("q", evidence_ids="d0"), "field evidence_ids: got 'd0', expected a list of ids"),
        (gold("q", answer=None), "field answer: got None, expected a text or a number"),
        (gold("q", answer=["a"]), "field answer: got ['a']"),
        (gold("q", answer=" "), "field answer: got ' '"),
        (gold("q", answer=True), "field answer: got True"),
        (gold("q", question=""), "field question: got '', expected text"),
        (gold("q", task="essay"), "task: got 'essay'"),
        (gold("q", task="doc_mc"), "doc_mc takes 4 options, got 0"),
        (gold("q", options=list("abcd")), "doc_general_qa takes 0 options, got 4"),
        (
            gold("q", task="doc_mc", options=list("abcd"), answer="B) b"),
            "field answer: got 'B) b', expected a letter",
        ),
        (gold("q", task="doc_mc", options=list("abc"), answer="B"), "field options: got ['a', 'b', 'c']"),
        (gold("q", task="doc_mc", options={"A": "a"}, answer="A"), "field options: got {'A': 'a'}"),
        (gold("q", hops="two"), "hops: got 'two'"),
        ({"question_id": "c0", "question": "Q?", "task": "docmath_qa", "answer": "1"}, "id: required, but missing"),
        ("q", "expected an object"),
    ],
)
def test_bad_questions_are_named_by_file_and_line(make: Make, row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        make(clusters=CLUSTERS, qa=[gold("first"), row])
    assert f"qa: {tmp_path / 'qa.jsonl'} line 2: " in str(caught.value)
    assert message in str(caught.value)


def test_files_without_a_question(make: Make, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no question about one of the clusters"):
        make(clusters=CLUSTERS, qa=[])
    with pytest.raises(BadInput, match=r"qa: .* does not exist"):
        TextWorld(TextConfig(documents=rows(tmp_path / "d.jsonl", DOCUMENTS), qa=str(tmp_path / "none")), 0)
