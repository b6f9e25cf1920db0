"""SEFT's stage C: worked values of its specification (5.3) and each reason of its guard."""

from typing import Any

import pytest

from methods.seft_rounds import PseudoLabel, better_liked
from methods.seft_targets import best_own, most_repeated, own_score, problem_of
from methods.seft_train import from_round
from protocols.messages import ChatMessage, FinishReason
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


def label(source: str, given: LabelProbs | None, problem: str = "") -> PseudoLabel:
    told = {"uid": "u", "id": "p", "messages": [ChatMessage(role="user", content="?")], "reply": "a", "target": "a"}
    told |= {"source": source, "problem": problem, "label_probs": given, "sampled_tokens": 1, "policy_version": 0}
    return PseudoLabel.model_validate(told)


def test_a_target_weighs_as_much_as_the_reviser_is_sure_of_it() -> None:
    sure, unsure, bad = probs(0.7, 0.2, 0.1), probs(0.3, 0.5, 0.2), probs(0.05, 0.05, 0.9)
    found = [
        label("kept", sure), label("kept", unsure), label("kept", bad),  # the last two against their revisions
        label("own_best", sure), label("own_best", unsure),
        label("revised", unsure), label("revised", bad), label("revised", None), label("own", None),
        label("revised", bad, problem="length"),
    ]  # fmt: skip
    weights = [one.weight for one in from_round(found, by_confidence=True)]
    assert weights == pytest.approx([0.7, 0.3, 0.05, 0.8, 0.55, 0.5, 0.9, 1, 1])
    assert [one.weight for one in from_round(found, by_confidence=False)] == [1] * 9


def test_a_reply_that_is_kept_against_its_revision_does_not_weigh_what_it_was_refused_with() -> None:
    reply = label("own", None)
    refused = label("revised", probs(0.04, 0.06, 0.9)).model_copy(update={"target": "b"})
    worse = Revision(uid="u", text="b", label="major", label_probs=probs(0.01, 0.01, 0.98))
    kept = better_liked(reply, refused, worse)
    assert (kept.source, kept.target) == ("kept", "a")
    assert from_round([kept], by_confidence=True)[0].weight == pytest.approx(0.04)
    better = worse.model_copy(update={"label_probs": probs(0.5, 0.3, 0.2)})
    assert from_round([better_liked(reply, refused, better)], by_confidence=True)[0].weight == pytest.approx(0.9)


def test_repetition() -> None:
    assert most_repeated([]) == most_repeated(["a", "b", "c"]) == 0
    assert most_repeated(["a", "a", "a", "a", "a", "a"]) == 3
