"""Workers of other actors. These services stay inside of a cluster: weights never cross gRPC."""

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field

from protocols.policy import PolicyService, ScoreRequest, ScoreResponse
from protocols.retriever import RetrieverService
from protocols.service import CheckpointRequest, CheckpointResponse, Empty, Message, Service, rpc
from protocols.tensor import DType, PerToken, Tensor, TokenIds
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
)


class Rank(Message):
    """The place of one process in a group of workers that compute together."""

    index: int = Field(default=0, ge=0)
    """Which of them."""
    world: int = Field(default=1, ge=1)
    """How many there are."""
    address: str = ""
    """HOST:PORT where they meet."""


class TensorType(Message):
    """What there is to know of an array before it arrives."""

    dtype: DType
    """Kind of its numbers."""
    shape: list[int]
    """Size along each axis."""


class WeightBucket(Message):
    """Some of the tensors of a new weight version: here, or about to be broadcast."""

    version: int
    """The version that they belong to."""
    tensors: dict[str, Tensor] = {}
    """By parameter name, in the trainer's precision."""
    broadcast: dict[str, TensorType] = {}
    """Those that rank 0 of the group joined before sends now, in this order."""
    last: bool
    """Whether the version is complete with this bucket."""


class PushResponse(Message):
    """What a publication moved."""

    version: int
    """The version that the samplers have now."""
    bytes: int
    """Size of the weights."""


class TrainerInfo(Message):
    """Facts about what is trained."""

    version: int
    """Weight version; every optimiser step raises it by one."""
    parameters: int
    """Number of weights."""
    trainable_parameters: int
    """Number of weights that a step changes."""


class ValuesRequest(Message):
    """Asks for the scores of given sequences."""

    sequences: list[TokenIds] = Field(min_length=1)
    """Token ids, int32[T] each, at least one token."""


class ValuesResponse(Message):
    """Scores per sequence."""

    values: list[PerToken]
    """Entry t is of the state that has read token t, float32[T]."""
    version: int
    """Weight version that scored."""


class SamplerService(PolicyService):
    """A frozen policy whose weights are replaced from outside."""

    @rpc(dispatch="all")
    @abstractmethod
    async def join(self, request: Rank) -> Empty:
        """Enter the group in which weights are broadcast; its rank 0 is the trainer's. Answers when all are there."""

    @rpc(dispatch="all")
    @abstractmethod
    async def receive(self, request: WeightBucket) -> Empty:
        """Hold the tensors; with the last bucket switch to them between two batches, or not at all.

        Raises Corrupt, and keeps the old weights, when names or shapes are not the model's.
        """

    @rpc(dispatch="all")
    @abstractmethod
    async def sleep(self, request: Empty) -> Empty:
        """Finish what is under way and give back the device's memory; later requests wait."""

    @rpc(dispatch="all")
    @abstractmethod
    async def wake(self, request: Empty) -> Empty:
        """Take the memory again and go on."""


class TrainerService(Service):
    """One rank of the group that trains a model. Every call goes to all ranks, which answer alike."""

    kind: ClassVar[str] = "trainer"

    @rpc(safe=True, dispatch="all")
    @abstractmethod
    async def info(self, request: Empty) -> TrainerInfo:
        """Facts about what is trained."""

    @rpc(dispatch="all")
    @abstractmethod
    async def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """Take the rank's share of the rows and add their gradient. The response is of the whole batch."""

    @rpc(dispatch="all")
    @abstractmethod
    async def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """Clip, step, clear the gradients. Raises Corrupt, and changes nothing, if they are not finite."""

    @rpc(dispatch="all")
    @abstractmethod
    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Log-probs under the trainer's own weights."""

    @rpc(dispatch="all")
    @abstractmethod
    async def values(self, request: ValuesRequest) -> ValuesResponse:
        """Scores by a model with a scalar head, under the trainer's own weights."""

    @rpc(dispatch="all")
    @abstractmethod
    async def meet(self, request: Empty) -> Rank:
        """Where the trainer's first rank waits for samplers that join it."""

    @rpc(dispatch="all")
    @abstractmethod
    async def join(self, request: Rank) -> Empty:
        """Let the first rank enter the group in which weights are broadcast. Answers when all are there."""

    @rpc(dispatch="all")
    @abstractmethod
    async def push(self, request: Empty) -> PushResponse:
        """Send the weights to the samplers, bucket by bucket."""

    @rpc(dispatch="all")
    @abstractmethod
    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Write model and training state; any number of ranks can load them."""


class RetrieverShardService(RetrieverService):
    """A retriever that has a part of another one's documents, and is not for callers."""
