"""Messages and services: the base classes of everything that crosses an actor's border."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """An immutable, validated value. The line under a field says what it means, with units and shape."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Empty(Message):
    """Nothing to say."""


class HealthRequest(Message):
    """Asks an actor whether it can serve."""


class HealthResponse(Message):
    """What an actor says of itself."""

    kind: str
    """Actor kind, such as `policy`."""
    ready: bool
    """Whether set-up is done and the actor is not draining."""
    version: int = 0
    """Weight version; 0 for actors without weights."""


class CheckpointRequest(Message):
    """Where to write or read an actor's state."""

    path: str
    """A directory. Saving creates it; whoever asks makes sure that it becomes visible atomically."""
    training_state: bool = True
    """Whether optimiser and schedule belong to it; without them the directory is a plain model."""


class CheckpointResponse(Message):
    """What was written or read."""

    files: list[str] = []
    """File names relative to the directory, sorted."""


Dispatch = Literal["any", "all"]
Role = Literal["infer", "train", "admin"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """One remote method of a service: its name, its messages, and how a handle may treat a call."""

    name: str
    request: type[Message]
    response: type[Message]
    streaming: bool
    safe: bool
    dispatch: Dispatch
    role: Role


def rpc(*, safe: bool = False, dispatch: Dispatch = "any", role: Role = "infer") -> Callable[[Function], Function]:
    """Mark a method of a service as remote.

    safe: calling it twice is the same as calling it once, so a handle may retry it.
    dispatch: with several replicas, whether one of them answers or every one must do it.
    role: what a caller from outside must be allowed: to ask, to change what the actor knows, or to stop it.
    """

    def mark(function: Function) -> Function:
        function.__dict__["rpc"] = (safe, dispatch, role)
        return function

    return mark


class Service(ABC):
    """Base of the service classes: async methods, one request model in, one response model out.

    A method may instead return an async iterator of models. A handle to an actor is a subclass of the
    same service class, so a script cannot tell where the actor lives.
    """

    kind: ClassVar[str]

    @rpc(safe=True)
    @abstractmethod
    async def health(self, request: HealthRequest) -> HealthResponse:
        """Say whether the actor can serve."""

    @rpc(role="train")
    @abstractmethod
    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Write the actor's whole state under a directory."""

    @rpc(dispatch="all", role="train")
    @abstractmethod
    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Take the state that `save` wrote. Raises Corrupt if it is not one."""

    @rpc(dispatch="all", role="admin")
    @abstractmethod
    async def drain(self, request: Empty) -> Empty:
        """Refuse new calls with Unavailable, finish those that are running, then return."""

    @classmethod
    def methods(cls) -> dict[str, Method]:
        """The remote methods by name, in order of definition."""
        return _methods(cls)


@cache
def _methods(service: type[Service]) -> dict[str, Method]:
    return {
        name: _describe(name, function)
        for base in reversed(service.__mro__)
        for name, function in vars(base).items()
        if hasattr(function, "rpc")
    }


def _describe(name: str, function: Any) -> Method:
    hints = get_type_hints(function)
    request, response = hints["request"], hints["return"]
    streaming = get_origin(response) is AsyncIterator
    safe, dispatch, role = function.rpc
    if streaming:
        (response,) = get_args(response)
    elif not inspect.iscoroutinefunction(function):
        raise TypeError(f"{function.__qualname__} must be async or return an AsyncIterator")
    return Method(name, request, response, streaming, safe, dispatch, role)
