"""Tests of Q-RM: does the reward model rank pairs and place credit, does the policy become right, does it cheat?"""

from collections.abc import Sequence

import numpy as np

from cluster.seeds import derive_seed
from cluster.steps import LoopState
from methods.qrm_config import Config
from methods.qrm_data import Pair, Span
from methods.qrm_measures import (
    auc,
    best_of_n,
    bootstrap,
    drift_alarm,
    first_error_auc,
    pairwise_accuracy,
    pass_at_k_interval,
)
from methods.qrm_rollouts import Cast, Rollout, as_replies, per_token, roll_out, scores_of
from methods.qrm_world import World
from protocols.reward_model import ReplyScore

TASKS_PER_CALL = 256


class History(LoopState):
    """What past tests of the policy said."""

    accuracies: list[float] = []
    """Pass@1 of each."""
    score_means: list[float] = []
    """Mean score of the replies in each."""
    score_errors: list[float] = []
    """Standard errors of these means."""
    alarm: int = -1
    """Step of the first alarm; -1: none yet."""


async def test_reward(cast: Cast, world: World, config: Config) -> dict[str, float]:
    """Held-out pairs ranked right, with the 95 % interval; places known to be right above wrong ones; credit."""
    assert cast.reward is not None
    metrics: dict[str, float] = {}
    if world.test_pairs:
        preferences = [pair.preference() for pair in world.test_pairs]
        replies = [reply for one in preferences for reply in (one.chosen, one.rejected)]
        scores = await scores_of(cast.reward, replies)
        better, worse = scores[::2], scores[1::2]
        share, low, high = pairwise_accuracy([one.score for one in better], [one.score for one in worse])
        metrics |= {"eval/pairs": share, "eval/pairs_low": low, "eval/pairs_high": high}
        metrics |= span_metrics(world.test_pairs, better, worse, config.seed)
    if world.chain is not None:
        metrics |= await credit_metrics(cast, world, config)
    return metrics


def span_metrics(
    pairs: Sequence[Pair], better: Sequence[ReplyScore], worse: Sequence[ReplyScore], seed: int
) -> dict[str, float]:
    """How well token scores tell right places of replies from wrong ones (AUC, bootstrap over pairs)."""
    groups = []
    for pair, one, other in zip(pairs, better, worse, strict=True):
        found = [
            (span.right, span_mean(score, span))
            for score, spans in ((one, pair.spans_chosen), (other, pair.spans_rejected))
            for span in spans
        ]
        groups.append([(right, mean) for right, mean in found if np.isfinite(mean)])

    def over(chosen: Sequence[list[tuple[bool, float]]]) -> float:
        sides = ([mean for group in chosen for right, mean in group if right == wanted] for wanted in (True, False))
        return auc(*sides)

    value = over(groups)
    if not np.isfinite(value):
        return {}
    low, high = bootstrap(groups, over, np.random.default_rng(derive_seed(seed, "bootstrap")))
    wrong = sum(not right for group in groups for right, _ in group)
    return {"eval/spans": value, "eval/spans_low": low, "eval/spans_high": high, "eval/spans_wrong": wrong}


def span_mean(score: ReplyScore, span: Span) -> float:
    """Mean score of the tokens that lie in a span at least in part; NaN if it was cut off."""
    assert score.tokens is not None and score.ends is not None
    ends = score.ends.array
    starts = np.concatenate([[0], ends[:-1]])
    inside = (starts < span.end) & (ends > span.start)
    return float(score.tokens.array[inside].mean()) if inside.any() else float("nan")


async def credit_metrics(cast: Cast, world: World, config: Config) -> dict[str, float]:
    """First-error AUC on fresh replies of the policy: right decisive tokens, before any error, above first errors."""
    assert cast.reward is not None and world.chain is not None
    groups = await _replies(cast, world, config, 1, "credit")
    rollouts = [one for group in groups for one in group if cast.reads(one)]
    scores = await scores_of(cast.reward, await as_replies(rollouts, cast.policy, tokens=cast.reads_tokens))
    texts = [(one.task.instruction, one.completion) for one in rollouts]
    credits = [world.chain.decisive_credit(prompt, done.text, len(done.tokens)) for prompt, done in texts]
    right, wrong = (
        [s.score for s, one in zip(scores, rollouts, strict=True) if one.right == w] for w in (True, False)
    )
    return {
        "eval/first_error_auc": first_error_auc(credits, [per_token(score) for score in scores]),
        "eval/reply_auc": auc(right, wrong),
    }


async def _replies(cast: Cast, world: World, config: Config, n: int, name: str) -> list[list[Rollout]]:
    groups: list[list[Rollout]] = []
    for i in range(0, len(world.test_tasks), TASKS_PER_CALL):
        seed = derive_seed(config.seed, name, i)
        groups += await roll_out(cast, world.test_tasks[i : i + TASKS_PER_CALL], n, config.sampling, seed)
    return groups


async def test_policy(cast: Cast, world: World, config: Config) -> dict[str, float]:
    """Pass@1, Pass@k and best-of-n on held-out prompts, and the scores of these replies."""
    n = config.test_samples
    groups = await _replies(cast, world, config, n, "test")
    right = [sum(one.right for one in group) for group in groups]
    rng = np.random.default_rng(derive_seed(config.seed, "bootstrap"))
    metrics: dict[str, float] = {}
    for k in sorted({1, *(2**i for i in range(1, n.bit_length())), n}):
        mean, low, high = pass_at_k_interval(right, n, k, rng)
        metrics |= {f"eval/pass_at_{k}": mean, f"eval/pass_at_{k}_low": low, f"eval/pass_at_{k}_high": high}
    rollouts = [one for group in groups for one in group]
    metrics["eval/reply_tokens"] = float(np.mean([len(one.completion.tokens) for one in rollouts]))
    if cast.reward is not None:
        read = [one for one in rollouts if cast.reads(one)]
        found = await scores_of(cast.reward, await as_replies(read, cast.policy, tokens=cast.reads_tokens))
        by_uid = {one.uid: score.score for one, score in zip(read, found, strict=True)}
        if found:
            metrics |= score_metrics(read, found, config)
        if n > 1:
            verdicts = [[one.right for one in group] for group in groups]
            # What cannot be read is never the best.
            ranked = [[by_uid.get(one.uid, -np.inf) for one in group] for group in groups]
            metrics[f"eval/best_of_{n}"] = best_of_n(ranked, verdicts, n)
    return metrics


def score_metrics(rollouts: Sequence[Rollout], scores: Sequence[ReplyScore], config: Config) -> dict[str, float]:
    """Scores of replies in what the policy is driven to raise, the mean over tokens if each token has its own credit;
    and whether they still tell right replies from wrong ones."""
    own = config.credit == "own"
    values = np.array([per_token(one).mean() if own else one.score for one in scores])
    right = np.array([one.right for one in rollouts])
    return {
        "score/mean": float(values.mean()),
        "score/std": float(values.std()),
        "score/standard_error": float(values.std() / np.sqrt(len(values))),
        "score/auc": auc(list(values[right]), list(values[~right])),
    }


def watched(history: History, metrics: dict[str, float], step: int, config: Config) -> dict[str, float]:
    """The drift alarm after one more test; it stays on once it has rung."""
    if "score/mean" not in metrics:
        return {}
    history.accuracies = [*history.accuracies, metrics["eval/pass_at_1"]]
    history.score_means = [*history.score_means, metrics["score/mean"]]
    history.score_errors = [*history.score_errors, metrics["score/standard_error"]]
    told = drift_alarm(history.accuracies, history.score_means, history.score_errors, config.drift.fall)
    if told and history.alarm < 0:
        history.alarm = step
    return {"drift/alarm": float(history.alarm >= 0), "drift/best": max(history.accuracies)}
