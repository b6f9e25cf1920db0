"""How the small policies of built-in worlds are taught: rows of a prompt and a reply, and the loop over them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cluster.cluster import Cluster
from methods.worlds.tiny import END, PAD, TURN, tokens_of
from protocols.losses import SFTLoss
from protocols.model import TrainerConfig
from protocols.policy import PolicyConfig
from protocols.service import CheckpointRequest
from protocols.tensor import Tensor
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow


def lesson(words: Sequence[str], prompt: str, reply: str, *, name: str) -> TrainRow:
    """A row of a world's words whose loss is on the reply and its end; other words are as its tokenizer has them."""
    place = {token: i for i, token in enumerate(tokens_of(words))}
    asked, told = [*prompt.split(), TURN], [*reply.split(), END]
    weights = np.concatenate([np.zeros(len(asked)), np.ones(len(told))])
    tokens = np.array([place.get(token, place[PAD]) for token in [*asked, *told]], np.int32)
    return TrainRow(row_id=name, tokens=Tensor(tokens), terms={"sft": Tensor(weights, "float32")})


async def teach(
    company: Cluster,
    policy: PolicyConfig,
    staging: Path,
    name: str,
    title: str,
    batches: Iterable[list[TrainRow]],
    *,
    steps: int,
    rate: float,
    seed: int,
    model: str = "",
) -> None:
    """Train a policy on `steps` batches and leave it as STAGING/model.

    It begins as `model`, or without one with random weights from STAGING/skeleton.
    """
    trainer = TrainerConfig(
        learning_rate=rate, betas=(0.9, 0.95), schedule="linear", warmup_steps=min(20, steps - 1), total_steps=steps
    )
    begins = {"model": model} if model else {"model": str(staging / "skeleton"), "init": "random"}
    update = {**begins, "seed": seed, "trainer": trainer}
    base = await company.policy(policy.model_copy(update=update | {"lora": None, "at": None}), name=name)
    with company.progress(f"{title}, {steps} optimiser steps", steps, ("loss",)) as progress:
        for step, rows in enumerate(batches, start=1):
            report = await base.forward_backward(ForwardBackwardRequest(rows=rows, losses={"sft": SFTLoss()}))
            await base.optim_step(OptimStepRequest())
            if step % 100 == 0:
                progress.step(step, {"loss": report.loss}, {})
    await base.save(CheckpointRequest(path=str(staging / "model"), training_state=False))
    await company.stop(name)
