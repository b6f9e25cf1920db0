import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.votes import majority
from methods.spell_batch import assemble
from methods.spell_config import Config, GroundingConfig
from methods.spell_maths import (
    answered_without_documents,
    has_spread,
    no_spread_probability,
    on_tokens,
    pass_at_k,
    pick,
    pick_negatives,
    questioner_advantages,
    questioner_reward,
    responder_reward,
    standardized,
    trains_verifier,
    verifier_rewards,
    vote_value,
)
from methods.spell_rounds import Fate
from protocols.questions import Task

GENERAL, MATH, CHOICE = Task.GENERAL, Task.MATH, Task.CHOICE
REWARDS = st.lists(st.floats(-1, 1), max_size=20)


def near(values: Sequence[float] | float) -> object:
    return pytest.approx(values, abs=1e-5)


def test_gaussian_reward() -> None:
    rewards = [questioner_reward(i / 8) for i in range(9)]
    frontier = [0.079560, 0.324652, 0.754840, 1.0, 0.754840, 0.324652, 0.079560]
    assert rewards == near([0.0, *frontier, 0.0])
    assert questioner_reward(3 / 8, sigma=0.5 / 6) == near(0.324652)
    assert questioner_reward(1 / 8, sigma=0.5 / 6) == near(0.000040)
    assert questioner_reward(1 / 8, sigma=0.5 / 2) == near(0.324652)


def test_other_question_rewards() -> None:
    assert questioner_reward(1 / 8, "reverse") == near(0.875)
    assert questioner_reward(1 / 8, "rzero") == near(0.25)
    assert [questioner_reward(r, shape) for r in (0, 1) for shape in ("gaussian", "reverse", "rzero")] == [0] * 6


@pytest.mark.parametrize(
    ("combine", "rewards"),
    [("max", [0, 1, 1, 1]), ("mean", [0, 0.5, 0.5, 1]), ("min", [0, 0, 0, 1]), ("sum", [0, 1, 1, 2])],
)
def test_rule_and_vote_combine(combine: str, rewards: list[float]) -> None:
    assert [responder_reward(rule, vote, combine) for rule in (0.0, 1.0) for vote in (0.0, 1.0)] == rewards
    assert [responder_reward(rule, None, combine) for rule in (0.0, 1.0)] == [0.0, 1.0]


def test_responder_advantages() -> None:
    assert standardized([1, 1, 1, 0, 0, 0, 0, 0]) == near([1.207612] * 3 + [-0.724567] * 5)
    assert standardized([1, 0, 0, 0, 0, 0, 0, 0]) == near([2.474867] + [-0.353552] * 7)
    assert standardized([1, 0, 0, 0]) == near([1.499997] + [-0.499999] * 3)


def test_verifier_group() -> None:
    votes = [1] * 5 + [0] * 2 + [-1]
    winner, share = majority(votes)
    assert (winner, share) == (1, near(0.714286))
    assert trains_verifier(winner, share, rule=1.0)
    rewards = verifier_rewards(votes, 1)
    assert rewards == [1] * 5 + [0] * 2 + [-1]
    assert standardized(rewards) == near([0.661437] * 5 + [-0.661437] * 2 + [-1.984311])


def test_vote_groups_that_do_not_train() -> None:
    tied, unanimous, seven = majority([1] * 4 + [0] * 4), majority([1] * 8), majority([1] * 7 + [-1])
    assert vote_value(tied[0]) == 0.0
    assert seven[1] == 1.0
    for winner, share in (tied, unanimous, seven, majority([-1] * 8)):
        assert not trains_verifier(winner, share, rule=1.0)
    assert not trains_verifier(1, 0.75, rule=0.0)
    assert trains_verifier(0, 0.75, rule=0.0)
    assert trains_verifier(1, 1.0, rule=1.0, bounds=(0.51, 1.0))


def test_questioner_batch_of_one_task() -> None:
    rewards = [questioner_reward(a) for a in (1 / 8, 4 / 8, 6 / 8)] + [-1.0, -0.5, 0.0]
    assert rewards == near([0.079560, 1, 0.324652, -1, -0.5, 0])
    assert np.mean(rewards) == near(-0.015965)
    assert np.std(rewards, ddof=1) == near(0.687052)
    expected = [0.139035, 1.478729, 0.495766, -1.432256, -0.704510, 0.023236]
    assert questioner_advantages(rewards, [GENERAL] * 6) == near(expected)


def test_reference_function(toys: SimpleNamespace) -> None:
    """The full check of specification 5.3: two groups, two rejected questions, one vote group."""
    config = toys.config(
        questions_per_step=2, generation_batch=4, roles={"verifier_share": 0.5}, group_size=4, votes=4
    )
    rounds = [
        toys.round("a", [1, 0, 0, 0], votes=[[1, 1, 1, 0]]),
        toys.round("b", [1, 1, 1, 0]),
        toys.round("c", fate=Fate.BAD_FORMAT),
        toys.round("d", fate=Fate.BAD_GROUND),
    ]
    batch = assemble(rounds, config, np.random.default_rng(0))
    asked = {sample.uid: sample.advantage for sample in batch.of("questioner")}
    assert asked == {
        "a": near(0.822647), "b": near(0.822647), "c": near(-1.205398), "d": near(-0.439897)
    }  # fmt: skip
    assert [sample.advantage for sample in batch.of("verifier")] == near([0.499999] * 3 + [-1.499997])
    assert [sample.advantage for sample in batch.of("responder")][:4] == near([1.499997] + [-0.499999] * 3)


def test_a_task_with_one_question_poisons_nothing() -> None:
    rewards = [0.5, 1.0, 0.0, -1.0, 0.3]
    advantages = questioner_advantages(rewards, [GENERAL] * 4 + [MATH])
    assert np.isfinite(advantages).all()
    assert advantages == near(standardized(rewards))
    assert questioner_advantages([0.7], [MATH]) == [0.0]
    assert questioner_advantages([], []) == []
    assert standardized([0.4]) == [0.0]
    assert standardized([0.4] * 8) == [0.0] * 8


def test_frequent_tasks_have_their_own_mean() -> None:
    general, math_ = [0.1 * i for i in range(8)], [5.0, -5.0]
    advantages = questioner_advantages(general + math_, [GENERAL] * 8 + [MATH] * 2)
    assert advantages[:8] == near(standardized(general))
    assert advantages[8:] == near(standardized(general + math_)[8:])


@pytest.mark.parametrize(
    ("n", "c", "k", "rate"), [(8, 3, 1, 0.375), (8, 3, 4, 0.928571), (8, 1, 8, 1), (8, 6, 4, 1), (8, 0, 4, 0)]
)
def test_pass_at_k(n: int, c: int, k: int, rate: float) -> None:
    assert pass_at_k(n, c, k) == near(rate)


@pytest.mark.parametrize(
    ("group", "accuracy", "probability"),
    [(8, 0.1, 0.4305), (8, 0.3, 0.0577), (8, 0.5, 0.0078), (4, 0.1, 0.6562), (4, 0.3, 0.2482), (4, 0.5, 0.1250)],
)
def test_no_spread(group: int, accuracy: float, probability: float) -> None:
    assert no_spread_probability(accuracy, group) == pytest.approx(probability, abs=5e-5)
    rng = np.random.default_rng(group)
    draws = rng.random((20_000, group)) < accuracy
    share = np.mean([not has_spread(rewards) for rewards in draws.astype(float).tolist()])
    assert abs(share - probability) < 3 * math.sqrt(probability * (1 - probability) / len(draws))


def test_batch_assembly(toys: SimpleNamespace) -> None:
    config = Config(text={"documents": "toy"})
    assert (config.questions_per_step, config.group_size, config.votes) == (128, 8, 8)
    votes = [[1] * 5 + [0] * 3] * 8
    rounds = [
        toys.round(f"good{i}", [1, 1, 1, 0, 0, 0, 0, 0], votes=votes, task=list(Task)[i % 3]) for i in range(140)
    ]
    rounds += [toys.round(f"zero{i}", [0] * 8, task=list(Task)[i % 3]) for i in range(60)]
    rounds += [toys.round(f"bad{i}", fate=Fate.BAD_FORMAT, task=list(Task)[i % 3]) for i in range(80)]
    rounds += [toys.round(f"cut{i}", fate=Fate.TRUNCATED) for i in range(80)]
    batch = assemble(rounds, config, np.random.default_rng(0))
    assert (batch.good, batch.surplus) == (128, 12)
    assert len(batch.of("responder")) == 1024
    asked = batch.of("questioner")
    assert [sample.uid for sample in asked[:128]] == [f"good{i}" for i in range(128)]
    assert Counter(sample.facts["status"] for sample in asked[128:]).keys() == {Fate.ZERO_VARIANCE, Fate.BAD_FORMAT}
    assert len({sample.uid for sample in asked}) == 256
    assert Counter(s.task for s in asked[128:]) == Counter(s.task for s in asked[:128])
    assert len(batch.of("verifier")) == 128
    assert len({sample.uid.rpartition("/")[0] for sample in batch.of("verifier")}) == 16
    assert len(batch.samples) == 1408


def test_deficits_pass_on_to_the_next_task() -> None:
    pools = {"rare": ["r1"], "middle": ["m1", "m2", "m3"], "frequent": [f"f{i}" for i in range(20)]}
    picked = pick_negatives(pools, {"rare": 4, "middle": 2, "frequent": 3}, np.random.default_rng(0))
    assert Counter(item[0] for item in picked) == {"r": 1, "m": 3, "f": 5}
    # What the last one lacks comes from what the others have left.
    picked = pick_negatives({"a": ["a1", "a2"], "b": ["b1", "b2", "b3"]}, {"b": 5}, np.random.default_rng(0))
    assert sorted(picked) == ["a1", "a2", "b1", "b2", "b3"]
    # A task without any rejected question passes on its whole share.
    assert len(pick_negatives({"a": ["a1", "a2"]}, {"b": 2}, np.random.default_rng(0))) == 2


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 12)),
    st.dictionaries(st.sampled_from("abcde"), st.integers(0, 12)),
    st.integers(0, 99),
)
def test_negatives_are_as_many_as_wanted(sizes: dict[str, int], wanted: dict[str, int], seed: int) -> None:
    pools = {kind: [f"{kind}{i}" for i in range(size)] for kind, size in sizes.items()}
    picked = pick_negatives(pools, wanted, np.random.default_rng(seed))
    assert len(picked) == min(sum(wanted.values()), sum(sizes.values()))
    assert len(set(picked)) == len(picked)
    for kind, size in sizes.items():
        assert sum(item[0] == kind for item in picked) >= min(size, wanted.get(kind, 0))
    assert picked == pick_negatives(pools, wanted, np.random.default_rng(seed))


@given(st.lists(st.integers(), unique=True), st.integers(-2, 12), st.integers(0, 99))
def test_pick_keeps_the_order(items: list[int], count: int, seed: int) -> None:
    picked = pick(items, count, np.random.default_rng(seed))
    assert len(picked) == max(0, min(count, len(items)))
    assert picked == [item for item in items if item in picked]


@given(REWARDS)
def test_advantages_have_no_mean_and_are_numbers(rewards: list[float]) -> None:
    advantages = standardized(rewards)
    assert np.isfinite(advantages).all()
    assert len(advantages) == len(rewards)
    assert abs(sum(advantages)) < 1e-4
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(np.asarray(advantages)[order]) >= 0).all()


@given(st.lists(st.tuples(st.floats(-1, 1), st.sampled_from(Task)), max_size=40))
def test_question_advantages_are_numbers(batch: list[tuple[float, Task]]) -> None:
    rewards, tasks = [reward for reward, _ in batch], [task for _, task in batch]
    advantages = questioner_advantages(rewards, tasks)
    assert np.isfinite(advantages).all()
    for task, count in Counter(tasks).items():
        own = [advantage for advantage, other in zip(advantages, tasks, strict=True) if other is task]
        if count >= 8 or count == len(tasks):
            assert abs(sum(own)) < 1e-4


def test_grounding_thresholds() -> None:
    thresholds = GroundingConfig().thresholds()
    rejected = {task: [answered_without_documents(task, hits, 4, thresholds) for hits in range(5)] for task in Task}
    assert rejected[GENERAL] == rejected[MATH] == [False, False, True, True, True]
    assert rejected[CHOICE] == [False, False, False, True, True]
    luck = sum(math.comb(4, hits) * 0.25**hits * 0.75 ** (4 - hits) for hits in (3, 4))
    assert luck == pytest.approx(0.051, abs=5e-4)


def test_a_threshold_that_no_count_can_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="choice_hits is 3, but there are only 2 attempts"):
        GroundingConfig(attempts=2)
    assert GroundingConfig(attempts=1, open_hits=1, choice_hits=1).thresholds()[CHOICE] == 1


def test_values_lie_on_the_completion() -> None:
    assert on_tokens(-0.5, 3, 2).tolist() == [0, 0, 0, -0.5, -0.5]
    assert on_tokens(1.0, 2, 0).tolist() == [0, 0]
