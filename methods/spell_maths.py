"""SPELL's formulas: rewards, advantages, and the choice of what is trained on. Pure functions."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from protocols.questions import Task

Shape = Literal["gaussian", "reverse", "rzero"]
Combine = Literal["max", "mean", "min", "sum"]
EPSILON = 1e-6
LEAST_SPREAD = 1e-8
# Below this many samples of a task its own mean and spread say too little (the reference code used them
# down to one sample, whose spread is NaN, and lost the whole update).
LEAST_PER_TASK = 8

Item = TypeVar("Item")
Kind = TypeVar("Kind", bound=Hashable)


def questioner_reward(accuracy: float, shape: Shape = "gaussian", mu: float = 0.5, sigma: float = 0.5 / 3) -> float:
    """Reward of a question by the share of right answers to it (SPELL eq. 7): highest at the frontier.

    0 if nobody or everybody answered it. `reverse` and `rzero` are the reference code's alternatives.
    """
    if not 0 < accuracy < 1:
        return 0.0
    if shape == "reverse":
        return 1 - accuracy
    if shape == "rzero":
        return 1 - 2 * abs(accuracy - 0.5)
    return math.exp(-((accuracy - mu) ** 2) / (2 * sigma**2))


def responder_reward(rule: float, vote: float | None, combine: Combine = "max") -> float:
    """Reward of an answer from the rule and the majority vote (SPELL eq. 6); without a vote, the rule's."""
    if vote is None:
        return rule
    if combine == "max":
        return max(rule, vote)
    if combine == "min":
        return min(rule, vote)
    return (rule + vote) / (2 if combine == "mean" else 1)


def vote_value(majority: int | None) -> float:
    """The majority as a reward: a tie counts as no (SPELL eq. 4)."""
    return float(majority == 1)


def verifier_rewards(votes: Sequence[int], majority: int) -> list[float]:
    """Reward of each vote: 1 with the majority, 0 against it (SPELL eq. 5), -1 if unreadable."""
    return [-1.0 if vote < 0 else float(vote == majority) for vote in votes]


def trains_verifier(
    majority: int | None, agree_share: float | None, rule: float, bounds: tuple[float, float] = (0.51, 0.99)
) -> bool:
    """Whether a vote group teaches: its majority agrees with the rule, and it is neither tied nor unanimous."""
    if majority is None or agree_share is None or majority != rule:
        return False
    return bounds[0] <= agree_share <= bounds[1]


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether a group of rewards carries a gradient."""
    return max(rewards) - min(rewards) > LEAST_SPREAD


def standardized(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-6), std with n - 1 (SPELL eq. 8); all 0 if there is no spread to divide by."""
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) < 2 or values.std(ddof=1) < LEAST_SPREAD:
        return [0.0] * len(values)
    return [float(a) for a in (values - values.mean()) / (values.std(ddof=1) + EPSILON)]


def questioner_advantages(rewards: Sequence[float], tasks: Sequence[Task]) -> list[float]:
    """Advantages of questions: standardised within their task, or over the batch if the task is too rare."""
    counts = Counter(tasks)
    over_batch = standardized(rewards)
    result = list(over_batch)
    for task, count in counts.items():
        if count >= LEAST_PER_TASK:
            of_task = [i for i, other in enumerate(tasks) if other == task]
            for i, advantage in zip(of_task, standardized([rewards[i] for i in of_task]), strict=True):
                result[i] = advantage
    return result


def answered_without_documents(task: Task, hits: int, attempts: int, thresholds: Mapping[Task, int]) -> bool:
    """Whether a question is answered too often without its documents to be chance.

    With 4 attempts at four options, 3 hits happen by luck to 5.1 % of good questions; a single attempt, as
    in the reference code, would throw away a quarter of them.
    """
    return attempts > 0 and hits >= thresholds[task]


def pick_negatives(
    pools: Mapping[Kind, Sequence[Item]], wanted: Mapping[Kind, int], rng: np.random.Generator
) -> list[Item]:
    """Draw the wanted number from each pool, rarest pool first; what one lacks, the next ones make up for."""
    picked: list[Item] = []
    spare: list[Item] = []
    owed = 0
    for kind in sorted(pools, key=lambda kind: (len(pools[kind]), str(kind))):
        share = wanted.get(kind, 0) + owed
        taken, left = _draw(pools[kind], share, rng)
        owed = share - len(taken)
        picked.extend(taken)
        spare.extend(left)
    owed = sum(wanted.values()) - len(picked)
    return picked + _draw(spare, owed, rng)[0]


def pick(items: Sequence[Item], count: int, rng: np.random.Generator) -> list[Item]:
    """Draw `count` items, in their order; all if there are fewer."""
    return _draw(items, count, rng)[0]


def _draw(items: Sequence[Item], count: int, rng: np.random.Generator) -> tuple[list[Item], list[Item]]:
    chosen = set(rng.permutation(len(items))[: max(0, count)].tolist())
    taken = [item for i, item in enumerate(items) if i in chosen]
    return taken, [item for i, item in enumerate(items) if i not in chosen]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased pass@k of n samples with some correct: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def no_spread_probability(accuracy: float, group: int) -> float:
    """Probability that a group of independent answers is all right or all wrong."""
    return accuracy**group + (1 - accuracy) ** group


def on_tokens(value: float, prompt: int, completion: int) -> NDArray[np.float32]:
    """A per-token array that is `value` on the completion and 0 on the prompt, float32[T]."""
    return np.concatenate([np.zeros(prompt, np.float32), np.full(completion, value, np.float32)])
