"""Worked numbers of Q-RM's specification, section 5.4, and what must hold for any batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from methods.advantages import (
    Values,
    at_last_token,
    gae,
    kl_per_token,
    last_token_mean,
    normalised,
    returns_to_go,
)

SCORES = [np.array([1.0, 3, -2]), np.array([4.0, 0])]
LOGPROBS = [np.array([-0.5, -1, -0.2]), np.array([-0.3, -0.9])]
REFERENCE = [np.array([-0.4, -1.3, -0.2]), np.array([-0.3, -0.4])]
VALUES = [np.array([0.2, 0.4, -0.1]), np.array([0.1, 0.3])]
FLOATS = st.floats(-100, 100)
REPLIES = st.lists(arrays(np.float64, st.integers(0, 6), elements=FLOATS), min_size=1, max_size=4)


def close(found: list[Values], expected: list[list[float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_scale_only() -> None:
    close(normalised(SCORES, "scale_only"), [[0.468293, 1.404879, -0.936586], [1.873172, 0]])


def test_centred() -> None:
    close(normalised(SCORES), [[-0.093659, 0.842927, -1.498537], [1.311220, -0.561951]])


def test_the_last_token_gets_the_mean() -> None:
    scaled = normalised(SCORES, "scale_only")
    assert [float(last_token_mean(reply)[-1]) for reply in scaled] == pytest.approx([0.312195, 0.936586], abs=1e-6)
    np.testing.assert_array_equal(last_token_mean(scaled[0])[:-1], scaled[0][:-1])


def test_the_reference_codes_rewards_and_advantages() -> None:
    rewards = [
        reply - 0.01 * kl_per_token(logprobs, reference, "abs")
        for reply, logprobs, reference in zip(normalised(SCORES, "scale_only"), LOGPROBS, REFERENCE, strict=True)
    ]
    close(rewards, [[0.467293, 1.401879, -0.936586], [1.873172, -0.005]])
    baselines = normalised(VALUES, "scale_only")
    advantages = [reply - 0.01 * baseline for reply, baseline in zip(rewards, baselines, strict=True)]
    close(advantages, [[0.455668, 1.378629, -0.930773], [1.867359, -0.022437]])


def test_the_papers_advantages() -> None:
    advantages = [reply - value for reply, value in zip(normalised(SCORES), VALUES, strict=True)]
    close(advantages, [[-0.293659, 0.442927, -1.398537], [1.211220, -0.861951]])


def test_gae() -> None:
    values = np.array([0.5, 0.4, 0.6])
    advantages = gae(at_last_token(1.0, 3), values, 0.9, 0.8)
    np.testing.assert_allclose(advantages, [0.16816, 0.428, 0.4], atol=1e-9)
    np.testing.assert_allclose(advantages + values, [0.66816, 0.828, 1.0], atol=1e-9)


def test_returns_to_go() -> None:
    np.testing.assert_allclose(returns_to_go(np.array([1.0, 0, 2]), 0.5), [1.5, 1.0, 2.0])


@given(REPLIES)
def test_centred_rewards_have_mean_0_and_spread_1_and_ignore_level_and_scale(replies: list[Values]) -> None:
    found = np.concatenate(normalised(replies))
    every = np.concatenate(replies)
    if every.size > 1 and every.std() > 1e-3:
        assert found.mean() == pytest.approx(0, abs=1e-6)
        assert found.std() == pytest.approx(1)
        other = np.concatenate(normalised([3 * reply + 7 for reply in replies]))
        np.testing.assert_allclose(other, found, atol=1e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("how", ["centred", "scale_only", "none"])
def test_equal_rewards_and_none_at_all_are_not_scaled(how: str) -> None:
    level = 0.0 if how == "centred" else 5.0
    close(normalised([np.full(2, 5.0), np.full(1, 5.0)], how), [[level, level], [level]])  # type: ignore[arg-type]
    close(normalised([np.full(1, 5.0)], how), [[level]])  # type: ignore[arg-type]
    assert [len(reply) for reply in normalised([np.zeros(0)], how)] == [0]  # type: ignore[arg-type]


@given(arrays(np.float64, 5, elements=st.floats(-5, 0)), arrays(np.float64, 5, elements=st.floats(-5, 0)))
def test_kl_estimates(logprobs: Values, reference: Values) -> None:
    assert (kl_per_token(logprobs, reference, "k3") >= -1e-12).all()
    np.testing.assert_allclose(kl_per_token(logprobs, logprobs), 0)
    np.testing.assert_allclose(kl_per_token(logprobs, reference, "k1"), logprobs - reference)


@given(arrays(np.float64, st.integers(0, 6), elements=FLOATS), FLOATS)
def test_with_lambda_1_the_values_are_a_baseline(rewards: Values, level: float) -> None:
    values = np.full(len(rewards), level)
    np.testing.assert_allclose(gae(rewards, values, 1.0, 1.0) + values, returns_to_go(rewards), atol=1e-6)


@given(arrays(np.float64, st.integers(1, 6), elements=FLOATS))
def test_with_lambda_0_only_the_next_value_counts(rewards: Values) -> None:
    values = np.arange(len(rewards), dtype=float)
    following = np.append(values[1:], 0.0)
    np.testing.assert_allclose(gae(rewards, values, 0.9, 0.0), rewards + 0.9 * following - values, atol=1e-9)


def test_equal_rewards_are_not_blown_up_by_rounding() -> None:
    # The mean of three times 0.1 is not 0.1 in float64.
    close(normalised([np.full(3, 0.1)]), [[0, 0, 0]])
