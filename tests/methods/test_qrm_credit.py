"""Q-RM's advantages: the worked numbers of specification 5.4 through the product's own path, and the other forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cluster.configure import configure
from methods import qrm, spell
from methods.advantages import Values
from methods.qrm_config import AdvantageConfig
from methods.qrm_credit import Scored, advantages_of, less_kl, returns_of

TOKENS = [np.array([1.0, 3, -2]), np.array([4.0, 0])]
SCORED = [Scored(float(tokens.mean()), tokens) for tokens in TOKENS]
LOGPROBS = [np.array([-0.5, -1, -0.2]), np.array([-0.3, -0.9])]
REFERENCE = [np.array([-0.4, -1.3, -0.2]), np.array([-0.3, -0.4])]
VALUES = [np.array([0.2, 0.4, -0.1]), np.array([0.1, 0.3])]
BUILT_IN = "world=chain"


def close(found: list[Values], expected: list[list[float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def config_of(*words: str) -> qrm.Config:
    return configure(qrm.Config, [BUILT_IN, *words], None, qrm.preset)


def test_the_papers_form_is_the_default() -> None:
    config = config_of().advantage
    returns = returns_of(SCORED, "own", config)
    close(returns, [[-0.093659, 0.842927, -1.498537], [1.311220, -0.561951]])
    advantages, targets = advantages_of(returns, VALUES, "own", config)
    close(advantages, [[-0.293659, 0.442927, -1.398537], [1.211220, -0.861951]])
    close(targets, [reply.tolist() for reply in returns])


def test_the_reference_codes_form_is_one_key() -> None:
    config = config_of("form=reference").advantage
    returns = less_kl(returns_of(SCORED, "own", config), LOGPROBS, REFERENCE, config)
    close(returns, [[0.467293, 1.401879, -0.936586], [1.873172, -0.005]])
    advantages, targets = advantages_of(returns, VALUES, "own", config)
    close(advantages, [[0.455668, 1.378629, -0.930773], [1.867359, -0.022437]])
    close(targets, [reply.tolist() for reply in returns])


def test_the_reference_codes_form_of_reinforce() -> None:
    config = config_of("form=reference", "algorithm=reinforce")
    assert not config.has_critic and not config.needs_reference
    returns = returns_of(SCORED, "own", config.advantage)
    close(returns, [[0.468293, 1.404879, 0.312195], [1.873172, 0.936586]])
    assert advantages_of(returns, None, "own", config.advantage)[0][0] is not None


def test_an_outcome_is_copied_to_every_token() -> None:
    scored = [Scored(1.0, np.zeros(3)), Scored(0.0, np.zeros(1))]
    close(returns_of(scored, "copied", AdvantageConfig(normalisation="none")), [[1, 1, 1], [0]])
    # Mean and deviation are over tokens: 0.75 and sqrt(3) / 4.
    close(returns_of(scored, "copied", AdvantageConfig()), [[1 / math.sqrt(3)] * 3, [-math.sqrt(3)]])


def test_an_outcome_at_the_last_token_is_spread_by_gae() -> None:
    config = AdvantageConfig(normalisation="none")
    rewards = returns_of([Scored(1.0, np.zeros(3))], "gae", config)
    close(rewards, [[0, 0, 1]])
    advantages, targets = advantages_of(rewards, [np.array([0.5, 0.4, 0.6])], "gae", config)
    close(advantages, [[0.16816, 0.428, 0.4]])
    close(targets, [[0.66816, 0.828, 1.0]])


def test_log_ratios_are_rewards_of_their_own_tokens() -> None:
    rewards = returns_of(
        [Scored(0.06, np.array([0.02, 0.04]), adds_up=True)], "gae", AdvantageConfig(normalisation="none")
    )
    close(rewards, [[0.02, 0.04]])


@given(st.lists(arrays(np.float64, st.integers(1, 5), elements=st.floats(-50, 50)), min_size=1, max_size=5))
def test_whitened_advantages_have_mean_0_and_deviation_1(replies: list[Values]) -> None:
    advantages, _ = advantages_of(replies, None, "own", AdvantageConfig(whiten=True))
    every = np.concatenate(advantages)
    assert every.mean() == pytest.approx(0, abs=1e-6)
    if np.ptp(np.concatenate(replies)) > 1e-6:
        assert every.std() == pytest.approx(1)


@given(st.floats(-100, 100), st.floats(0.01, 100))
def test_level_and_scale_of_the_logits_do_not_matter(level: float, scale: float) -> None:
    moved = [Scored(one.reply * scale + level, one.tokens * scale + level) for one in SCORED]
    for credit in ("own", "copied", "gae"):
        expected = returns_of(SCORED, credit, AdvantageConfig())
        close(returns_of(moved, credit, AdvantageConfig()), [reply.tolist() for reply in expected])


@pytest.mark.parametrize(
    ("words", "credit"),
    [
        ((), "own"),
        (("reward.kind=outcome",), "gae"),
        (("reward.kind=implicit",), "gae"),
        (("reward.kind=implicit", "algorithm=reinforce"), "own"),
        (("reward.kind=implicit_outcome", "algorithm=reinforce"), "own"),
        (("reward.kind=outcome", "algorithm=reinforce"), "copied"),
        (("source=rules",), "copied"),
        (("source=exact",), "own"),
        (("source=rules", "advantage.credit=gae"), "gae"),
    ],
)
def test_how_each_reward_becomes_credit(words: tuple[str, ...], credit: str) -> None:
    assert config_of(*words).credit == credit


def test_a_profile_reaches_reward_models_that_are_there() -> None:
    config = config_of("profile=cluster")
    for model in (config.reward, config.critic):
        assert model.trainer is not None and model.trainer.engine == "deepspeed"
        assert (model.dtype, model.resources.gpus) == ("bfloat16", 1)
    assert config.rules.resources.gpus == 0
    spelled = configure(spell.Config, ["world=ledger", "profile=cluster"], None, spell.preset)
    assert spelled.reward_model is None
