"""Q-RM: token-level Q values from a discriminative reward model (arXiv 2505.23363).

A network with a scalar head learns from pairs of replies alone; its score of each token is that token's value up to
scale and level. PPO or REINFORCE takes the scores, centred and scaled, as dense credit. Baselines are the same loop
with another reward model (reward.kind) or another source of rewards. Where this differs from the paper and its
reference code is in docs/methods/qrm.md.
"""

import sys
from collections.abc import Sequence

import numpy as np

from cluster.cluster import Cluster
from cluster.steps import Step
from methods.advantages import Values
from methods.qrm_config import Config, preset
from methods.qrm_credit import advantages_of, less_kl, returns_of
from methods.qrm_eval import History, test_policy, test_reward, watched
from methods.qrm_report import log_replies, summary
from methods.qrm_rollouts import TERM, Cast, Rollout, by_tokens, logprobs_of, roll_out, scored, train_rows, values_of
from methods.qrm_world import World, read_world, sample_pairs
from methods.worlds.chain_base import chain_base
from protocols.errors import BadInput
from protocols.model import ModelConfig
from protocols.policy import PolicyConfig
from protocols.reward_model import Kind, LabelledReply, LearnRequest, Preference, RewardModelConfig
from protocols.service import CheckpointRequest, Empty
from protocols.tensor import Tensor
from protocols.training import ForwardBackwardRequest, OptimStepRequest

__all__ = ["HEADLINE", "Config", "policies", "preset", "run"]

HEADLINE = ("reward_model/loss", "eval/pairs", "reward/right", "eval/pass_at_1")


async def run(cluster: Cluster, config: Config) -> None:
    """Train the reward model on pairs, then the policy on its scores."""
    world = read_world(config)
    config = await with_models(cluster, world, config)
    cast = await make_cast(cluster, config)
    if config.reward_until and not world.pairs:
        world.take_pairs(await sample_pairs(cluster, cast, world, config), None, config)
    state = History()

    async for step in cluster.steps(state, first=0):
        if 0 < step.index <= config.reward_until:
            step.log(await learn_reward(cast, world, config, step))
        elif step.index > 0:
            tasks = world.draw_tasks(step, config.prompts_per_step, config.seed)
            groups = await roll_out(cast, tasks, config.samples_per_prompt, config.sampling, step.seed("replies"))
            await learn_policy(cast, world, [one for group in groups for one in group], config, step)

        if due(step.index, config.reward_test_every, 0, config.reward_until) and config.has_reward_model:
            step.activity("testing the reward model")
            step.log(await test_reward(cast, world, config))
        if config.stage != "reward" and due(step.index, config.test_every, config.reward_until, config.steps):
            step.activity("testing the policy")
            metrics = await test_policy(cast, world, config)
            step.log(metrics | watched(state, metrics, step.index, config))
            if config.target is not None and metrics["eval/pass_at_1"] >= config.target:
                step.stop(f"target: Pass@1 is {metrics['eval/pass_at_1']:.3f}, {config.target:g} was wanted")
            if state.alarm == step.index and config.drift.enforce:
                step.stop("drift: the policy's accuracy has fallen, its scores have not: it exploits its reward")

    cluster.summarize(summary(cluster.metrics(), world, config, state.alarm, cluster.finished()))
    if cast.reward is not None and config.reward.learns:
        path = cluster.directory.path / "reward_model"
        await cast.reward.save(CheckpointRequest(path=str(path), training_state=False))


def due(step: int, every: int, first: int, last: int) -> bool:
    """Whether a test belongs to this step, of those from the first to the last."""
    return first <= step <= last and ((step - first) % every == 0 or step == last)


async def with_models(cluster: Cluster, world: World, config: Config) -> Config:
    """The configuration with the models that all actors start from."""
    if world.chain is not None:
        base = await chain_base(cluster, world.chain, config.chain, config.policy, config.world_seed)
        config = config.model_copy(update={"policy": config.policy.model_copy(update={"model": base})})
    return config.model_copy(update=models_of(config))


def models_of(config: Config) -> dict[str, ModelConfig]:
    """The models that a run loads, by the name of their field; those that name none start from the policy's."""
    found: dict[str, ModelConfig] = {"policy": config.policy}
    for name, model, wanted in (
        ("reward", config.reward, config.has_reward_model),
        ("critic", config.critic, config.has_critic),
    ):
        if wanted:
            given = model.model != RewardModelConfig().model
            found[name] = model if given else model.model_copy(update={"model": config.policy.model})
    if config.stage == "policy" and "reward" in found:
        # It is trained already, from the policy's own model unless another is named.
        reference = config.reward.reference or config.policy.model
        found["reward"] = config.reward.model_copy(update={"trainer": None, "reference": reference})
    return found


def policies(config: Config) -> dict[str, ModelConfig]:
    """What the plan counts: the models of the run, and a frozen policy if there is a KL."""
    reference: dict[str, ModelConfig] = {"reference": reference_of(config)} if config.needs_reference else {}
    return models_of(config) | reference


def reference_of(config: Config) -> PolicyConfig:
    """The policy before it is trained."""
    return config.policy.model_copy(update={"trainer": None, "lora": None, "at": None})


async def make_cast(cluster: Cluster, config: Config) -> Cast:
    """The actors that the run needs."""
    policy = await cluster.policy(config.policy)
    rules = await cluster.reward_model(config.rules, name="rules")
    reward = await cluster.reward_model(config.reward, name="reward_model") if config.has_reward_model else None
    critic = await cluster.reward_model(config.critic, name="critic") if config.has_critic else None
    reference = await cluster.policy(reference_of(config), name="reference") if config.needs_reference else None
    own = (await policy.info(Empty())).tokenizer
    if critic is not None and (await critic.info(Empty())).tokenizer != own:
        raise BadInput("critic.model: its tokenizer is not the policy's, whose tokens it is to read")
    reads_tokens = reward is not None and (await reward.info(Empty())).tokenizer == own
    readers = [model for model in (critic, reward if reads_tokens else None) if model is not None]
    limit = min([(await model.info(Empty())).max_tokens for model in readers], default=sys.maxsize)
    return Cast(policy, rules, reward, critic, reference, reads_tokens, limit)


async def learn_reward(cast: Cast, world: World, config: Config, step: Step) -> dict[str, float]:
    """One optimiser step of the reward model on preferences (section 2.3)."""
    assert cast.reward is not None
    pairs = world.draw_pairs(step, config.pairs_per_step, config.seed)
    step.activity(f"training the reward model on {len(pairs)} pairs")
    report = await cast.reward.train(lesson([pair.preference() for pair in pairs], config.reward.kind))
    metrics = {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.learning_rate, **report.metrics}
    metrics["dropped"] = sum(report.dropped.values())
    metrics["epoch"] = step.index * config.pairs_per_step / len(world.pairs)
    return {f"reward_model/{name}": value for name, value in metrics.items()}


def lesson(pairs: list[Preference], kind: Kind) -> LearnRequest:
    """Pairs as the kind learns from them: as they are, or as right and wrong replies."""
    if kind != "implicit_outcome":
        return LearnRequest(pairs=pairs)
    sides = [(reply, right) for pair in pairs for reply, right in ((pair.chosen, True), (pair.rejected, False))]
    return LearnRequest(replies=[LabelledReply(reply=reply, right=right) for reply, right in sides])


async def learn_policy(cast: Cast, world: World, rollouts: Sequence[Rollout], config: Config, step: Step) -> None:
    """One batch of the policy, and of its critic (section 2.4)."""
    step.sampled(sum(len(one.completion.tokens) for one in rollouts))
    drawn = len(rollouts)
    rollouts = [one for one in rollouts if cast.reads(one)]
    step.log({"train/dropped": drawn - len(rollouts)})
    if not rollouts:
        return
    found = await scored(cast, rollouts, config, world.exact(rollouts))
    returns = returns_of(found, config.credit, config.advantage)
    temperature = config.sampling.temperature
    reference = await logprobs_of(cast.reference, rollouts, temperature) if cast.reference else None
    if reference is not None and config.advantage.kl_coef:
        logprobs = [one.completion.logprobs.array.astype(np.float64) for one in rollouts]
        returns = less_kl(returns, logprobs, reference, config.advantage)
    values = await values_of(cast.critic, rollouts) if cast.critic else None
    advantages, targets = advantages_of(returns, values, config.credit, config.advantage)

    losses = {TERM: config.ppo if config.algorithm == "ppo" else config.reinforce}
    rows = train_rows(rollouts, advantages, reference, ratios=config.mini_batches > 1)
    for piece in np.array_split(step.rng("order").permutation(len(rows)), min(config.mini_batches, len(rows))):
        step.activity(f"training the policy on {len(piece)} replies")
        chosen = [rows[i] for i in sorted(piece)]
        report = await cast.policy.forward_backward(ForwardBackwardRequest(rows=chosen, losses=losses))
        update = await cast.policy.optim_step(OptimStepRequest())
        if cast.critic is not None and values is not None:
            labelled = [labelled_reply(rollouts[i], targets[i], values[i]) for i in sorted(piece)]
            fit = await cast.critic.train(LearnRequest(replies=labelled))
            step.log({"critic/loss": fit.loss, "critic/grad_norm": fit.grad_norm})
    published = await cast.policy.publish(Empty())

    scores = np.array([one.reply for one in found])
    step.log(
        {
            "reward/right": float(np.mean([one.right for one in rollouts])),
            "reward/score": float(scores.mean()),
            "reward/score_std": float(scores.std()),
            "train/loss": report.loss,
            "train/grad_norm": update.grad_norm,
            "train/lr": update.learning_rate,
            "train/publish_gap": published.gap,
            "train/reply_tokens": float(np.mean([len(one.completion.tokens) for one in rollouts])),
            **{f"train/{name}": value for name, value in report.terms[TERM].metrics.items()},
        }
    )
    await log_replies(step, cast.policy, rollouts, found, advantages, world, config.dump_replies)


def labelled_reply(rollout: Rollout, targets: Values, old_values: Values) -> LabelledReply:
    """What the critic learns from a reply."""
    return LabelledReply(
        reply=by_tokens(rollout),
        targets=Tensor(targets, "float32"),
        old_values=Tensor(old_values, "float32"),
    )
