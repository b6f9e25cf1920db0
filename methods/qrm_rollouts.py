"""The policy's replies in Q-RM: sampled, judged by rule, scored token by token, turned into training rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.seeds import derive_seed
from methods.advantages import Values
from methods.qrm_config import Config
from methods.qrm_credit import Scored
from methods.qrm_data import Task, prompt_of
from methods.spell_maths import on_tokens
from protocols.messages import Completion, FinishReason, Prompt, SamplingParams
from protocols.policy import DetokenizeRequest, PolicyService, SampleRequest, ScoreRequest
from protocols.reward_model import Reply, ReplyScore, RewardModelService, RewardRequest
from protocols.tensor import Tensor
from protocols.training import TrainRow

CALL = 256
"""Replies that are scored in one call."""
TERM = "policy"


@dataclass(frozen=True)
class Cast:
    """Who plays. What a run does without is None."""

    policy: PolicyService
    rules: RewardModelService
    reward: RewardModelService | None
    critic: RewardModelService | None
    reference: PolicyService | None
    reads_tokens: bool
    """Whether the reward model has the policy's tokenizer."""
    limit: int
    """Longest prompt and reply, in the policy's tokens, that reward model and critic read whole."""

    def reads(self, rollout: "Rollout") -> bool:
        """Whether there is something to score, and not too much."""
        return len(rollout.completion.tokens) > 0 and len(rollout.tokens) <= self.limit


@dataclass(frozen=True)
class Rollout:
    """One reply of the policy."""

    uid: str
    task: Task
    prompt_tokens: Tensor
    completion: Completion
    right: bool = False

    @property
    def tokens(self) -> Tensor:
        """Prompt and reply, int32[P + T]."""
        return Tensor(np.concatenate([self.prompt_tokens.array, self.completion.tokens.array]))


async def roll_out(
    cast: Cast, tasks: Sequence[Task], n: int, params: SamplingParams, seed: int
) -> list[list[Rollout]]:
    """n replies to each task, judged by the rules."""
    prompts = [prompt_of(task.instruction, derive_seed(seed, i), task.uid) for i, task in enumerate(tasks)]
    results = (await cast.policy.sample(SampleRequest(prompts=prompts, n=n, params=params))).results
    replies = [
        Reply(
            uid=f"{task.uid}/{i}",
            prompt=prompt_of(task.instruction),
            text=completion.text,
            reference=task.reference,
        )
        for task, sampled in zip(tasks, results, strict=True)
        for i, completion in enumerate(sampled.completions)
    ]
    verdicts = iter(await scores_of(cast.rules, replies))
    return [
        [
            Rollout(f"{task.uid}/{i}", task, sampled.prompt_tokens, completion, next(verdicts).score == 1)
            for i, completion in enumerate(sampled.completions)
        ]
        for task, sampled in zip(tasks, results, strict=True)
    ]


async def scores_of(model: RewardModelService, replies: Sequence[Reply]) -> list[ReplyScore]:
    """What a reward model says of replies, in calls of bounded size."""
    scores: list[ReplyScore] = []
    for i in range(0, len(replies), CALL):
        scores += (await model.score(RewardRequest(replies=list(replies[i : i + CALL])))).scores
    return scores


def by_tokens(one: Rollout) -> Reply:
    """A rollout as a model of the policy's own vocabulary reads it."""
    return Reply(uid=one.uid, prompt=Prompt(tokens=one.prompt_tokens), tokens=one.completion.tokens)


async def as_replies(rollouts: Sequence[Rollout], policy: PolicyService, *, tokens: bool) -> list[Reply]:
    """Rollouts as a model reads them: by their tokens, or as text with the places where the policy's tokens end."""
    if tokens:
        return [by_tokens(one) for one in rollouts]
    request = DetokenizeRequest(tokens=[one.completion.tokens for one in rollouts])
    ends = (await policy.detokenize(request)).ends
    return [
        Reply(
            uid=one.uid,
            prompt=prompt_of(one.task.instruction),
            text=one.completion.text,
            ended=one.completion.finish_reason is FinishReason.STOP,
            ends=np.minimum(places.array, len(one.completion.text)),
        )
        for one, places in zip(rollouts, ends, strict=True)
    ]


async def scored(cast: Cast, rollouts: Sequence[Rollout], config: Config, exact: list[Values] | None) -> list[Scored]:
    """The rewards of rollouts, from where the run takes them."""
    if config.source == "exact":
        assert exact is not None
        return [Scored(float(one.right), credit) for one, credit in zip(rollouts, exact, strict=True)]
    if config.source == "rules":
        return [Scored(float(one.right), np.zeros(len(one.completion.tokens))) for one in rollouts]
    assert cast.reward is not None
    replies = await as_replies(rollouts, cast.policy, tokens=cast.reads_tokens)
    return [
        Scored(one.score, per_token(one), config.reward.needs_reference)
        for one in await scores_of(cast.reward, replies)
    ]


def per_token(score: ReplyScore) -> Values:
    """The scores of a reply's tokens, float64[T]."""
    assert score.tokens is not None
    return score.tokens.array.astype(np.float64)


async def values_of(critic: RewardModelService, rollouts: Sequence[Rollout]) -> list[Values]:
    """The critic's values of the states before each token, float64[T] each."""
    return [per_token(score) for score in await scores_of(critic, [by_tokens(one) for one in rollouts])]


async def logprobs_of(policy: PolicyService, rollouts: Sequence[Rollout], temperature: float) -> list[Values]:
    """Log-probs of the replies' tokens under a policy, float64[T] each."""
    request = ScoreRequest(sequences=[one.tokens for one in rollouts], temperature=temperature)
    found = (await policy.score(request)).logprobs
    pairs = zip(found, rollouts, strict=True)
    return [all_.array[len(one.prompt_tokens) :].astype(np.float64) for all_, one in pairs]


def train_rows(
    rollouts: Sequence[Rollout],
    advantages: Sequence[Values],
    reference: Sequence[Values] | None,
    *,
    ratios: bool,
) -> list[TrainRow]:
    """Training rows of the policy. `ratios`: its loss compares probabilities with those at sampling."""
    references: Sequence[Values | None] = reference or [None] * len(rollouts)
    triples = zip(rollouts, advantages, references, strict=True)
    return [_train_row(one, advantage, other, ratios) for one, advantage, other in triples]


def _train_row(one: Rollout, advantages_T: Values, reference_T: Values | None, ratios: bool) -> TrainRow:
    prompt, length = len(one.prompt_tokens), len(one.completion.tokens)
    before = np.zeros(prompt, np.float32)

    def whole(values_T: Values) -> Tensor:
        return Tensor(np.concatenate([before, values_T]), "float32")

    return TrainRow(
        row_id=one.uid,
        tokens=one.tokens,
        terms={TERM: Tensor(on_tokens(1.0, prompt, length))},
        advantages=whole(advantages_T),
        sampled_logprobs=whole(one.completion.logprobs.array) if ratios else None,
        reference_logprobs=None if reference_T is None else whole(reference_T),
    )
