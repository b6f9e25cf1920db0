"""The lookup chain's base model: trained on the spot on a noisy teacher's replies, within a minute on one core.

Its errors are the teacher's, so how often it is right is known beforehand: `ChainWorld.teacher_accuracy`.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

from cluster.cluster import Cluster as Company
from cluster.seeds import derive_seed
from methods.worlds import chain
from methods.worlds.bases import base_of
from methods.worlds.chain import ChainConfig, ChainWorld, Digits
from protocols.losses import SFTLoss
from protocols.model import TrainerConfig
from protocols.policy import PolicyConfig
from protocols.service import CheckpointRequest
from protocols.tensor import Tensor
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow

WARMUP_STEPS = 50
STEPS_PER_LINE = 50


def base_steps(config: ChainConfig) -> int:
    """Optimiser steps for a base model as good as its teacher; finding places in longer chains takes more of them."""
    return config.base_steps or 300 + 6 * config.length


def token_weights(world: ChainWorld) -> Tensor:
    """Weight of each token of a prompt and its reply in the loss, float32[2K + 2].

    All fillers together weigh as much as the decisive digits. That moves no optimum, since each position has its
    own, but in long chains the noise of fillers would hide for thousands of steps what is to be learnt.
    """
    config = world.config
    fillers = config.length - config.decisive
    reply_K = np.full(config.length, min(1.0, config.decisive / fillers) if fillers else 1.0)
    reply_K[world.positions] = 1
    return Tensor(np.concatenate([np.zeros(config.length + 1), reply_K, [1.0]]), "float32")


def train_rows(prompts_BK: Digits, replies_BK: Digits, weights: Tensor) -> list[TrainRow]:
    """Prompts, the separator, replies and the end token as rows of the term `sft`."""
    tokens, rows = chain.vocabulary(), len(prompts_BK)
    separator_B1 = np.full((rows, 1), tokens.index(chain.SEPARATOR))
    end_B1 = np.full((rows, 1), tokens.index(chain.END))
    tokens_BT = np.concatenate([prompts_BK, separator_B1, replies_BK, end_B1], axis=1).astype(np.int32)
    terms = {"sft": weights}
    return [TrainRow(row_id=f"lesson {i}", tokens=Tensor(row), terms=terms) for i, row in enumerate(tokens_BT)]


async def chain_base(
    company: Company, world: ChainWorld, config: ChainConfig, policy: PolicyConfig, seed: int
) -> str:
    """Folder of the base model for this recipe and seed, trained now if it is not there yet.

    `world` is that of `config` and `seed`; of `policy` the base takes where it computes, not how it learns.
    """
    given = [config.model_dump() | {"base_steps": base_steps(config)}, seed, chain.skeleton(), token_weights(world)]
    recipe = json.dumps(given, default=Tensor.tolist)
    return await base_of(company, "chain", recipe, partial(_train, company, world, config, policy, seed))


async def _train(
    company: Company, world: ChainWorld, config: ChainConfig, policy: PolicyConfig, seed: int, staging: Path
) -> None:
    skeleton, steps = staging / "skeleton", base_steps(config)
    chain.write_skeleton(skeleton)
    trainer = TrainerConfig(
        learning_rate=config.base_rate,
        betas=(0.9, 0.95),
        schedule="linear",
        warmup_steps=min(WARMUP_STEPS, steps - 1),
        total_steps=steps,
    )
    update = {"model": str(skeleton), "init": "random", "seed": seed, "trainer": trainer, "lora": None, "at": None}
    base = await company.policy(policy.model_copy(update=update), name="base")
    parts, weights = -(-steps // STEPS_PER_LINE), token_weights(world)
    rng = np.random.default_rng(derive_seed(seed, "chain base"))
    title = f"lookup chain base model, {steps} optimiser steps"
    with company.progress(title, parts, headline=("loss",)) as progress:
        for step in range(1, steps + 1):
            prompts_BK = world.draw(rng, config.base_rows)
            rows = train_rows(prompts_BK, world.answer(rng, prompts_BK), weights)
            report = await base.forward_backward(ForwardBackwardRequest(rows=rows, losses={"sft": SFTLoss()}))
            await base.optim_step(OptimStepRequest())
            if step % STEPS_PER_LINE == 0 or step == steps:
                progress.step(-(-step // STEPS_PER_LINE), {"loss": report.loss}, {})
    await base.save(CheckpointRequest(path=str(staging / "model"), training_state=False))
    await company.stop("base")
