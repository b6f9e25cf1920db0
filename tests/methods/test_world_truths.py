"""Truths that are looked up: of cloze questions in any text, and of the fact ledger."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from methods.worlds import ledger
from methods.worlds.cloze import (
    cloze_question,
    gold_cloze,
    parse_cloze,
    same_word,
    usable_spans,
    with_distractors,
    words_after,
)
from methods.worlds.ledger import LedgerWorld
from methods.worlds.text import TextConfig, TextWorld
from protocols.questions import LETTERS, Cluster, Proposal, ProposalStatus, Task

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


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A world over small documents."""

    def build(**options: Any) -> TextWorld:
        return TextWorld(TextConfig(documents=rows(tmp_path / "documents.jsonl", DOCUMENTS), **options), 0)

    return build


TEXT = ["The quick brown fox jumps over the lazy dog.", 'It cost "about 12.50" euros in 2019, or 7% more.']


def asked(question: str, answer: str, options: list[str] | None = None) -> Proposal:
    return Proposal(
        uid="u", question_id="c", task=CHOICE if options else GENERAL, evidence=[0], fresh=[0],
        status=ProposalStatus.OK, question=question, options=options or [], answer=answer,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("question", "answer", "truth"),
    [
        ('Which word follows "over the lazy"?', "dog", True),
        ('Which word follows "over the lazy"?', "Dog.", True),
        ('Which word follows "over the lazy"?', "cat", False),
        ('Which number follows "euros in"?', "2019", True),
        ('Which number follows "euros in"?', "2018", False),
        ('Which word follows "the lazy dog."?', "It", False),
        ('Which word follows "never written"?', "dog", False),
        ("What jumps?", "fox", None),
    ],
)
def test_cloze_questions_are_audited(make: Make, question: str, answer: str, truth: bool | None) -> None:
    world = make(cluster_size=3)
    one = Cluster(question_id="c", task=GENERAL, paragraphs=TEXT)
    assert world.audit(one, asked(question, answer)) is truth
    if truth is not None:
        options = [answer, "w", "x", "y"]
        assert world.audit(one, asked(question, "A", options)) is truth
        assert world.hops(question) == 1
    else:
        assert world.hops(question) is None
    assert world.same("a", "a") is None


def test_the_same_number_in_another_form() -> None:
    assert same_word("12.5", '12.50"') and same_word("2019", "2019,") and same_word("7", "7%")
    assert not same_word("12.5", "12.51") and not same_word("1", "l")


def test_words_after_a_span() -> None:
    paragraphs = ["a b c, a b d", "x a b. a b", "b a"]
    assert words_after("a b", paragraphs) == {"c", "d"}
    assert words_after("b.", paragraphs) == {"a"}
    assert words_after("a", ["a"]) == set()
    assert parse_cloze(cloze_question(GENERAL, "a b")) == "a b"
    assert parse_cloze(cloze_question(MATH, "a b") + "\n(A) x") == "a b"
    assert parse_cloze("Which word follows?") is None


@pytest.mark.parametrize("task", list(Task))
def test_cloze_gold_is_true(make: Make, task: Task) -> None:
    texts = [row["text"] for row in DOCUMENTS[:4]]
    one = Cluster(question_id="c", task=task, paragraphs=texts)
    found = gold_cloze(one, 10, random.Random(0))
    assert found == gold_cloze(one, 10, random.Random(0))
    assert len(found) == min(10, len(usable_spans(task, texts)))
    world = make(cluster_size=3)
    for question in found:
        update = {"question": question.question, "options": question.options, "answer": question.answer}
        assert world.audit(one, asked("", "").model_copy(update=update)) is True
        span = parse_cloze(question.question)
        assert span is not None
        (index,) = question.evidence
        assert span in texts[index]
        assert len(words_after(span, texts)) == 1
        if task is MATH:
            assert float(question.answer) != 0
        if task is CHOICE:
            assert len(set(question.options)) == 4


def test_distractors_are_other_words() -> None:
    for seed in range(30):
        options, letter = with_distractors("fox", TEXT, random.Random(seed))
        assert options[LETTERS.index(letter)] == "fox"
        assert len({option.lower() for option in options}) == 4
    options, letter = with_distractors("a", ["a b"], random.Random(0))
    assert sorted(options) == ["a", "b", "none of these 0", "none of these 1"]


def test_verdict_pairs_are_balanced(make: Make) -> None:
    pairs = make(cluster_size=3).verdict_pairs()
    same = Counter(truth for *_, truth in pairs)
    assert same[True] == same[False] > 5
    for _, reply, reference, truth in pairs:
        assert (re.findall(r"answer is (.*)\.$", reply) == [reference]) == truth


# The fact ledger


def test_truths_of_the_ledger_by_brute_force() -> None:
    world = LedgerWorld(seed=3, training_clusters=6, heldout_clusters=4)
    for one in [*world.training, *world.heldout]:
        facts = [re.fullmatch(r"(K\d) is ([VW]\d)\. (K\d) leads to (K\d)\.", text) for text in one.paragraphs]
        values = {match[1]: match[2] for match in facts if match}
        targets = {match[3]: match[4] for match in facts if match}
        assert len(values) == 6 and values.keys() == targets.keys()
        assert all(key != target and target in values for key, target in targets.items())
        for key, surface in product(ledger.KEYS, ledger.SURFACES):
            for question, truth in (
                (f"What is {key}?", values.get(key)),
                (f"What is the key that {key} leads to?", values.get(targets.get(key, ""))),
            ):
                right = truth is not None and surface[1] == truth[1]
                assert world.audit(one, asked(question, surface)) is right
        assert world.audit(one, asked("What is the weather?", "V0")) is False


def test_gold_of_the_ledger() -> None:
    world = LedgerWorld(seed=0, training_clusters=5, heldout_clusters=3)
    questions = world.gold(world.heldout)
    assert Counter(question.hops for question in questions) == {1: 18, 2: 18}
    clusters = {one.question_id: one for one in world.heldout}
    for question in questions:
        assert len(question.aliases) == 1
        for answer in (question.answer, *question.aliases):
            assert world.audit(clusters[question.question_id], asked(question.question, answer)) is True
        assert world.hops(question.question) == question.hops
    assert {question.question_id for question in world.gold(world.training)} == {
        one.question_id for one in world.training
    }
    pairs = world.verdict_pairs()
    assert Counter(truth for *_, truth in pairs) == {True: 16, False: 16}
    assert world.same("V1", "W1") and not world.same("V1", "V2") and not world.same("", "V1")
    other = LedgerWorld(seed=0, training_clusters=5, heldout_clusters=3)
    assert other.training == world.training and other.heldout == world.heldout
    assert LedgerWorld(seed=1, training_clusters=5, heldout_clusters=3).training != world.training
