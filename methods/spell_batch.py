"""From rounds to one combined update: who is trained on, with which advantage (sections 2.5 and 2.6)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from methods.spell_config import Config
from methods.spell_maths import (
    on_tokens,
    pick,
    pick_negatives,
    questioner_advantages,
    standardized,
    trains_verifier,
    verifier_rewards,
)
from methods.spell_rounds import DROPPED, Fate, Round
from protocols.losses import GRPOLoss, LossSpec
from protocols.messages import Completion
from protocols.questions import Task
from protocols.tensor import Tensor
from protocols.training import TrainRow
from protocols.verifier import Judgement

Role = Literal["questioner", "responder", "verifier"]
ROLES: tuple[Role, ...] = ("questioner", "responder", "verifier")


@dataclass
class Sample:
    """One sampled text to learn from."""

    role: Role
    uid: str
    task: Task
    prompt_tokens: Tensor
    completion: Completion
    reward: float
    advantage: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Batch:
    """What one update learns from."""

    samples: list[Sample]
    good: int
    surplus: int

    def of(self, role: Role) -> list[Sample]:
        """The samples of one role."""
        return [sample for sample in self.samples if sample.role == role]

    def counts(self) -> dict[tuple[Role, Task], int]:
        """Samples per role and task."""
        return Counter((sample.role, sample.task) for sample in self.samples)


def assemble(rounds: Sequence[Round], config: Config, rng: np.random.Generator) -> Batch:
    """Choose and weigh the samples of one update."""
    good = [round_ for round_ in rounds if round_.fate is Fate.GOOD]
    kept = good[: config.questions_per_step]
    samples: list[Sample] = []
    if config.roles.responder:
        samples += [sample for round_ in kept for sample in responder_samples(round_, config)]
    if config.proposals == "questioner":
        if config.roles.questioner:
            samples += questioner_samples(kept, rounds, config, rng)
        if config.roles.verifier:
            samples += verifier_samples(rounds, len(kept), config, rng)
    return Batch(samples, len(kept), len(good) - len(kept))


def responder_samples(round_: Round, config: Config) -> list[Sample]:
    """All G answers of a question; advantages within the group.

    A reward model's scores have a scale of their own, so they count as they stand within the group.
    """
    assert round_.answers is not None
    rewards = round_.rewards
    if round_.scores:
        weight, scores = config.rewards.model_weight, standardized(round_.scores)
        rewards = [reward + weight * score for reward, score in zip(rewards, scores, strict=True)]
    advantages = standardized(rewards)
    return [
        Sample(
            "responder",
            judgement.uid,
            round_.proposal.task,
            round_.answers.prompt_tokens,
            completion,
            reward,
            advantage,
            _answer_facts(round_, judgement),
        )
        for completion, reward, advantage, judgement in zip(
            round_.answers.completions, round_.rewards, advantages, round_.judgements, strict=True
        )
    ]


def questioner_samples(
    kept: Sequence[Round], rounds: Sequence[Round], config: Config, rng: np.random.Generator
) -> list[Sample]:
    """The questions behind the groups, and as many rejected ones, task by task."""
    rejected: dict[Task, list[Round]] = defaultdict(list)
    for round_ in rounds:
        if round_.fate is not Fate.GOOD and round_.fate not in DROPPED:
            rejected[round_.proposal.task].append(round_)
    ratio = config.roles.negatives_ratio
    wanted = {task: round(count * ratio) for task, count in Counter(r.proposal.task for r in kept).items()}
    chosen = [*kept, *pick_negatives(rejected, wanted, rng)]
    rewards = [round_.questioner_reward(config) for round_ in chosen]
    advantages = questioner_advantages(rewards, [round_.proposal.task for round_ in chosen])
    return [
        questioner_sample(round_, reward, advantage)
        for round_, reward, advantage in zip(chosen, rewards, advantages, strict=True)
    ]


def questioner_sample(round_: Round, reward: float, advantage: float) -> Sample:
    """A question as its writer is to learn from it. It must have been written."""
    proposal = round_.proposal
    assert proposal.prompt_tokens is not None and proposal.completion is not None
    facts = {
        **_facts(round_),
        "status": round_.fate,
        "reason": proposal.reason,
        "probe_hits": round_.probe_hits,
        "accuracy": round_.accuracy,
    }
    return Sample(
        "questioner",
        proposal.uid,
        proposal.task,
        proposal.prompt_tokens,
        proposal.completion,
        reward,
        advantage,
        facts,
    )


def verifier_samples(rounds: Sequence[Round], good: int, config: Config, rng: np.random.Generator) -> list[Sample]:
    """Some vote groups whose majority agrees with the rule; none if there are too few."""
    groups = [
        (round_, judgement)
        for round_ in rounds
        for judgement in round_.judgements
        if trains_verifier(judgement.majority, judgement.agree_share, judgement.rule_score, config.roles.agree_bounds)
    ]
    # The small term keeps a product such as 9.999999999999998 from losing a group.
    count = int(good * config.group_size * config.roles.verifier_share / config.votes + 1e-9)
    if len(groups) < count:
        return []
    return [sample for group in pick(groups, count, rng) for sample in _vote_samples(*group)]


def _vote_samples(round_: Round, judgement: Judgement) -> list[Sample]:
    assert judgement.majority is not None and judgement.prompt_tokens is not None
    rewards = verifier_rewards(judgement.votes, judgement.majority)
    facts = _answer_facts(round_, judgement)
    return [
        Sample(
            "verifier",
            f"{judgement.uid}/{j}",
            round_.proposal.task,
            judgement.prompt_tokens,
            completion,
            reward,
            advantage,
            {**facts, "llm_score": vote},
        )
        for j, (completion, reward, advantage, vote) in enumerate(
            zip(judgement.completions, rewards, standardized(rewards), judgement.votes, strict=True)
        )
    ]


def _facts(round_: Round) -> dict[str, Any]:
    """What is known of a question, under the reference's names where it has one."""
    proposal = round_.proposal
    return {
        "question_id": proposal.question_id,
        "data_source": round_.cluster.data_source,
        "evidence": proposal.evidence,
        "question": proposal.question,
        "options": proposal.options or None,
        "reference": proposal.answer,
        "reward_model": {"style": "rule", "ground_truth": proposal.answer},
    }


def _answer_facts(round_: Round, judgement: Judgement) -> dict[str, Any]:
    return {
        **_facts(round_),
        "pred": judgement.parsed,
        "rule_score": judgement.rule_score,
        "llm_score": judgement.majority,
        "self_verification": judgement.votes,
    }


def train_rows(samples: Iterable[Sample], *, per_role: bool, ratios: bool = False) -> list[TrainRow]:
    """Training rows: the advantage of a sample on each of its sampled tokens; none for one without tokens.

    `ratios`: the loss weighs each token by its probability now over that with which it was sampled.
    """
    return [
        _train_row(sample, sample.role if per_role else "policy", ratios)
        for sample in samples
        if len(sample.completion.tokens)
    ]


def _train_row(sample: Sample, term: str, ratios: bool) -> TrainRow:
    prompt, completion = sample.prompt_tokens.array, sample.completion.tokens.array
    lengths = len(prompt), len(completion)
    sampled = np.concatenate([np.zeros(len(prompt), np.float32), sample.completion.logprobs.array])
    return TrainRow(
        row_id=f"{sample.role}/{sample.uid}",
        tokens=Tensor(np.concatenate([prompt, completion])),
        terms={term: Tensor(on_tokens(1.0, *lengths))},
        advantages=Tensor(on_tokens(sample.advantage, *lengths)),
        sampled_logprobs=Tensor(sampled) if ratios else None,
        versions=Tensor(np.concatenate([np.full(len(prompt), -1, np.int32), sample.completion.versions.array])),
    )


def loss_terms(config: Config) -> dict[str, LossSpec]:
    """One token mean over all roles, or a mean per role with its weight."""
    weights = config.roles.weights
    if weights is None:
        return {"policy": config.loss}
    return {role: _weighted(config.loss, weights.get(role, 0.0)) for role in ROLES}


def _weighted(loss: GRPOLoss, weight: float) -> GRPOLoss:
    return loss.model_copy(update={"coef": loss.coef * weight})


def dump_row(sample: Sample, prompt_text: str) -> dict[str, Any]:
    """A row of samples.jsonl, named as in the reference's rollout dump. `entropy` is its sampled estimate."""
    logprobs = sample.completion.logprobs.array
    return {
        **dict.fromkeys(("rule_score", "llm_score", "pred", "self_verification")),
        "role": sample.role,
        "uid": sample.uid,
        "task": sample.task,
        "input": prompt_text,
        "output": sample.completion.text,
        "reward": sample.reward,
        "advantage": round(sample.advantage, 6),
        "score": sample.reward,
        "entropy": round(-float(logprobs.mean()), 6) if logprobs.size else None,
        "finish_reason": sample.completion.finish_reason,
        **sample.facts,
    }
