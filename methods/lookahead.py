"""Lookahead routing: predict what each model of a pool would answer, and route by that (arXiv 2510.19506).

A pool answers training queries once, its answers are scored, and a router learns from both: the choice by the scores,
and in the same hidden states the answers themselves. In service nothing but the router runs before the model that it
chooses. Baselines are the same loop with another `router.kind`. Where this differs from the paper and its reference
code is in docs/methods/lookahead.md.
"""

import math
import os
import shutil
from pathlib import Path

import numpy as np

from cluster.cluster import Cluster
from cluster.seeds import derive_seed
from cluster.steps import LoopState
from methods.dealing import dealt
from methods.lookahead_collect import collect
from methods.lookahead_config import Config, Member, preset
from methods.lookahead_data import Query, Split, read_answered, read_queries, simulated, split
from methods.lookahead_report import collected, summary, write_evaluation
from methods.worlds import skills, trades
from methods.worlds.tiny import write_tiny
from protocols.model import ModelConfig
from protocols.router import (
    FROM_MEMORY,
    Candidate,
    RouteEvaluateRequest,
    RouterConfig,
    RouteRow,
    RouterService,
    RouteTrainRequest,
)
from protocols.service import CheckpointRequest

__all__ = ["HEADLINE", "Config", "policies", "preset", "run"]

HEADLINE = ("train/choice_loss", "train/response_loss", "eval/validation")


class State(LoopState):
    """The best router so far."""

    best: float | None = None
    """Its normalised score on validation queries."""
    best_step: int = 0
    """The step that it is of."""


async def run(cluster: Cluster, config: Config) -> None:
    """Collect, train, keep the router that validates best, and test it."""
    data = await data_of(cluster, config)
    if config.stage == "collect":
        async for _ in cluster.steps(LoopState()):
            pass
        cluster.summarize(collected(data))
        return
    prices = {name: config.price_of(name) for name in data.models}
    router = await cluster.router(router_config(cluster, config, prices))
    state, folder = State(), cluster.directory.path

    async for step in cluster.steps(state, first=0):
        if step.index > 0:
            step.log(await trained(router, batch(data, step.index, config)))
        if step.index % config.test_every == 0 or step.index == config.steps:
            step.activity(f"routing {len(data.validation)} validation queries")
            metrics = await validated(router, data, config.seed)
            step.log(metrics)
            # Without queries that tell routers apart, the last one is taken.
            score = metrics.get("eval/validation", math.nan)
            score = float(step.index) if math.isnan(score) else score
            # One that has not learnt anything yet does not compete.
            may_win = step.index > 0 or bool(config.router.trained)
            if may_win and (state.best is None or score > state.best):
                state.best, state.best_step = score, step.index
                await write(router, folder / "routers" / f"step-{step.index:06d}")

    if config.stage != "evaluate":
        best = folder / "routers" / f"step-{state.best_step:06d}"
        await router.load(CheckpointRequest(path=str(best), training_state=False))
        await write(router, folder / "router")
        for other in (folder / "routers").iterdir():
            if other != best:
                shutil.rmtree(other)
    if config.stage == "train":
        cluster.summarize(collected(data))
        return
    options = config.ways_to_choose(prices)
    tested = await router.evaluate(RouteEvaluateRequest(rows=data.test, options=options, seed=config.seed))
    write_evaluation(folder, tested, config, prices)
    cluster.summarize(summary(config, data, tested, state.best_step))


async def write(router: RouterService, folder: Path) -> None:
    """Write the router into a folder that is there as a whole or not at all."""
    staging = folder.with_name(f".{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    await router.save(CheckpointRequest(path=str(staging), training_state=False))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(staging, folder)


async def data_of(cluster: Cluster, config: Config) -> Split:
    """What a pool has made of queries: read, simulated, or asked now."""
    if config.data.collected:
        return split(read_answered(config.data), config.data)
    if config.world == "skills":
        return simulated(config.skills, config.seed_of_world, config.seed)
    if config.world == "trades":
        policy = Member().policy.model_copy(update={"threads": config.router.threads})
        folders = await trades.trade_policies(cluster, policy, config.seed_of_world)
        pool = {name: Member(policy=policy.model_copy(update={"model": path})) for name, path in folders.items()}
        drawn = trades.draw(np.random.default_rng(derive_seed(config.seed, "trades")), config.trade_queries)
        queries = [
            Query(id=f"{i}", instruction=one.query, reference=one.reference, source=one.trade)
            for i, one in enumerate(drawn)
        ]
    else:
        pool, queries = config.pool, read_queries(config.data.queries)
    return split(await collect(cluster, config, queries, pool), config.data)


def router_config(cluster: Cluster, config: Config, prices: dict[str, float]) -> RouterConfig:
    """The router of a run: its pool, an encoder of the built-in world, a schedule as long as the run."""
    given: dict[str, object] = {"candidates": [Candidate(name=name, price=price) for name, price in prices.items()]}
    if config.router.trainer is not None:
        given["trainer"] = config.router.trainer.model_copy(update={"total_steps": max(config.steps, 1)})
    if config.stage == "evaluate":
        given["trainer"] = None
    if config.world and config.router.model == RouterConfig().model:
        masked = config.world_encoder == "masked"
        words, width = (skills.WORDS, 48) if config.world == "skills" else (trades.VOCABULARY, trades.WIDTH)
        name = f"{config.world}-{config.world_encoder}-{config.encoder_spread:g}"
        folder = cluster.directory.path.parent / "bases" / name
        write_tiny(folder, words, width=width, masked=masked, spread=config.encoder_spread)
        given["model"] = str(folder)
    # What is as the defaults are counts as left open: a router that goes on has its own.
    chosen = {name: value for name, value in config.router if value != getattr(RouterConfig(), name)}
    return RouterConfig.model_validate(chosen | given | {"seed": config.seed})


def batch(data: Split, step: int, config: Config) -> list[RouteRow]:
    """The rows of a step: all of them once per epoch in a fresh random order, or all at once to be remembered."""
    if config.router.kind in FROM_MEMORY:
        return data.train
    return dealt(data.train, step - 1, config.queries_per_step, derive_seed(config.seed, "order"))


async def trained(router: RouterService, rows: list[RouteRow]) -> dict[str, float]:
    """One optimiser step (section 2.3)."""
    report = await router.train(RouteTrainRequest(rows=rows))
    losses = {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.learning_rate}
    metrics = {f"train/{name}": value for name, value in (losses | report.metrics).items()}
    return metrics | {f"dropped/{reason.replace(' ', '_')}": count for reason, count in report.dropped.items()}


async def validated(router: RouterService, data: Split, seed: int) -> dict[str, float]:
    """How the router does on validation queries, and where it sends them."""
    if not data.validation:
        return {}
    found = await router.evaluate(RouteEvaluateRequest(rows=data.validation, seed=seed))
    mean = found.evaluations[0].mean
    metrics = {"validation": mean.normalised, "validation_low": mean.low, "validation_high": mean.high}
    metrics["calibration_error"] = found.calibration_error
    shares = {f"share/{name}": share for name, share in zip(data.models, mean.shares, strict=True)}
    return {f"eval/{name}": value for name, value in metrics.items()} | shares


def policies(config: Config) -> dict[str, ModelConfig]:
    """What the plan counts: the router, and the pool with its reward model; those of built-in worlds are tiny."""
    found: dict[str, ModelConfig] = {}
    if config.stage != "collect" and not config.world:
        found["router"] = config.router
    if config.pool:
        found |= {name: member.policy for name, member in config.pool.items()}
        if config.reward.kind != "rules":
            found["pool-reward"] = config.reward
    return found
