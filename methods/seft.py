"""SEFT: self-evolution fine-tuning with an adaptive reviser (arXiv 2406.10813).

A reviser learns from annotated replies how much revision a reply needs, and the revision. Then, round after round,
the policy replies to prompts that have no annotation, the reviser chooses among its replies or revises them, and the
policy is fine-tuned on the result. Baselines are the same loop with another `algorithm`. Much of the paper could not
be read: what is verified and what is our own design is in docs/methods/seft.md.
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import TypeVar

import numpy as np

from cluster.cluster import Cluster
from cluster.run_directory import write_atomically
from cluster.seeds import derive_seed
from cluster.steps import LoopState, Step
from methods.dealing import dealt
from methods.seft_config import OWN, Config, preset
from methods.seft_data import Data, best_of, data_of, fitting, of_round
from methods.seft_eval import (
    compared,
    end_of_rounds,
    most_likely,
    on_damages,
    refusal,
    reviser_metrics,
    test_reviser,
    worth_of,
)
from methods.seft_judge import judged
from methods.seft_report import known, round_metrics, summary, write_replies
from methods.seft_rounds import Cast, PseudoLabel, collected, read_round
from methods.seft_train import (
    TERM,
    Lesson,
    example_of,
    from_best,
    from_pairs,
    from_round,
    loss_of,
    preferences_of,
    reviser_data,
    rows_of,
)
from methods.seft_triples import Triple, triples_of
from methods.worlds.sorting import sorting_base
from protocols.errors import BadInput, Corrupt
from protocols.model import ModelConfig
from protocols.policy import PolicyConfig, PolicyService
from protocols.reviser import ReviserTrainRequest
from protocols.reward_model import LearnRequest
from protocols.service import CheckpointRequest, Empty
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow
from protocols.verifier import VerifierConfig

__all__ = ["HEADLINE", "Config", "policies", "preset", "run"]

Model = TypeVar("Model", bound=ModelConfig)
LABELS_FILE = "labels.json"
FIRST = "first"
"""The folder of the policy before it is trained, its optimiser included, for runs that go back to it."""
HEADLINE = ("reviser/loss", "train/loss", "dev/score", "dev/label_no")


class State(LoopState):
    """What past rounds came to."""

    threshold: float | None = None
    """t1 of the labels that the reviser learnt."""

    scores: list[float] = []
    """Development score of the first policy, and after each round."""
    kept: list[float] = []
    """Share of its replies there that the reviser would keep."""
    best: int = 0
    """The best round; 0: the first policy."""


async def run(cluster: Cluster, config: Config) -> None:
    """Train the reviser, then round after round the policy on what it makes of its replies."""
    data = data_of(config)
    config = await with_models(cluster, config, data)
    cast = await make_cast(cluster, config)
    data = await fitting(data, cast.policy, cast.context)
    state, folder = State(), cluster.directory.path
    triples: list[Triple] = []
    pairs: list[Lesson] = []
    rows: list[list[TrainRow]] = []
    mixed: list[list[TrainRow]] = []

    async for step in cluster.steps(state, first=min(config.first_phase, 1)):
        turn, place = config.round_of(step.index)
        if turn == 0 and step.index > 0 and config.revises:
            triples = triples or await stage_a(cast, config, data, state, folder)
            step.log(await learn_to_revise(cast, config, triples, step))
        elif turn == 0 and step.index > 0:
            pairs = pairs or pairs_of(data)
            step.log(await learn_rewards(cast, config, pairs, step))
        elif turn > 0:
            if place == 0 or not rows:
                rows = await lessons_of(cast, config, data, turn, folder, step)
                mixed = await annotated_rows(cast, config, data)
            if config.from_start and place == 0 and turn > 1:
                await cast.policy.load(CheckpointRequest(path=str(folder / FIRST)))
            step.log(await learn_policy(cast, config, rows, mixed, step))

        if step.index == config.first_phase or (place == config.round_steps - 1 and turn > 0):
            await cast.policy.publish(Empty())
            if config.from_start and turn == 0:
                await write(cast.policy, folder / FIRST, training_state=True)
            metrics = await judge_round(cast, config, data, state, turn, folder, step)
            if config.revises and turn == 0:
                await accept(cast, config, data, state, metrics, folder, step)

    await finish(cluster, cast, config, data, state)


async def with_models(cluster: Cluster, config: Config, data: Data) -> Config:
    """The configuration with the models that all actors start from."""
    if config.world:
        base = await sorting_base(cluster, config.policy, data.annotated + data.held_out, config.seed_of_world)
        config = config.model_copy(update={"policy": config.policy.model_copy(update={"model": base})})
    return config.model_copy(update=models_of(config))


def models_of(config: Config) -> dict[str, ModelConfig]:
    """The models that a run loads, by the name of their field; those that name none start from the policy's."""
    found: dict[str, ModelConfig] = {"policy": config.policy}
    if config.revises:
        found["reviser_policy"] = reviser_of(config)
    if config.reward is not None:
        found["reward"] = started_from(config.reward, config.policy) if config.reward.learns else config.reward
    if config.stronger is not None:
        found["stronger"] = config.stronger.model_copy(update={"trainer": None})
    if config.judge is not None:
        found["judge"] = config.judge.model_copy(update={"trainer": None})
    return found


def reviser_of(config: Config) -> PolicyConfig:
    """The reviser's model: one that was trained elsewhere, or one whose schedule ends with its training."""
    if config.reviser_trained:
        if not (Path(config.reviser_trained) / LABELS_FILE).is_file():
            told = (
                f"got {config.reviser_trained!r}, which has no {LABELS_FILE}; expected the folder `reviser` of a run"
            )
            raise BadInput(f"reviser_trained: {told}")
        model = str(Path(config.reviser_trained) / "model")
        return config.reviser_policy.model_copy(update={"model": model, "trainer": None, "lora": None})
    found = started_from(config.reviser_policy, config.policy)
    if found.trainer is None or found.trainer.schedule == "constant":
        return found
    length = max(config.reviser_steps, found.trainer.warmup_steps + 1)
    return found.model_copy(update={"trainer": found.trainer.model_copy(update={"total_steps": length})})


def started_from(given: Model, policy: PolicyConfig) -> Model:
    """A model that starts from the policy's unless another is named."""
    return given if given.model != ModelConfig().model else given.model_copy(update={"model": policy.model})


def policies(config: Config) -> dict[str, ModelConfig]:
    """What the plan counts."""
    reference: dict[str, ModelConfig] = {"reference": frozen(config)} if config.algorithm == "dpo" else {}
    return models_of(config) | reference


def frozen(config: Config) -> PolicyConfig:
    """The policy before it is trained."""
    return config.policy.model_copy(update={"trainer": None, "lora": None, "at": None})


async def make_cast(cluster: Cluster, config: Config) -> Cast:
    """The actors that the run needs."""
    policy = await cluster.policy(config.policy)
    reviser, its_policy = None, None
    if config.revises:
        its_policy = await cluster.policy(config.reviser_policy, name="reviser-policy")
        reviser = await cluster.reviser(config.reviser, its_policy)
    if reviser is not None and config.reviser_trained:
        # It refuses to be asked in another way than it was taught.
        await reviser.load(CheckpointRequest(path=str(Path(config.reviser_trained) / "role")))
    reward = await cluster.reward_model(config.reward) if config.reward is not None else None
    stronger = await cluster.policy(config.stronger, name="stronger") if config.stronger is not None else None
    judge = None
    if config.judge is not None:
        judge = await cluster.verifier(VerifierConfig(mode="votes"), await cluster.policy(config.judge, name="judge"))
    reference = await cluster.policy(frozen(config), name="reference") if config.algorithm == "dpo" else None
    info = await policy.info(Empty())
    if not info.eos_token_ids:
        raise BadInput(f"policy.model: {info.model!r} has no end token, so a reply would not end")
    return Cast(
        policy, info.eos_token_ids[0], info.context_length, reviser, its_policy, reward, stronger, judge, reference
    )


async def stage_a(cast: Cast, config: Config, data: Data, state: State, folder: Path) -> list[Triple]:
    """Examples for the reviser, written down; a run that goes on reads them."""
    file, about = folder / "reviser_data.jsonl", folder / "reviser_data.json"
    if file.is_file():
        state.threshold = json.loads(about.read_text(encoding="utf-8"))["t1"]
        return [Triple.model_validate_json(line) for line in file.read_bytes().split(b"\n")[:-1]]
    rng = np.random.default_rng(derive_seed(config.seed, "balance"))
    found = await reviser_data(cast, config, data, rng)
    state.threshold = found.threshold
    told = {"t0": config.rule.noise, "t1": found.threshold, "labels": Counter(one.label for one in found.kept)}
    write_atomically(about, json.dumps(told | {"dropped": found.dropped}, indent=1))
    write_atomically(file, "".join(one.model_dump_json() + "\n" for one in found.kept))
    return found.kept


async def learn_to_revise(cast: Cast, config: Config, triples: list[Triple], step: Step) -> dict[str, float]:
    """One optimiser step of the reviser (stage B)."""
    assert cast.reviser is not None
    chosen = dealt(triples, step.index - 1, config.examples_per_step, derive_seed(config.seed, "examples"))
    report = await cast.reviser.train(ReviserTrainRequest(examples=[example_of(one) for one in chosen]))
    found = {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.learning_rate}
    return {f"reviser/{name}": value for name, value in (found | {"too_long": report.too_long}).items()}


def pairs_of(data: Data) -> list[Lesson]:
    """What a reward model learns from. Raises BadInput where there is nothing."""
    pairs = from_pairs(data.annotated)
    if not pairs:
        raise BadInput("preferences: no prompt has a reply that is worse than its best; expected pairs to learn from")
    return pairs


async def learn_rewards(cast: Cast, config: Config, pairs: list[Lesson], step: Step) -> dict[str, float]:
    """One optimiser step of the reward model on the annotated pairs."""
    assert cast.reward is not None
    chosen = dealt(pairs, step.index - 1, config.examples_per_step, derive_seed(config.seed, "examples"))
    report = await cast.reward.train(LearnRequest(pairs=preferences_of(chosen)))
    found = {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.learning_rate, **report.metrics}
    return {f"reward_model/{name}": value for name, value in found.items()}


async def lessons_of(
    cast: Cast, config: Config, data: Data, turn: int, folder: Path, step: Step
) -> list[list[TrainRow]]:
    """What the policy learns in a round: from its own replies, or from annotated ones."""
    found: list[PseudoLabel] = []
    if config.algorithm in OWN:
        prompts = of_round(data.prompts, turn, config.prompts_per_round, config.seed)
        found = await collected(cast, config, prompts, turn, file_of(folder, turn), step.activity)
        if config.round_of(step.index)[1] == 0:
            # A run that goes on within a round has said so before.
            step.log(round_metrics(found))
            step.samples(one.model_dump(mode="json", exclude={"messages"}) for one in found[:8])
        before = earlier_rounds(config, data, turn, folder) if config.from_start else []
        lessons = from_round([*before, *found], by_confidence=config.by_confidence)
    else:
        lessons = from_best(data.annotated) if config.algorithm == "sft" else from_pairs(data.annotated)
    rows, too_long = await rows_of(cast, lessons)
    if not rows and found:
        why = ", ".join(f"{count} {reason}" for reason, count in Counter(one.problem for one in found).most_common())
        raise BadInput(
            f"round {turn}: nothing is left to learn of {len(found)} prompts ({why}; {too_long} too long): see"
            f" rounds/round-{turn}.jsonl, and least_own_score, evolution, sampling"
        )
    if not rows:
        raise BadInput(f"preferences: {config.algorithm} finds nothing to learn; {too_long} exceed the context")
    if config.round_of(step.index)[1] == 0:
        step.log({"round/lessons": len(rows), "round/too_long": too_long})
    return rows


def file_of(folder: Path, turn: int) -> Path:
    """Where a round's pseudo-labels are."""
    return folder / "rounds" / f"round-{turn}.jsonl"


def earlier_rounds(config: Config, data: Data, turn: int, folder: Path) -> list[PseudoLabel]:
    """The pseudo-labels of the rounds before, as they were written down. Raises Corrupt where some are missing."""
    found: list[PseudoLabel] = []
    for past in range(1, turn):
        prompts = of_round(data.prompts, past, config.prompts_per_round, config.seed)
        known = read_round(file_of(folder, past), prompts, config.prompts_per_call)
        if len(known) < len(prompts):
            # The policy that replied is gone.
            raise Corrupt(f"{file_of(folder, past)} holds {len(known)} of {len(prompts)} pseudo-labels")
        found += known
    return found


async def annotated_rows(cast: Cast, config: Config, data: Data) -> list[list[TrainRow]]:
    """The best annotated replies, where a share of each step is to be such."""
    if not config.annotated_share:
        return []
    rows, too_long = await rows_of(cast, from_best(data.annotated))
    if not rows:
        raise BadInput(f"annotated_share: no annotated reply is left, {too_long} exceed the policy's context")
    return rows


async def learn_policy(
    cast: Cast, config: Config, rows: list[list[TrainRow]], mixed: list[list[TrainRow]], step: Step
) -> dict[str, float]:
    """One optimiser step of the policy (stage C, item 5); `mixed` are annotated rows for a share of it."""
    done = step.index - config.first_phase - 1
    other = round(config.annotated_share * config.targets_per_step)
    chosen = dealt(rows, done, config.targets_per_step - other, derive_seed(config.seed, "targets"))
    chosen += dealt(mixed, done, other, derive_seed(config.seed, "mixed"))
    # A lesson that comes twice is two pairs.
    batch = [row.model_copy(update={"pair": f"{i}"}) for i, sides in enumerate(chosen) for row in sides]
    report = await cast.policy.forward_backward(ForwardBackwardRequest(rows=batch, losses={TERM: loss_of(config)}))
    update = await cast.policy.optim_step(OptimStepRequest())
    found = {"loss": report.loss, "grad_norm": update.grad_norm, "lr": update.learning_rate}
    found["epoch"] = (done % config.round_steps + 1) * (config.targets_per_step - other) / len(rows)
    return {f"train/{name}": value for name, value in found.items()}


async def accept(
    cast: Cast, config: Config, data: Data, state: State, first: dict[str, float], folder: Path, step: Step
) -> None:
    """Whether the reviser may revise, by annotated prompts that it has not seen; `first`: the first policy's test."""
    assert cast.reviser is not None and cast.reviser_policy is not None
    step.activity("testing the reviser")
    labels = folder / "reviser" / LABELS_FILE
    if config.reviser_trained:
        state.threshold = json.loads((Path(config.reviser_trained) / LABELS_FILE).read_text())["t1"]
    held_out = triples_of(data.held_out, config.rule, state.threshold).kept
    best = {item.id: best_of(item) for item in data.held_out}
    held_out += data.revisions_held_out
    best |= {one.source_id: one.target for one in data.revisions_held_out}
    metrics = reviser_metrics(await test_reviser(cast, config, held_out, best))
    metrics["no_precision"] = first.get("no_precision", math.nan)
    metrics = {f"reviser/{name}": value for name, value in metrics.items()}
    step.log(metrics)
    await write(cast.reviser_policy, folder / "reviser" / "model")
    write_atomically(labels, json.dumps({"t0": config.rule.noise, "t1": state.threshold}))
    await cast.reviser.save(CheckpointRequest(path=str(folder / "reviser" / "role")))
    reason = refusal(metrics, config.acceptance)
    if reason and config.acceptance.enforce:
        step.stop(f"acceptance.{reason}")


async def judge_round(
    cast: Cast, config: Config, data: Data, state: State, turn: int, folder: Path, step: Step
) -> dict[str, float]:
    """Test the policy, keep the best round's weights, and end the rounds when they gain nothing more."""
    step.activity("testing the policy")
    metrics = await worth_of(cast, config, data.dev, await most_likely(cast, config, data.dev))
    step.log({f"dev/{name}": value for name, value in metrics.items()})
    if math.isnan(metrics["score"]):
        raise BadInput("dev/score: it is not a number, so rounds cannot be told apart; see reward and preferences")
    if not state.scores or metrics["score"] > max(state.scores) + config.drift.gain:
        state.best = turn
        # An adapter goes on as one.
        await write(cast.policy, folder / "best" / f"round-{turn}", training_state=config.policy.lora is not None)
    state.scores = [*state.scores, metrics["score"]]
    if "label_no" in metrics:
        state.kept = [*state.kept, metrics["label_no"]]
    reason = end_of_rounds(state.scores, state.kept, config.drift)
    step.log({"dev/alarm": float(reason.startswith("drift"))})
    if reason and config.drift.enforce:
        step.stop(reason)
    return metrics


async def write(policy: PolicyService, folder: Path, *, training_state: bool = False) -> None:
    """Write a policy's weights into a folder that is there as a whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    await policy.save(CheckpointRequest(path=str(staging), training_state=training_state))
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


async def finish(cluster: Cluster, cast: Cast, config: Config, data: Data, state: State) -> None:
    """Test the first and the best policy, and leave the best one's weights as the run's result."""
    if not state.scores:
        return
    folder, tasks = cluster.directory.path, data.test or data.dev
    tested, replies = [], []
    for turn in dict.fromkeys((0, state.best)):
        await cast.policy.load(CheckpointRequest(path=str(folder / "best" / f"round-{turn}"), training_state=False))
        replied = await most_likely(cast, config, tasks)
        replies.append(replied.texts)
        tested.append(await worth_of(cast, config, tasks, replied))
    await write(cast.policy, folder / "policy")

    found = {"first": tested[0], "best": tested[-1], "judge": {}, "reviser": {}}
    comparisons = await compared(cast.judge, tasks, replies[-1], replies[0]) if cast.judge is not None else []
    if comparisons:
        found["judge"] = judged(comparisons, replies[-1], replies[0])
    if config.world and config.revises:
        found["reviser"] = await on_damages(cast, config, data.test)
    write_replies(folder / "replies.jsonl", tasks, replies[0], replies[-1], comparisons)
    rounds = {"best_round": state.best, "dev": state.scores}
    write_atomically(folder / "evaluation.json", json.dumps(known(found) | rounds, indent=1))
    cluster.summarize(summary(cluster.metrics(), config, data, found, state.best, cluster.finished()))
