"""A sampler of a policy whose trainer lives elsewhere: a frozen policy that takes new weights."""

import torch

from actors.policy.policy import PolicyActor
from protocols.errors import Corrupt
from protocols.policy import PolicyConfig
from protocols.service import Empty
from protocols.tensor import Tensor
from protocols.workers import SamplerService, WeightBucket


class SamplerActor(PolicyActor, SamplerService):
    """Holds the buckets of a new version until it is complete; they take no memory of the device meanwhile."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self._published = 0
        self._held: dict[str, Tensor] = {}
        self._held_version = 0

    def _load(self) -> None:
        self._load_sampler(frozen=True)

    @property
    def version(self) -> int:
        """The version that was published last."""
        return self._published

    async def receive(self, request: WeightBucket) -> Empty:
        """Hold the tensors; with the last bucket switch to them between two batches."""
        if request.version != self._held_version:
            # What is left of a publication that broke off must not mix with this one.
            self._held, self._held_version = {}, request.version
        self._held.update(request.tensors)
        if request.last:
            held, self._held = self._held, {}
            expected = {name: tuple(parameter.shape) for name, parameter in self._replaceable().items()}
            check_complete({name: tensor.shape for name, tensor in held.items()}, expected)
            await self._switch(held, request.version)
        return Empty()

    async def sleep(self, request: Empty) -> Empty:
        """Nothing to give back: the transformers sampler holds no cache between calls."""
        return Empty()

    async def wake(self, request: Empty) -> Empty:
        """Nothing to take."""
        return Empty()

    async def _switch(self, tensors: dict[str, Tensor], version: int) -> None:
        await self._run(lambda: self._replace(tensors, version))

    def _replace(self, tensors: dict[str, Tensor], version: int) -> None:
        with torch.no_grad():
            for name, parameter in self._replaceable().items():
                parameter.copy_(tensors[name].torch())
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
