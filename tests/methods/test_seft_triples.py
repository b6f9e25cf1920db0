"""SEFT's stage A: worked values of its specification (5.3), edge cases of its section 3, and what always holds."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.chat_data import Candidate, Judged, read_judged
from methods.seft_triples import (
    LabelRule,
    Triple,
    balanced,
    edit_distance,
    labels_by_rank,
    labels_by_score,
    major_above,
    triples_of,
)
from protocols.errors import BadInput
from protocols.messages import ChatMessage

ASKED = [ChatMessage(role="user", content="Say it.")]
GAPS = [0, 0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.9, 1.2, 2.0]


def item(*replies: tuple[str, float], by: str = "score", name: str = "p") -> Judged:
    return Judged(
        id=name, messages=ASKED, replies=[Candidate.model_validate({"text": t, by: value}) for t, value in replies]
    )


def read(*items: Judged, **rule: Any) -> list[tuple[str, str, str]]:
    return [(t.reply, t.label, t.target) for t in triples_of(items, LabelRule(**rule)).kept]


# Labels.


def test_labels_by_score() -> None:
    assert major_above(GAPS, 0) == pytest.approx(0.55)
    labels = labels_by_score(GAPS, 0, 0.55)
    assert labels == ["no"] * 2 + ["minor"] * 4 + ["major"] * 4
    # With noise the two smallest gaps are none, and the median is of the other six.
    assert major_above(GAPS, 0.2) == pytest.approx(0.75)
    assert Counter(labels_by_score(GAPS, 0.2, 0.75)) == {"no": 4, "minor": 3, "major": 3}


def test_labels_by_rank() -> None:
    seven = item(*((f"reply {rank}", rank) for rank in range(1, 8)), by="rank").replies
    assert labels_by_rank(seven, LabelRule(minor_max_rank=3)) == ["no", "minor", "minor", *["major"] * 4]
    assert labels_by_rank(seven, LabelRule()) == ["no", "minor", "minor", "minor", *["major"] * 3]


@pytest.mark.parametrize(("worse", "label"), [("the cat sat on mat", "minor"), ("a dog stood near a door", "major")])
def test_labels_of_pairs(worse: str, label: str) -> None:
    better = "the cat sat on the mat"
    assert read(item((worse, 2), (better, 1), by="rank")) == [(worse, label, better), (better, "no", better)]


def test_edit_distance() -> None:
    assert edit_distance("the cat sat on mat", "the cat sat on the mat") == (1, pytest.approx(0.166667, abs=1e-6))
    assert edit_distance("the cat sat on the mat", "a dog stood near a door") == (6, 1.0)
    assert edit_distance("", "") == (0, 0.0)
    assert edit_distance("if a:\n    b", "if a:\n        b") == (1, 0.2)  # blanks are words here
    assert edit_distance("if a: b", "if  a:  b") == (0, 0.0)


# Targets.


def test_targets() -> None:
    best, close, far = "one two three four", "one two three", "zero"
    found = read(item((far, 0.0), (close, 0.8), (best, 1.0), ("one two", 0.7)), noise=0.0)
    # Gaps are 1, 0.2, 0 and 0.3, so t1 is 0.3; the nearest text that is better than "one two" is "one two three".
    assert found == [(far, "major", best), (close, "minor", best), (best, "no", best), ("one two", "minor", close)]


def test_a_minor_target_is_better_by_more_than_the_noise() -> None:
    given = item(("a b c", 0.5), ("a b d", 0.6), ("x y z", 0.9), ("q", 0.0), name="p")
    assert ("a b c", "minor", "x y z") in read(given, noise=0.2)
    assert ("a b c", "minor", "a b d") in read(given, noise=0.05)


# What is left out.


def test_what_is_left_out() -> None:
    items = [
        item(("alone", 1.0), name="1"),
        item(("same", 1.0), ("same", 0.0), ("other", 0.5), name="2"),
        item(("tied", 1.0), ("also tied", 1.0), name="3"),
        item(("twice", 1.0), ("twice", 1.0), ("worse", 0.0), name="4"),
        item(("  ", 1.0), ("text", 0.0), name="5"),
    ]
    found = triples_of(items, LabelRule())
    assert [(one.source_id, one.reply, one.label) for one in found.kept] == [
        ("3", "tied", "no"),
        ("4", "twice", "no"),
        ("4", "worse", "minor"),
    ]
    assert found.dropped == {
        "prompts with less than two replies": 2,
        "equal texts at different places": 2,
        "equally good": 1,
        "repeated": 1,
        "prompts whose best reply is empty": 1,
    }


def test_an_empty_reply_needs_a_major_revision() -> None:
    assert read(item(("good", 1.0), ("", 0.99), ("bad", 0.5))) == [
        ("good", "no", "good"),
        ("", "major", "good"),
        ("bad", "major", "good"),
    ]


def test_ranks_have_no_noise() -> None:
    assert read(item(("a b c d", 1), ("a b c", 2), by="rank"), noise=1.0) == [
        ("a b c d", "no", "a b c d"),
        ("a b c", "minor", "a b c d"),
    ]


@pytest.mark.parametrize("replies", [[("", 1.0), ("good", 1.0)], [("good", 1.0), ("", 1.0)]])
def test_an_empty_reply_that_scores_as_well(replies: list[tuple[str, float]]) -> None:
    assert sorted(read(item(*replies))) == [("", "major", "good"), ("good", "no", "good")]


# What always holds.

REPLIES = st.lists(
    st.tuples(st.text("ab \n", max_size=6), st.sampled_from([i / 10 for i in range(11)])), min_size=1, max_size=5
)


@given(st.lists(REPLIES, min_size=1, max_size=5), st.sampled_from([0.0, 0.1, 0.3, 0.5]))
def test_targets_are_never_worse(prompts: list[list[tuple[str, float]]], noise: float) -> None:
    items = [item(*replies, name=str(i)) for i, replies in enumerate(prompts)]
    scores = {(one.id, reply.text): reply.score or 0.0 for one in items for reply in one.replies}
    for triple in triples_of(items, LabelRule(noise=noise)).kept:
        before, after = (scores[triple.source_id, text] for text in (triple.reply, triple.target))
        assert triple.target.strip()
        if triple.label == "no":
            assert triple.target == triple.reply
        elif triple.reply.strip():
            assert after - before > noise
        else:
            assert after >= before


@given(st.lists(st.sampled_from(["no", "minor", "major"]), max_size=40), st.integers(0, 9))
def test_balance(labels: list[Any], seed: int) -> None:
    triples = [
        Triple(id=str(i), source_id="p", messages=ASKED, reply="r", label=label, target="t")
        for i, label in enumerate(labels)
    ]
    counts = Counter(labels)
    if not counts["no"]:
        with pytest.raises(BadInput, match="no reply is labelled `no`"):
            balanced(triples, np.random.default_rng(seed))
        return
    kept = balanced(triples, np.random.default_rng(seed))
    assert kept == balanced(triples, np.random.default_rng(seed))
    assert kept == [triple for triple in triples if triple in kept]
    assert Counter(triple.label for triple in kept) == {
        label: min(count, 2 * min(counts.values())) for label, count in counts.items()
    }


@pytest.mark.data
@pytest.mark.skipif("REPERTORY_DATA" not in os.environ, reason="REPERTORY_DATA is not set")
def test_real_preferences() -> None:
    file = Path(os.environ["REPERTORY_DATA"]) / "seft" / "preference_pairs.jsonl"
    found = triples_of(read_judged([str(file)]), LabelRule())
    # Answers of different models share few words, so hardly any pair is a minor revision.
    assert Counter(one.label for one in found.kept) == {"no": 195, "minor": 10, "major": 185}
    assert not found.dropped and found.threshold is None
    kept = balanced(found.kept, np.random.default_rng(0))
    assert Counter(one.label for one in kept) == {"no": 20, "minor": 10, "major": 20}
