"""SEFT's stage C: worked values of its specification (5.3) and each reason of its guard."""

from typing import Any

import pytest

from methods.seft_targets import best_own, most_repeated, own_score, problem_of
from protocols.messages import FinishReason
from protocols.reviser import LabelProbs, Revision

NAMES = ("[no]", "[minor]", "[major]")


def probs(no: float, minor: float, major: float) -> LabelProbs:
    return LabelProbs(no=no, minor=minor, major=major)


def test_the_score_of_own_replies() -> None:
    given = [probs(0.7, 0.2, 0.1), probs(0.1, 0.6, 0.3), probs(0.34, 0.33, 0.33)]
    assert [own_score(one) for one in given] == pytest.approx([0.8, 0.4, 0.505])
    assert best_own(given) == 0
    assert best_own(given[1:]) == 1
    assert best_own(given[1:2]) is None
    assert best_own([probs(0.5, 0, 0.5)]) == 0  # just enough


@pytest.mark.parametrize(
    ("reply", "revision", "problem"),
    [
        ("a b", {"label": "minor", "text": "a c"}, None),
        ("a b", {"label": "no", "text": "a b"}, None),
        ("a [no] b", {"label": "no", "text": "a [no] b"}, None),  # the policy's own, which nobody revised
        (" ", {"label": "no", "text": " "}, "empty"),
        ("a b", {"text": "a b", "too_long": True}, "too long to be revised"),
        ("a b", {"label": "major", "text": " \n"}, "empty"),
        ("a b", {"label": "major", "text": "a c", "finish_reason": FinishReason.LENGTH}, "not finished"),
        ("a b", {"label": "major", "text": "a c", "finish_reason": FinishReason.ABORTED}, "not finished"),
        ("a b", {"label": "major", "text": "a\n [minor]\nc"}, "label in the text"),
        ("a b", {"label": "major", "text": "a [minor] c"}, None),
        ("a b", {"label": "minor", "text": "a b"}, "unchanged"),
        ("a b", {"label": "minor", "text": "a b c d"}, None),
        ("a b", {"label": "minor", "text": "a b c d e"}, "length"),
        ("a b", {"label": "major", "text": "a b c d e"}, None),
        ("a b", {"label": "major", "text": "a b c d e f g h i"}, "length"),
        ("a b c d", {"label": "minor", "text": "a b"}, None),
        ("a b c d", {"label": "minor", "text": "a"}, "length"),
        ("a b c d", {"label": "major", "text": "a"}, None),
        ("a b c d e", {"label": "major", "text": "a"}, "length"),
        ("", {"label": "major", "text": "a b c d e f g h i"}, None),
        ("a b", {"text": "a b c d e f g h i"}, None),  # without labels no length is known to be wrong
        ("x " * 36, {"label": "major", "text": "a b c d " * 8}, None),
        ("x " * 36, {"label": "major", "text": "a b c d " * 9}, "repetition"),
    ],
)
def test_the_guard(reply: str, revision: dict[str, Any], problem: str | None) -> None:
    given = {"uid": "u", "finish_reason": FinishReason.STOP} | revision
    assert problem_of(reply, Revision.model_validate(given), NAMES) == problem


def test_repetition() -> None:
    assert most_repeated([]) == most_repeated(["a", "b", "c"]) == 0
    assert most_repeated(["a", "a", "a", "a", "a", "a"]) == 3
