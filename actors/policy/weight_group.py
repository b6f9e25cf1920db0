"""Weights from the trainer's first rank to all samplers at once: NCCL between GPUs, gloo between CPUs."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo, Store, TCPStore

from protocols.errors import Unavailable
from protocols.workers import Rank, TensorType

PATIENCE = timedelta(minutes=5)


def open_store(host: str) -> tuple[Store, str]:
    """A place on this machine where the members meet, and its address, HOST:PORT."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    return store, f"{host}:{store.port}"


class WeightGroup:
    """One member: rank 0 sends. Apart from the default group of the process, in which ranks train."""

    def __init__(self, rank: Rank, device: torch.device, store: Store | None = None) -> None:
        """Returns when all members are there. `store`: that of `open_store`, in its own process."""
        host, _, port = rank.address.rpartition(":")
        store = store or TCPStore(host, int(port), is_master=False, timeout=PATIENCE)
        self._device = device
        self._group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = PATIENCE
            self._group = dist.ProcessGroupNCCL(store, rank.index, rank.world, options)
        else:
            self._group = ProcessGroupGloo(store, rank.index, rank.world, PATIENCE)

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give the tensors to every member, all of which must receive now. Raises Unavailable if one is gone."""
        self._broadcast([tensor.contiguous() for tensor in tensors])

    def receive(self, types: Mapping[str, TensorType]) -> dict[str, torch.Tensor]:
        """What rank 0 sends, on this member's device, in the order of `types`. Raises Unavailable if it is gone."""
        tensors = {
            name: torch.empty(one.shape, dtype=getattr(torch, one.dtype), device=self._device)
            for name, one in types.items()
        }
        self._broadcast(list(tensors.values()))
        return tensors

    def _broadcast(self, tensors: list[torch.Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            for work in [self._group.broadcast([tensor], options) for tensor in tensors]:
                work.wait()
        except RuntimeError as error:
            raise Unavailable(f"publication: a member of the broadcast is gone: {error}") from error


def types_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorType]:
    """What to expect of tensors that are about to be sent."""
    return {
        name: TensorType(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape))
        for name, tensor in tensors.items()
    }
