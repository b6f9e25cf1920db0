import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.votes import majority, parse_vote


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("They agree. [[YES]]", 1),
        ("They differ. [[NO]]", 0),
        ("[[YES]] [[YES]]", 1),
        ("Not NO but [[YES]]", 1),
        ("YES or not, [[NO]]", 0),
        ("Decision: YES", 1),
        ("Decision: NO.", 0),
        ("NOTE: both KNOW it. YES", 1),
        ("[[YES]] or [[NO]]", -1),
        ("[[YES]] or [[NO]]: YES", -1),
        ("YES and NO", -1),
        ("yes", -1),
        ("[[MAYBE]]", -1),
        ("", -1),
        ("<think>[[NO]]? no.</think> [[YES]]", 1),
        ("<think>[[YES]]", -1),
    ],
)
def test_votes(text: str, vote: int) -> None:
    assert parse_vote(text) == vote


@given(st.text())
def test_any_text_is_a_vote(text: str) -> None:
    assert parse_vote(text) in (1, 0, -1)
    assert parse_vote(f"<think>{text}</think>[[YES]]") == 1


@pytest.mark.parametrize(
    ("votes", "winner", "share"),
    [
        ([1] * 5 + [0] * 2 + [-1], 1, 5 / 7),
        ([0] * 5 + [1] * 2 + [-1], 0, 5 / 7),
        ([1] * 4 + [0] * 4, None, None),
        ([1] * 7 + [-1], 1, 1.0),
        ([1, -1, -1, -1], 1, 1.0),
        ([-1, -1], None, None),
        ([], None, None),
    ],
)
def test_majority(votes: list[int], winner: int | None, share: float | None) -> None:
    assert majority(votes) == (winner, pytest.approx(share) if share is not None else None)


@given(st.lists(st.sampled_from([1, 0, -1])))
def test_majority_is_strict_and_symmetric(votes: list[int]) -> None:
    winner, share = majority(votes)
    assert (winner is None) == (votes.count(1) == votes.count(0)) == (share is None)
    assert share is None or 0.5 < share <= 1.0
    other, same = majority([vote if vote < 0 else 1 - vote for vote in votes])
    assert other == (None if winner is None else 1 - winner)
    assert same == (None if share is None else pytest.approx(share))
