"""One question on its way through SPELL's stages: propose, probe, answer, verify (section 2.2, steps 2 to 6)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from cluster.seeds import derive_seed
from methods.spell_config import Config
from methods.spell_maths import (
    answered_without_documents,
    has_spread,
    questioner_reward,
    responder_reward,
    vote_value,
)
from protocols.errors import BadInput
from protocols.messages import ChatMessage, FinishReason, Prompt
from protocols.policy import PolicyService, Sampled, SampleRequest, TokenizeRequest
from protocols.prompts import response_prompt
from protocols.questioner import ProposeRequest, QuestionerService
from protocols.questions import Cluster, GoldQuestion, Proposal, ProposalStatus, Task
from protocols.reward_model import Reply, RewardModelService, RewardRequest
from protocols.verifier import JudgeItem, Judgement, JudgeRequest, VerifierService


class Fate(StrEnum):
    """What became of a question in the end."""

    GOOD = "good"
    ZERO_VARIANCE = "zero_variance"
    BAD_GROUND = "bad_ground"
    BAD_FORMAT = "bad_format"
    BAD_ANSWER = "bad_answer"
    TRUNCATED = "truncated"
    DUPLICATE = "duplicate"
    UNSUPPORTED = "unsupported"
    OVERLONG = "overlong"


# Fates that a questioner is not judged by: neither good nor its fault.
DROPPED = frozenset({Fate.BAD_ANSWER, Fate.TRUNCATED, Fate.OVERLONG})


@dataclass(frozen=True)
class Cast:
    """Who plays. The first three use the same weights."""

    policy: PolicyService
    questioner: QuestionerService
    verifier: VerifierService
    reward_model: RewardModelService | None = None
    """Says how good an answer is beside the verifier, if there is one."""
    reads_tokens: bool = False
    """Whether the reward model has the policy's tokenizer."""


@dataclass
class Round:
    """A question and everything that was sampled for it."""

    cluster: Cluster
    proposal: Proposal
    fate: Fate | None = None
    probe_hits: int = 0
    probe_tokens: int = 0
    answers: Sampled | None = None
    judgements: list[Judgement] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Of the answers, by the reward model; empty without one."""

    @property
    def accuracy(self) -> float:
        """Mean responder reward; 0 if the question was not answered."""
        return float(np.mean(self.rewards)) if self.rewards else 0.0

    def sampled_tokens(self) -> int:
        """Tokens sampled for it, in all roles."""
        own = [self.proposal.completion] if self.proposal.completion else []
        answers = self.answers.completions if self.answers else []
        votes = [completion for judgement in self.judgements for completion in judgement.completions]
        return self.probe_tokens + sum(len(completion.tokens) for completion in [*own, *answers, *votes])

    def questioner_reward(self, config: Config) -> float:
        """Reward of the question (section 2.4)."""
        rewards = config.rewards
        if self.fate is Fate.BAD_FORMAT:
            return rewards.bad_format
        if self.fate in (Fate.BAD_GROUND, Fate.UNSUPPORTED):
            return rewards.ungrounded
        if self.fate is not Fate.GOOD:
            return 0.0
        return questioner_reward(self.accuracy, rewards.shape, rewards.mu, rewards.sigma)


async def propose(
    cast: Cast, config: Config, clusters: Sequence[Cluster], uids: list[str], seed: int, documents: int
) -> list[Round]:
    """Let the questioner write one question per cluster."""
    request = ProposeRequest(
        clusters=list(clusters),
        uids=uids,
        seed=seed,
        documents=documents,
        params=config.question_sampling,
    )
    proposals = (await cast.questioner.propose(request)).proposals
    return [
        Round(cluster, proposal, None if proposal.status is ProposalStatus.OK else Fate(proposal.status.value))
        for cluster, proposal in zip(clusters, proposals, strict=True)
    ]


def given(cluster: Cluster, gold: GoldQuestion, uid: str) -> Round:
    """A round over a question with a true answer, which nobody had to propose."""
    everything = list(range(len(cluster.paragraphs)))
    proposal = Proposal(
        uid=uid,
        question_id=cluster.question_id,
        task=gold.task,
        evidence=everything,
        fresh=everything,
        status=ProposalStatus.OK,
        question=gold.question,
        options=gold.options,
        answer=gold.answer,
    )
    return Round(cluster, proposal)


async def play(cast: Cast, config: Config, rounds: list[Round], seed: int) -> list[Round]:
    """Take questions through grounding filter, answers and verification."""
    if config.grounding.enabled and config.proposals == "questioner":
        await _probe(cast, config, _open(rounds), seed)
    await _answer(cast, config, _open(rounds), seed)
    await _verify(cast, config, _open(rounds), seed)
    return rounds


def _open(rounds: Sequence[Round]) -> list[Round]:
    return [round_ for round_ in rounds if round_.fate is None]


async def _probe(cast: Cast, config: Config, rounds: list[Round], seed: int) -> None:
    """Ask without the documents; a question that is answered then too often is not grounded in them."""
    if not rounds:
        return
    attempts = config.grounding.attempts
    prompts = [
        Prompt(
            messages=[ChatMessage(role="user", content=response_prompt(None, round_.proposal.as_question()))],
            seed=derive_seed(seed, "probe", round_.proposal.uid),
            uid=round_.proposal.uid,
        )
        for round_ in rounds
    ]
    request = SampleRequest(prompts=prompts, n=attempts, params=config.answer_sampling)
    sampled = (await cast.policy.sample(request)).results
    judged = await _judge(cast, rounds, sampled, config, votes=0, seed=seed)
    for round_, group, judgements in zip(rounds, sampled, judged, strict=True):
        round_.probe_tokens = sum(len(completion.tokens) for completion in group.completions)
        round_.probe_hits = sum(judgement.rule_score >= 1 for judgement in judgements)
        if answered_without_documents(
            round_.proposal.task, round_.probe_hits, attempts, config.grounding.thresholds()
        ):
            round_.fate = Fate.BAD_GROUND


async def _answer(cast: Cast, config: Config, rounds: list[Round], seed: int) -> None:
    """Ask over ALL documents of the cluster, G times; prompts over the limit are left out and counted."""
    prompts = []
    for round_ in rounds:
        text = response_prompt(round_.cluster.paragraphs, round_.proposal.as_question())
        message = ChatMessage(role="user", content=text)
        uid = round_.proposal.uid
        prompts.append(Prompt(messages=[message], seed=derive_seed(seed, "answer", uid), uid=uid))
    lengths = await _lengths(cast.policy, prompts)
    for round_, length in zip(rounds, lengths, strict=True):
        if length > config.max_input_tokens:
            round_.fate = Fate.OVERLONG
    fitting = [(r, p) for r, p in zip(rounds, prompts, strict=True) if r.fate is None]
    if not fitting:
        return
    request = SampleRequest(
        prompts=[prompt for _, prompt in fitting], n=config.group_size, params=config.answer_sampling
    )
    results = (await cast.policy.sample(request)).results
    for (round_, _), sampled in zip(fitting, results, strict=True):
        round_.answers = sampled


async def _lengths(policy: PolicyService, prompts: list[Prompt]) -> list[int]:
    if not prompts:
        return []
    return [len(tokens) for tokens in (await policy.tokenize(TokenizeRequest(prompts=prompts))).tokens]


async def _verify(cast: Cast, config: Config, rounds: list[Round], seed: int) -> None:
    """Judge every answer by the rule and by votes; reward it; see whether the group teaches anything."""
    votes = config.votes if config.proposals == "questioner" else 0
    answers = [round_.answers for round_ in rounds if round_.answers is not None]
    judged = await _judge(cast, rounds, answers, config, votes=votes, seed=seed)
    for round_, judgements in zip(rounds, judged, strict=True):
        round_.judgements = judgements
        round_.rewards = [answer_reward(judgement, config) for judgement in judgements]
        round_.fate = Fate.GOOD if has_spread(round_.rewards) else Fate.ZERO_VARIANCE
    if cast.reward_model is not None:
        await _score(cast, cast.reward_model, [round_ for round_ in rounds if round_.fate is Fate.GOOD])


async def _score(cast: Cast, reward_model: RewardModelService, rounds: list[Round]) -> None:
    """Let the reward model score the answers to learn from."""
    replies = [reply for round_ in rounds for reply in _replies(round_, cast.reads_tokens)]
    if not replies:
        return
    scores = iter((await reward_model.score(RewardRequest(replies=replies))).scores)
    for round_ in rounds:
        round_.scores = [next(scores).score for _ in round_.rewards]


def _replies(round_: Round, reads_tokens: bool) -> Iterator[Reply]:
    """The answers as a reward model reads them: by the policy's tokens, if it knows them."""
    assert round_.answers is not None
    text = response_prompt(round_.cluster.paragraphs, round_.proposal.as_question())
    prompt = Prompt(messages=[ChatMessage(role="user", content=text)])
    if reads_tokens:
        prompt = Prompt(tokens=round_.answers.prompt_tokens)
    for i, completion in enumerate(round_.answers.completions):
        yield Reply(
            uid=f"{round_.proposal.uid}/{i}",
            prompt=prompt,
            tokens=completion.tokens if reads_tokens else None,
            text=completion.text,
            ended=completion.finish_reason is FinishReason.STOP,
            reference=round_.proposal.answer,
        )


async def _judge(
    cast: Cast, rounds: list[Round], sampled: list[Sampled], config: Config, *, votes: int, seed: int
) -> list[list[Judgement]]:
    """Judgements of each round's completions, in one call."""
    items = [
        JudgeItem(
            uid=f"{round_.proposal.uid}/{i}",
            question=round_.proposal.as_question(),
            reply=completion.text,
            reference=round_.proposal.answer,
            seed=derive_seed(seed, "vote", round_.proposal.uid, i),
        )
        for round_, group in zip(rounds, sampled, strict=True)
        for i, completion in enumerate(group.completions)
    ]
    if not items:
        return []
    request = JudgeRequest(items=items, votes=votes, params=config.vote_sampling)
    judgements = (await cast.verifier.judge(request)).judgements
    size = len(items) // len(rounds)
    return [judgements[i : i + size] for i in range(0, len(judgements), size)]


def answer_reward(judgement: Judgement, config: Config) -> float:
    """Reward of an answer, between 0 and 1 (section 2.4)."""
    if config.verifier.mode != "both":
        return judgement.score
    vote = vote_value(judgement.majority) if judgement.votes else None
    reward = responder_reward(judgement.rule_score, vote, config.rewards.combine)
    # The reference code's `sum` reaches 2; accuracies and the questioner's reward need a share.
    return reward / 2 if config.rewards.combine == "sum" else reward


class ClusterSource:
    """Deals out clusters: tasks by weight, each task's clusters in a fresh random order every epoch.

    Raises BadInput if no cluster serves a task with a weight.
    """

    def __init__(
        self, clusters: Sequence[Cluster], weights: dict[Task, float], seed: int, drawn: dict[str, int]
    ) -> None:
        by_task = {task: [c for c in clusters if c.task is task] for task in Task if weights.get(task, 0.0) > 0}
        self._by_task = {task: own for task, own in by_task.items() if own}
        if not self._by_task:
            served = ", ".join(sorted({cluster.task for cluster in clusters})) or "no task"
            raise BadInput(f"task_weights: the clusters to learn from serve {served}, which has no weight")
        self._weights = weights
        self._seed = seed
        # Shared with the loop's state, so that a continued run goes on where it was.
        self._drawn = drawn

    def draw(self, count: int, busy: set[str]) -> list[Cluster]:
        """The next clusters, up to `count`.

        A cluster that is busy is waited for, since its memory is in use; meanwhile the other tasks go on, and
        its own catches up later.
        """
        dealt: list[Cluster] = []
        taken, ready = set(busy), set(self._by_task)
        while len(dealt) < count and ready:
            task = min(ready, key=lambda t: ((self._drawn.get(t, 0) + 1) / self._weights[t], t))
            cluster = self._next(task)
            if cluster.question_id in taken:
                ready.remove(task)
                continue
            dealt.append(cluster)
            taken.add(cluster.question_id)
            self._drawn[task] = self._drawn.get(task, 0) + 1
        return dealt

    def _next(self, task: Task) -> Cluster:
        clusters = self._by_task[task]
        epoch, place = divmod(self._drawn.get(task, 0), len(clusters))
        order = np.random.default_rng(derive_seed(self._seed, "epoch", task, epoch)).permutation(len(clusters))
        return clusters[int(order[place])]
