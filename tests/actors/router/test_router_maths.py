"""Targets, losses, layouts, choices and qualities, on worked numbers (specification section 5.5)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.router import losses
from actors.router.decide import choose
from actors.router.layout import NOTHING, causal_layout, mask_rate, masked_count, masked_layout
from actors.router.quality import normalised, qualities, reliability
from actors.router.targets import targets_of, weights_of
from protocols.errors import BadInput
from protocols.messages import Prompt
from protocols.router import Candidate, RouteOptions, RouteRow

# [.2, .9, .75, .1, .6] brought to 0 .. 1
SCALED = np.array([0.125, 1, 0.8125, 0, 0.625])
LOGITS = torch.tensor([[0.5, 1, -0.3, -1, 0], [0.0] * 5, [2, -1, 0.5, 0, -2]])
POOL = [Candidate(name=name, price=price) for name, price in (("a", 5.0), ("b", 1.0), ("c", 3.0))]


def test_scores_become_targets() -> None:
    assert targets_of(SCALED[None], 0.8).tolist() == [[0, 1, 1, 0, 0]]
    assert targets_of(np.zeros((1, 5)), 0.8).tolist() == [[1] * 5]
    assert targets_of(np.array([[1.0, 1, 0, 1, 0]]), 0.8).tolist() == [[1, 1, 0, 1, 0]]


def test_a_dead_zone_leaves_out_rows_that_hardly_differ() -> None:
    scores = np.array([[0.5, 0.52], [0.2, 0.8]])
    assert weights_of(scores, 0.0).tolist() == [1, 1]
    assert weights_of(scores, 0.05).tolist() == [0, 1]


def test_losses_of_the_choice() -> None:
    targets = torch.tensor(targets_of(np.array([SCALED, np.zeros(5), [1, 1, 0, 1, 0]]), 0.8))
    bce = losses.bce(LOGITS, targets.float())
    assert bce[0].item() == pytest.approx(0.629621, abs=1e-6)
    assert bce.mean().item() == pytest.approx(0.656546, abs=1e-6)
    kl = losses.forward_kl(LOGITS[:1], torch.tensor(SCALED, dtype=torch.float32)[None], 0.1)
    assert kl.item() == pytest.approx(0.573746, abs=1e-6)


def test_contrast_of_the_best_and_the_worst() -> None:
    one = losses.contrastive(torch.tensor([[0.9, -0.2]]), torch.tensor([[1.0, 0.0]]), 3)
    assert one.item() == pytest.approx(0.287335, abs=1e-6)
    similarities = torch.tensor([[0.5, 0.1, 0.3, -0.4, 0.2]])
    # One is right: it alone is pulled, against the three worst of the others.
    alone = losses.contrastive(similarities, torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]]), 3)
    others = sum(math.exp(s) for s in (0.3, -0.4, 0.2))
    assert alone.item() == pytest.approx(-math.log(math.exp(0.1) / (math.exp(0.1) + others)), abs=1e-6)


def test_rows_without_a_difference_pull_nobody() -> None:
    similarities = torch.tensor([[0.5, 0.1]], requires_grad=True)
    loss = losses.contrastive(similarities, torch.ones(1, 2), 3) + losses.pairwise(similarities, torch.ones(1, 2))
    loss.sum().backward()
    assert loss.item() == 0 and similarities.grad is not None and similarities.grad.tolist() == [[0, 0]]


def test_pairs_of_candidates() -> None:
    # Two pairs are told apart: (0, 1) and (2, 1).
    loss = losses.pairwise(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 1.0]]))
    expected = (-math.log(1 / (1 + math.exp(-1))) - math.log(1 / (1 + math.exp(1)))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "rate", "masked"), [(0, 0.3, 19), (50, 0.475, 30), (100, 0.65, 41), (200, 1, 64), (9999, 1, 64)]
)
def test_the_curriculum(step: int, rate: float, masked: int) -> None:
    assert mask_rate(step, 200) == pytest.approx(rate)
    assert masked_count(64, mask_rate(step, 200)) == masked


def test_without_a_curriculum_all_is_masked_from_the_start() -> None:
    assert mask_rate(0, 0) == 1
    assert masked_count(1, 0.3) == 1


def test_length_of_a_masked_row() -> None:
    query = np.arange(12)  # 10 tokens and two special ones
    row = masked_layout(query, [np.arange(n) for n in (64, 100, 3, 0, 64)], pool=5, size=64, end=2, rate=1.0)
    assert len(row) == 10 + 2 + 5 * 65 == 337
    labels = [int((row.labels[row.blocks == t] != NOTHING).sum()) for t in range(5)]
    assert labels == [64, 64, 3, 0, 64]


@given(
    answers=st.lists(st.lists(st.integers(3, 99), max_size=9), min_size=2, max_size=4),
    length=st.integers(1, 6),
    rate=st.floats(0.3, 1),
)
def test_what_is_masked_is_predicted_and_the_rest_is_there(
    answers: list[list[int]], length: int, rate: float
) -> None:
    size, query = 6, np.arange(100, 100 + length)
    row = masked_layout(query, [np.array(a, np.int64) for a in answers], len(answers), size, 2, rate)
    assert len(row) == length + len(answers) * (size + 1)
    for t, answer in enumerate(answers):
        own, given_ = row.blocks == t, answer[:size]
        tokens, slots, labels = row.tokens[own], row.slots[own], row.labels[own]
        assert row.positions[own].tolist() == list(range(length, length + size + 1))
        hidden = max(math.floor(len(given_) * rate), 1) if given_ else 0
        visible = len(given_) - hidden
        assert tokens[:visible].tolist() == given_[:visible] and set(slots[:visible].tolist()) <= {NOTHING}
        assert labels[visible : len(given_)].tolist() == given_[visible:]
        assert set(slots[visible:size].tolist()) <= {t} and set(labels[len(given_) :].tolist()) == {NOTHING}
        assert tokens[size] == 2 and slots[size] == NOTHING


def test_a_causal_row_predicts_answers_and_their_end() -> None:
    row = causal_layout(np.array([7, 8]), [np.array([4, 5, 2]), np.array([2])], pool=2)
    assert row.tokens.tolist() == [7, 8, 0, 4, 5, 0]
    assert row.slots.tolist() == [-1, -1, 0, -1, -1, 1]
    assert row.labels.tolist() == [-1, -1, 4, 5, 2, 2]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 2]
    served = causal_layout(np.array([7, 8]), None, pool=2)
    assert served.slots.tolist() == [-1, -1, 0, 1] and served.positions.tolist() == [0, 1, 2, 2]
    assert served.predicted == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0),
        ({"exclude": ["a"]}, 2),
        ({"price_weight": 0.1}, 2),
        ({"price_weight": 0.2}, 1),
        ({"price_weight": 0.01}, 0),
        ({"within": 0.1}, 2),
        ({"within": 0.4}, 1),
        ({"quality_floor": 0.6}, 2),
        ({"quality_floor": 0.5}, 1),
        ({"quality_floor": 0.95}, 0),
        ({"abstain_below": 0.9}, 0),
        ({"abstain_below": 0.91}, None),
        ({"abstain_below": 0.85, "exclude": ["a"]}, None),
        ({"within": 0.1, "prices": {"a": 0.5}}, 0),
    ],
)
def test_choices(options: dict[str, object], expected: int | None) -> None:
    assert choose(np.array([0.9, 0.5, 0.8]), POOL, RouteOptions.model_validate(options)) == expected


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"exclude": ["d"]}, r"options\.exclude: got 'd', expected one of a, b, c"),
        ({"prices": {"d": 1.0}}, r"options\.prices: got 'd'"),
        ({"exclude": ["a", "b", "c"]}, "at least one candidate"),
    ],
)
def test_choices_that_cannot_be_made(options: dict[str, object], error: str) -> None:
    with pytest.raises(BadInput, match=error):
        choose(np.array([0.9, 0.5, 0.8]), POOL, RouteOptions.model_validate(options))


@given(
    scores=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    weight=st.floats(0, 10),
    more=st.floats(0, 10),
)
def test_a_heavier_price_never_chooses_a_dearer_one(scores: list[float], weight: float, more: float) -> None:
    first, second = (
        choose(np.array(scores), POOL, RouteOptions(price_weight=w)) for w in (weight, weight + more + 1e-3)
    )
    assert first is not None and second is not None
    assert POOL[second].price <= POOL[first].price or math.isclose(scores[first], scores[second], abs_tol=1e-9)


def test_one_rule_at_a_time() -> None:
    with pytest.raises(ValueError, match="at most one of price_weight, within and quality_floor"):
        RouteOptions(price_weight=1, within=0.1)


def test_normalised_scores() -> None:
    assert normalised(0.74, 0.5, 0.9) == pytest.approx(60.0)
    assert normalised(40.0, 29.4, 57.6) == pytest.approx(37.6, abs=0.05)
    assert math.isnan(normalised(1, 1, 1))


def rows(*scores: tuple[str, list[float]]) -> list[RouteRow]:
    return [
        RouteRow(uid=str(i), prompt=Prompt(text="q"), scores=s, group=group) for i, (group, s) in enumerate(scores)
    ]


def test_quality_per_group_and_over_groups() -> None:
    given_ = rows(("x", [1, 0]), ("x", [0, 1]), ("x", [1, 1]), ("y", [0.5, 0.7]), ("z", [1, 1]))
    groups, mean = qualities(given_, [0, 0, 1, None, 0], np.array([2.0, 1.0]), seed=0)
    x, y, z = groups
    assert (x.group, x.queries, x.abstained) == ("x", 3, 0)
    assert (x.router, x.random, x.oracle) == pytest.approx((2 / 3, 2 / 3, 1))
    assert x.normalised == pytest.approx(0, abs=1e-9) and x.low <= 0 <= x.high
    assert x.price == pytest.approx(5 / 3) and x.shares == pytest.approx([2 / 3, 1 / 3])
    # Whoever abstains has what a random choice has.
    assert y.abstained == 1 and y.router == pytest.approx(0.6) and y.normalised == pytest.approx(0, abs=1e-9)
    assert math.isnan(z.normalised)
    # A group where nothing can be won does not count.
    assert mean.normalised == pytest.approx(0, abs=1e-9) and mean.oracle == pytest.approx((1 + 0.7 + 1) / 3)


def test_calibration() -> None:
    scores = np.array([[0.95, 0.05], [0.95, 0.05]])
    bins, error = reliability(scores, np.array([[1.0, 0], [0.0, 1]]), 0.8)
    assert [(one.count, one.right) for one in bins] == [(2, 0.5), (2, 0.5)]
    assert error == pytest.approx(0.45)
