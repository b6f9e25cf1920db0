"""What ranks that train together do for each other: meet, share a batch, add up."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from actors.policy.microbatch import MicroBatch
from protocols.workers import Rank


def join(rank: Rank, device: torch.device) -> None:
    """Meet the other ranks. Returns when all are there. A process can be in one group only."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if rank.world > 1:
        dist.init_process_group(backend, init_method=f"tcp://{rank.address}", rank=rank.index, world_size=rank.world)
    elif not dist.is_initialized():
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def leave(rank: Rank) -> None:
    """Leave the group. That of a single rank stays: others in this process may use it too."""
    if rank.world > 1 and dist.is_initialized():
        dist.destroy_process_group()


def shares(cut: Callable[[int], list[MicroBatch]], budget: int, world: int) -> list[list[MicroBatch]]:
    """The micro-batches of each rank: those that `cut` makes for a budget, dealt out in turn.

    The budget is halved until every rank has one, or halving no longer helps; then some ranks may have none.
    """
    groups = cut(budget)
    while len(groups) < world and budget > 1:
        budget //= 2
        groups = cut(budget)
    return [groups[i::world] for i in range(world)]


def gathered(value: Any) -> list[Any]:
    """The value of every rank, in their order."""
    if not _several():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients."""
    if not _several():
        return
    for parameter in parameters:
        # A rank without rows has no gradient, but must take part.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def use_environment(rank: Rank) -> None:
    """Say the same in the variables that DeepSpeed reads."""
    host, _, port = (rank.address or "127.0.0.1:0").rpartition(":")
    os.environ.update(
        RANK=str(rank.index), WORLD_SIZE=str(rank.world), LOCAL_RANK="0", MASTER_ADDR=host, MASTER_PORT=port
    )
