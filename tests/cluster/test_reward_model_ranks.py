"""A reward model whose ranks are processes of their own learns and scores as one process does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cluster import Cluster
from protocols.errors import BadInput
from protocols.messages import Prompt
from protocols.reward_model import (
    LearnRequest,
    Preference,
    Reply,
    RewardModelConfig,
    RewardModelService,
    RewardRequest,
)
from protocols.service import CheckpointRequest, Empty
from tests.cluster.test_trainer_group import GROUPS

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TOLERANCE = 2e-5
"""Of losses, margins and norms, relative to their size."""
CLOSE = 1e-4
"""Of scores, absolute, after some steps."""
TRAINER = {
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup_steps": 2,
    "total_steps": 20,
    "micro_batch_tokens": 40,
}
SIZES = [5, 1, 3]
"""Pairs of the steps: an odd number, and one alone, which leaves a rank without rows."""


def a_reward_model(model: str, kind: str, **trainer: Any) -> RewardModelConfig:
    shared = {"model": model, "init": "random", "threads": 1, "device": "cpu", "kind": kind}
    return RewardModelConfig.model_validate(shared | {"trainer": TRAINER | trainer})


def replies(seed: int, count: int) -> list[tuple[Reply, Reply]]:
    """The better and the worse reply to each of some prompts."""
    rng = np.random.default_rng(seed)

    def reply(uid: str, prompt: Prompt) -> Reply:
        return Reply(uid=uid, prompt=prompt, tokens=rng.integers(1, 180, rng.integers(1, 15)))

    prompts = [Prompt(tokens=rng.integers(1, 180, rng.integers(1, 9))) for _ in range(count)]
    return [(reply(f"better {i}", prompt), reply(f"worse {i}", prompt)) for i, prompt in enumerate(prompts)]


async def train(reward_model: RewardModelService, steps: range) -> list[float]:
    """What each step reports."""
    found: list[float] = []
    for step in steps:
        both = replies(step, SIZES[step % len(SIZES)])
        pairs = [Preference(uid=str(i), chosen=one, rejected=other) for i, (one, other) in enumerate(both)]
        report = await reward_model.train(LearnRequest(pairs=pairs))
        assert (report.learnt, report.version) == (len(pairs), step + 1)
        found += [report.loss, report.grad_norm, report.learning_rate, *report.metrics.values()]
    return found


async def scores(reward_model: RewardModelService) -> np.ndarray:
    asked = [reply for pair in replies(99, 4) for reply in pair]
    answered = await reward_model.score(RewardRequest(replies=asked))
    return np.concatenate([one.tokens.array for one in answered.scores if one.tokens is not None])


@pytest.mark.parametrize(
    ("kind", "group"),
    [("q_function", "torch"), ("q_function", "zero-2"), ("q_function", "zero-3"), ("implicit", "zero-2")],
)
async def test_two_ranks_are_as_one(
    kind: str, group: str, model: str, inline: Cluster, on_ray: Cluster, tmp_path: Path
) -> None:
    one = await inline.reward_model(a_reward_model(model, kind), name="one")
    two = await on_ray.reward_model(a_reward_model(model, kind, workers=2, **GROUPS[group]))
    assert await two.info(Empty()) == await one.info(Empty())
    np.testing.assert_allclose(await scores(two), await scores(one), atol=1e-6)
    expected = await train(one, range(3))
    np.testing.assert_allclose(await train(two, range(3)), expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(await scores(two), await scores(one), atol=CLOSE)

    same = replies(0, 1)[0][0]
    nothing = LearnRequest(pairs=[Preference(uid="same", chosen=same, rejected=same)])
    with pytest.raises(BadInput, match="no pair or reply is left to learn from"):
        await two.train(nothing)
    empty = RewardRequest(replies=[same.model_copy(update={"tokens": None, "ended": False})])
    with pytest.raises(BadInput, match="reply 'better 0': expected at least one token, got none"):
        await two.score(empty)

    for training_state, trainer in ((False, {}), (True, GROUPS[group])):
        where = CheckpointRequest(path=str(tmp_path / f"saved-{training_state}"), training_state=training_state)
        await two.save(where)
        new = await inline.reward_model(a_reward_model(model, kind, **trainer), name=f"new-{training_state}")
        await new.load(where)
        np.testing.assert_allclose(await scores(new), await scores(two), atol=1e-6)
    # The last one has the training state too.
    expected = await train(two, range(3, 6))
    np.testing.assert_allclose(await train(new, range(3, 6)), expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(await scores(new), await scores(two), atol=CLOSE)


async def test_several_ranks_need_processes(model: str, inline: Cluster) -> None:
    with pytest.raises(BadInput, match=r"reward_model\.trainer\.workers: more than one rank needs transport=ray"):
        await inline.reward_model(a_reward_model(model, "q_function", workers=2))
