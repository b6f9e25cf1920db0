"""The actor of handle.py. In a module of its own: Ray would send classes of a script along with every call."""

from typing import Any

from actors.actor import Actor
from protocols.service import Message, Service, rpc
from protocols.tensor import Tensor


class Array(Message):
    """An array."""

    values: Tensor
    """Its values."""


class Total(Message):
    """A sum."""

    value: float
    """How much."""


class SumService(Service):
    """Adds up."""

    @rpc()
    async def total(self, request: Array) -> Total:
        raise NotImplementedError


class SumActor(Actor, SumService):
    """Adds up."""

    async def total(self, request: Array) -> Total:
        return Total(value=float(request.values.array.sum()))


class Bare:
    """The same for a bare Ray actor."""

    async def total(self, values: Any) -> float:
        return float(values.sum())
