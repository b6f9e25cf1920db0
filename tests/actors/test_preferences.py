"""Worked numbers of Q-RM's specification, section 5.4, and what must hold for any scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.policy.preferences import (
    Reply,
    dpo,
    gated,
    gated_mean,
    implicit_outcome,
    last_score,
    log_odds,
    masked_mean,
    masked_sum,
    orpo,
    outcome,
    q_function,
)

REPLIES = st.lists(st.floats(-30, 30), min_size=1, max_size=6)


def reply(*scores: float, width: int = 8, pad: float = math.nan) -> Reply:
    padded = torch.tensor([[*scores, *[pad] * (width - len(scores))]])
    return padded, torch.arange(width)[None] < len(scores)


def test_q_function() -> None:
    better, worse = reply(4, 8, 6), reply(-2, 0)
    for scores, _ in (better, worse):
        scores.requires_grad_()
    loss = q_function(better, worse)
    assert loss.item() == pytest.approx(1.037488, abs=1e-6)
    loss.sum().backward()
    ends = ((better[0], 3), (worse[0], 2))
    grads = [scores.grad[0, :length].tolist() for scores, length in ends if scores.grad is not None]
    assert grads[0] == pytest.approx([-0.043044] * 3, abs=1e-6)
    assert grads[1] == pytest.approx([0.064566] * 2, abs=1e-6)
    assert q_function(reply(1, 3), reply(2)).item() == pytest.approx(2.126928, abs=1e-6)


def test_outcome() -> None:
    assert outcome(reply(4, 8, 6), reply(-2, 0)).item() == pytest.approx(0.002476, abs=1e-6)
    assert last_score(reply(4, 8, 6)).tolist() == [6]


def test_dpo() -> None:
    better, worse = reply(0.2, 0.4), reply(-0.5, 0.1, -0.1)
    assert dpo(better, worse).item() == pytest.approx(0.639659, abs=1e-6)
    assert implicit_outcome(better, torch.ones(1)).item() == pytest.approx(0.437488, abs=1e-6)


def test_dpo_and_orpo_of_seft() -> None:
    """SEFT's specification, section 5.3."""
    assert dpo(reply(-5 + 6), reply(-7 + 6.5)).item() == pytest.approx(0.620957, abs=1e-6)
    better, worse = reply(-0.2, -0.8), reply(-1.5, -0.5, -1.0)
    assert (log_odds(masked_mean(better)) - log_odds(masked_mean(worse))).item() == pytest.approx(0.974077, abs=1e-6)
    assert orpo(better, worse).item() == pytest.approx(0.532030, abs=1e-6)
    assert (orpo(better, worse, 2.0) - orpo(better, worse, 1.0)).item() == pytest.approx(0.320300, abs=1e-6)


@given(REPLIES.map(lambda scores: [-abs(one) for one in scores]), st.sampled_from([0.0, -0.0, -1e-30]))
def test_orpo_of_a_certain_reply_is_finite(other: list[float], certain: float) -> None:
    for better, worse in ((reply(certain), reply(*other)), (reply(*other), reply(certain))):
        better[0].requires_grad_()
        loss = orpo(better, worse)
        loss.sum().backward()
        assert better[0].grad is not None and math.isfinite(loss.item())
        assert better[0].grad.where(better[1], 0.0).isfinite().all()


def test_scores_of_replies() -> None:
    given = reply(0.2, 0.4, -1.5)
    assert masked_sum(given).item() == pytest.approx(-0.9)
    assert masked_mean(given).item() == pytest.approx(-0.3)
    assert gated_mean(reply(0.0, math.log(3))).item() == pytest.approx((0.5 + 0.75) / 2)


def test_gated() -> None:
    difference = gated_mean(reply(1, -1, 0.5)) - gated_mean(reply(0, -2))
    assert 2.5 * difference.item() == pytest.approx(0.578046, abs=1e-6)
    assert gated(reply(1, -1, 0.5), reply(0, -2)).item() == pytest.approx(0.445323, abs=1e-6)


@given(REPLIES, REPLIES, st.floats(-20, 20))
def test_the_level_of_the_logits_does_not_matter(better: list[float], worse: list[float], level: float) -> None:
    loss = q_function(reply(*better), reply(*worse)).item()
    moved = q_function(reply(*[z + level for z in better]), reply(*[z + level for z in worse])).item()
    assert moved == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("loss", [q_function, outcome, dpo, orpo, gated])
@given(better=REPLIES, worse=REPLIES)
def test_padding_does_not_matter(loss: "object", better: list[float], worse: list[float]) -> None:
    assert callable(loss)
    plain = loss(reply(*better, width=len(better)), reply(*worse, width=len(worse)))
    padded = loss(reply(*better, width=9), reply(*worse, width=9, pad=1e9))
    torch.testing.assert_close(padded, plain)


def test_the_gradient_of_what_is_padding_is_zero() -> None:
    better, worse = reply(4, 8, 6, pad=1.0), reply(-2, 0, pad=1.0)
    better[0].requires_grad_()
    (q_function(better, worse) + outcome(better, worse) + dpo(better, worse) + gated(better, worse)).sum().backward()
    assert better[0].grad is not None and not better[0].grad[0, 3:].any()
