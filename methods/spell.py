"""SPELL: self-play reinforcement learning on unlabelled documents (arXiv 2509.23863).

One policy plays three roles. The questioner writes a question with a reference answer from some documents of a
cluster; the responder answers it from all of them, several times; the verifier votes on whether answer and
reference mean the same. All three learn from one combined update. Where this differs from the
paper and its reference code is in docs/methods/spell.md.
"""

import hashlib
import random
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np

from cluster.cluster import Cluster
from cluster.pipeline import in_order
from cluster.steps import LoopState, Step
from methods.spell_audit import Examiner, Judge, fallen, gate
from methods.spell_batch import Batch, assemble, loss_terms, train_rows
from methods.spell_config import Config, fitted, preset
from methods.spell_report import log_rounds, log_samples, summary
from methods.spell_rounds import Cast, ClusterSource, Fate, Round, given, play, propose
from methods.worlds.ledger import LedgerWorld
from methods.worlds.ledger_base import ledger_base
from methods.worlds.text import TextWorld
from methods.worlds.world import World
from protocols.errors import BadInput, Stale
from protocols.model import ModelConfig
from protocols.policy import PolicyConfig, PolicyService, ScoreRequest
from protocols.questioner import RememberRequest
from protocols.questions import Cluster as DocumentCluster
from protocols.questions import GoldQuestion
from protocols.service import Empty
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow

__all__ = ["HEADLINE", "Config", "preset", "run"]

HEADLINE = ("reward/responder", "eval/gold")
KEEP_RATE_WINDOW = 5


class Cursor(LoopState):
    """What self-play carries from step to step beside the history memory."""

    drawn: dict[str, int] = {}
    """Clusters dealt out so far, by task."""
    keep_rates: list[tuple[int, int]] = []
    """Questions asked and questions good, of the last steps."""


class State(LoopState):
    """What the loop carries from step to step beside weights."""

    rollout: Cursor = Cursor()
    """Where self-play stands."""
    documents: str = ""
    """Digest of the clusters, so that a run is not continued over other texts."""
    extra_documents: int = 0
    """How much m was raised because steps starved."""
    best_gold: float = 0.0
    """Best gold accuracy of any evaluation."""
    falls: int = 0
    """Evaluations in a row clearly below it."""


async def run(cluster: Cluster, config: Config) -> None:
    """Train a policy by self-play."""
    world = make_world(config)
    gold = given_questions(world, config)
    cluster_source(world, gold, config, {})  # What it has to say against the input should not wait for step 1.
    policy, config = await make_policy(cluster, config)
    config = fitted(config, (await policy.info(Empty())).context_length)
    cast, reference, judge = await make_cast(cluster, config, policy)
    examiner = Examiner(cast, world, config, judge)
    state = State()
    digest = documents_digest(world)

    async def rollouts(step: Step, cursor: Cursor) -> list[Round]:
        check_same_documents(state, digest)
        documents = config.questioner.documents + state.extra_documents
        return await self_play(step, cast, world, gold, config, documents, cursor) if step.index else []

    async for step, rounds in cluster.overlapped(state, rollouts, staleness=config.staleness, first=0):
        if step.index > 0:
            batch = assemble(rounds, config, step.rng("batch"))
            starved = batch.good < config.starved_share * config.questions_per_step
            if starved:
                state.extra_documents += 1
            else:
                step.log(await learn(cast.policy, reference, batch, config, step))
            log_rounds(step, rounds, batch, starved, world)
            await log_samples(step, rounds, batch, config, cast.policy)

        if step.index % config.test_every == 0 or step.index == config.steps:
            step.activity("evaluating")
            metrics = await examiner.examine(step.index, config.questioner.documents + state.extra_documents)
            step.log(metrics)
            reason = gate(metrics, config) if step.index == 0 else ""
            if "eval/gold" in metrics:
                state.best_gold, state.falls, fall = fallen(
                    metrics["eval/gold"], state.best_gold, state.falls, config.audit
                )
                reason = reason or fall
            if reason and config.audit.enforce:
                step.stop(reason)

    cluster.summarize(summary(cluster.metrics(), world, config, cluster.finished()))


def make_world(config: Config) -> World:
    """The documents and what is known about them."""
    if config.world == "ledger":
        return LedgerWorld(config.seed, config.ledger.training_clusters, config.ledger.heldout_clusters)
    return TextWorld(config.text, config.seed)


def documents_digest(world: World) -> str:
    """Names the texts that a run learns from."""
    digest = hashlib.sha256()
    for cluster in world.training:
        digest.update(cluster.model_dump_json().encode())
    return digest.hexdigest()


def check_same_documents(state: State, digest: str) -> None:
    """Raise BadInput if the run was begun over other texts than those that are there now."""
    if state.documents not in ("", digest):
        raise BadInput("documents: they differ from those that this run was begun with; choose another run=")
    state.documents = digest


async def make_policy(cluster: Cluster, config: Config) -> tuple[PolicyService, Config]:
    """The one model of all roles, and the configuration with what it was made from."""
    if config.world == "ledger":
        base = await ledger_base(cluster, config.ledger, config.policy, config.seed)
        config = config.model_copy(update={"policy": config.policy.model_copy(update={"model": base})})
    return await cluster.policy(config.policy), config


def policies(config: Config) -> dict[str, ModelConfig]:
    """The models that a run loads, by the name of their actor."""
    frozen = config.policy.model_copy(update={"trainer": None, "lora": None, "at": None})
    found: dict[str, ModelConfig] = {"policy": config.policy}
    if config.reward_model is not None and config.reward_model.kind != "rules":
        found["reward_model"] = config.reward_model
    if config.loss.kl_coef:
        found["reference"] = frozen
    if config.audit.judge:
        found["judge"] = frozen.model_copy(update={"model": config.audit.judge, "init": "pretrained"})
    return found


async def make_cast(
    cluster: Cluster, config: Config, policy: PolicyService
) -> tuple[Cast, PolicyService | None, Judge | None]:
    """The three roles over one policy; a frozen copy of the base if there is a KL; a judge if one is named."""
    reward_model = await cluster.reward_model(config.reward_model) if config.reward_model is not None else None
    known = ""
    if reward_model is not None:
        info = await reward_model.info(Empty())
        known, longest = info.tokenizer, config.max_input_tokens + config.answer_sampling.max_tokens
        if info.kind != "rules" and info.max_tokens < longest:
            raise BadInput(
                f"reward_model.max_tokens: it reads {info.max_tokens} tokens, but prompts and answers reach {longest}"
                " (max_input_tokens, answer_sampling.max_tokens)"
            )
    cast = Cast(
        policy,
        await cluster.questioner(config.questioner, policy),
        await cluster.verifier(config.verifier, policy),
        reward_model,
        reads_tokens=known == (await policy.info(Empty())).tokenizer,
    )
    others = {
        name: await cluster.policy(model, name=name)
        for name, model in policies(config).items()
        if isinstance(model, PolicyConfig) and name != "policy"
    }
    judge, grader = None, others.get("judge")
    if grader is not None:
        by_both = config.verifier.model_copy(update={"mode": "both"})
        judge = Judge(grader, await cluster.verifier(by_both, grader, name="judge-verifier"))
    return cast, others.get("reference"), judge


async def self_play(
    step: Step,
    cast: Cast,
    world: World,
    gold: dict[str, list[GoldQuestion]],
    config: Config,
    documents: int,
    cursor: Cursor,
) -> list[Round]:
    """Ask questions from m = `documents` each until N are good (section 2.2, steps 1 to 8).

    Chunks of questions are in different stages at the same time. A new one is launched only if those done and
    those under way, at the usual share of good ones, do not promise enough; at most `most_batches` generation
    batches are. Results are taken in the order of launching, so the outcome does not depend on timing.
    """
    source = cluster_source(world, gold, config, cursor.drawn)
    keep_rate = usual_keep_rate(cursor, config)
    most = config.most_batches * config.generation_batch
    rounds: list[Round] = []
    busy: set[str] = set()
    launched = good = 0

    def draw() -> tuple[int, list[DocumentCluster]] | None:
        nonlocal launched
        promised = good + keep_rate * (launched - len(rounds))
        if promised >= config.questions_per_step or launched >= most:
            return None
        chunk = source.draw(min(config.chunk, most - launched), busy)
        if not chunk:
            return None
        busy.update(one.question_id for one in chunk)
        launched += len(chunk)
        return launched, chunk

    async def work(item: tuple[int, list[DocumentCluster]]) -> list[Round]:
        number, clusters = item
        uids = [f"{step.index}-{number - len(clusters) + i}" for i in range(len(clusters))]
        seed = step.seed("chunk", number)
        if gold:
            rng = random.Random(seed)
            fresh = [given(c, rng.choice(gold[c.question_id]), u) for c, u in zip(clusters, uids, strict=True)]
        else:
            fresh = await propose(cast, config, clusters, uids, seed, documents)
        return await play(cast, config, fresh, seed)

    async with aclosing(in_order(draw, work, config.chunks_in_flight)) as chunks:
        async for done in chunks:
            rounds += done
            busy.difference_update(round_.cluster.question_id for round_ in done)
            worth = [round_.proposal for round_ in done if is_remembered(round_, config)]
            await cast.questioner.remember(RememberRequest(proposals=worth))
            good += sum(round_.fate is Fate.GOOD for round_ in done)
            step.activity(f"{good} of {config.questions_per_step} good questions, {len(rounds)} asked")
    cursor.keep_rates = [*cursor.keep_rates, (len(rounds), good)][-KEEP_RATE_WINDOW:]
    return rounds


def cluster_source(
    world: World, gold: dict[str, list[GoldQuestion]], config: Config, drawn: dict[str, int]
) -> ClusterSource:
    """Deals out the clusters that can be asked about. Raises BadInput if there is none."""
    playable = [one for one in world.training if not gold or one.question_id in gold]
    return ClusterSource(playable, config.task_weights, config.seed, drawn)


def usual_keep_rate(cursor: Cursor, config: Config) -> float:
    """Share of good questions in the last steps; at the start, what the generation batch is sized for."""
    asked = sum(asked for asked, _ in cursor.keep_rates)
    if not asked:
        return min(1.0, config.questions_per_step / config.generation_batch)
    return max(0.02, sum(good for _, good in cursor.keep_rates) / asked)


def is_remembered(round_: Round, config: Config) -> bool:
    """Whether a question enters the history memory (section 2.8)."""
    if not round_.rewards or config.proposals == "gold":
        return False
    return 0 < round_.accuracy < 1 or (config.remember == "solvable" and round_.accuracy == 1)


async def learn(
    policy: PolicyService, reference: PolicyService | None, batch: Batch, config: Config, step: Step
) -> dict[str, float]:
    """The combined update (section 2.7): one optimiser step on all roles, or several if epochs ask for them."""
    version = (await policy.info(Empty())).version
    rows = train_rows(batch.samples, per_role=config.roles.weights is not None, ratios=config.staleness > 0)
    if not rows:
        return {}
    updates = config.epochs * config.mini_batches
    lag = lag_of(rows, version, config.staleness * updates)
    if updates > 1 and config.staleness == 0:
        rows = await scored(policy, rows, "sampled_logprobs", config.loss.temperature)
    if reference is not None:
        rows = await scored(reference, rows, "reference_logprobs", config.loss.temperature)
    losses = loss_terms(config)
    for epoch in range(config.epochs):
        order = step.rng("order", epoch).permutation(len(rows))
        for piece in np.array_split(order, min(config.mini_batches, len(rows))):
            step.activity(f"training on {len(piece)} rows")
            chosen = [rows[i] for i in sorted(piece)]
            report = await policy.forward_backward(ForwardBackwardRequest(rows=chosen, losses=losses))
            update = await policy.optim_step(OptimStepRequest())
    published = await policy.publish(Empty())
    metrics = {
        "train/loss": report.loss,
        "train/grad_norm": update.grad_norm,
        "train/lr": update.learning_rate,
        "train/publish_gap": published.gap,
        "train/lag": lag,
    }
    for term, values in report.terms.items():
        metrics |= {f"train/{term}_{name}": value for name, value in values.metrics.items()}
        if squared := metrics.pop(f"train/{term}_ratio_squared", 0.0):
            # Kish's effective sample size, as a share of the tokens.
            metrics[f"train/{term}_ess"] = values.metrics["ratio"] ** 2 / squared
    return metrics


def lag_of(rows: Sequence[TrainRow], version: int, most: int) -> float:
    """Mean age of the sampled tokens, in optimiser steps. Raises Stale if any is older than `most`."""
    ages = []
    for row in rows:
        assert row.versions is not None
        sampled = row.versions.array[row.versions.array >= 0]
        if sampled.min() < version - most or sampled.max() > version:
            raise Stale(
                f"{row.row_id} was sampled under the weights {sorted(set(sampled.tolist()))}, now they are {version},"
                f" and {most} optimiser steps back are allowed"
            )
        ages.append(version - sampled)
    return float(np.concatenate(ages).mean())


async def scored(policy: PolicyService, rows: list[TrainRow], name: str, temperature: float) -> list[TrainRow]:
    """The rows with log-probs under a policy in the named field."""
    request = ScoreRequest(sequences=[row.tokens for row in rows], temperature=temperature)
    logprobs = (await policy.score(request)).logprobs
    return [row.model_copy(update={name: values}) for row, values in zip(rows, logprobs, strict=True)]


def given_questions(world: World, config: Config) -> dict[str, list[GoldQuestion]]:
    """Gold questions by training cluster, if the run trains on those instead of its own.

    Raises BadInput if it should, and there are none.
    """
    by_cluster: dict[str, list[GoldQuestion]] = {}
    if config.proposals == "gold":
        for question in world.gold(world.training):
            by_cluster.setdefault(question.question_id, []).append(question)
        if not by_cluster:
            raise BadInput(
                "proposals: gold needs questions with known answers about the clusters to train on; there are none"
                " (qa= gives them, text.heldout_share keeps some of the clusters for evaluation)"
            )
    return by_cluster
