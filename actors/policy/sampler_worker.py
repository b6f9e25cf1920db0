"""A sampler of a policy whose trainer lives elsewhere: a frozen policy that takes new weights."""

import asyncio
import warnings

import torch

from actors.policy.loading import device_of
from actors.policy.policy import PolicyActor
from actors.policy.weight_group import WeightGroup
from protocols.errors import BadInput, Corrupt
from protocols.policy import PolicyConfig
from protocols.service import Empty
from protocols.workers import Rank, SamplerService, WeightBucket

# Weights that have arrived lie in shared memory and are only read.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class SamplerActor(PolicyActor, SamplerService):
    """Holds the buckets of a new version until it is complete; in the machine's memory, unless broadcast."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self._published = 0
        self._held: dict[str, torch.Tensor] = {}
        self._held_version = 0
        self._group: WeightGroup | None = None

    def _load(self) -> None:
        self._load_sampler(frozen=True)

    @property
    def version(self) -> int:
        """The version that was published last."""
        return self._published

    async def join(self, request: Rank) -> Empty:
        """Enter the group in which weights are broadcast."""
        self._group = await asyncio.to_thread(WeightGroup, request, device_of(self._config.device))
        return Empty()

    async def receive(self, request: WeightBucket) -> Empty:
        """Hold the tensors; with the last bucket switch to them between two batches."""
        if request.version != self._held_version:
            # What is left of a publication that broke off must not mix with this one.
            self._held, self._held_version = {}, request.version
        self._held |= {name: tensor.torch(copy=False) for name, tensor in request.tensors.items()}
        if request.broadcast:
            if self._group is None:
                raise BadInput("publication: weights are broadcast, and this sampler has not joined")
            self._held |= await asyncio.to_thread(self._group.receive, request.broadcast)
        if request.last:
            held, self._held = self._held, {}
            expected = {name: tuple(parameter.shape) for name, parameter in self._replaceable().items()}
            check_complete({name: tuple(tensor.shape) for name, tensor in held.items()}, expected)
            await self._switch(held, request.version)
        return Empty()

    async def sleep(self, request: Empty) -> Empty:
        """Nothing to give back: the transformers sampler holds no cache between calls."""
        return Empty()

    async def wake(self, request: Empty) -> Empty:
        """Nothing to take."""
        return Empty()

    async def _switch(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        await self._run(lambda: self._replace(tensors, version))

    def _replace(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        with torch.no_grad():
            for name, parameter in self._replaceable().items():
                parameter.copy_(tensors[name])
        self._published = version

    def _replaceable(self) -> dict[str, torch.nn.Parameter]:
        """What the trainer trains: all weights, or the adapter's alone."""
        return dict(self._loaded.adapter() or self._loaded.model.named_parameters())


def check_complete(sent: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise Corrupt that names the first tensor which is missing, unknown or of another shape."""
    for name in sorted(sent.keys() | expected.keys()):
        if sent.get(name) != expected.get(name):
            raise Corrupt(
                f"publication: the trainer sent {name} as {sent.get(name, 'nothing')}, the sampler has"
                f" {expected.get(name, 'nothing')} there; it keeps its old weights"
            )
