"""The policy actor: one model behind the verbs sample, score, forward_backward, optim_step, publish."""

import asyncio
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from actors.actor import Actor
from actors.policy import forward
from actors.policy.cache import check_cache
from actors.policy.chat import encode, ends_of, vocabulary_digest
from actors.policy.loading import Loaded, load
from actors.policy.rows import EncodedPrompt, OnToken, Row
from actors.policy.torch_trainer import TorchTrainer
from actors.policy.transformers_sampler import TransformersSampler
from actors.policy.weights import files_of, read_weights, write_model
from protocols.errors import BadInput, Stale
from protocols.messages import Completion, Prompt
from protocols.model import ModelConfig, TrainerConfig
from protocols.policy import (
    DetokenizeRequest,
    DetokenizeResponse,
    EmbedRequest,
    EmbedResponse,
    PolicyConfig,
    PolicyInfo,
    PolicyService,
    PublishResponse,
    Sampled,
    SampleDelta,
    SampleRequest,
    SampleResponse,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from protocols.service import CheckpointRequest, CheckpointResponse, Empty, HealthRequest, HealthResponse
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
)

Result = TypeVar("Result")


class PolicyActor(Actor, PolicyService):
    """Sampler and trainer share one module. Work on it runs on one thread, first come first served."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self._config = config
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._loaded: Loaded
        self._sampler: TransformersSampler
        self._trainer: TorchTrainer | None = None
        self._closing = False

    async def setup(self) -> None:
        """Load the model. Raises BadInput when there is none or the configuration does not fit it."""
        await self._run(self._load)

    def _load(self) -> None:
        self._load_sampler(frozen=False)
        if self._config.trainer is not None:
            self._trainer = TorchTrainer(
                self._loaded.model, self._config.trainer, seed=self._config.seed, autocast=self._autocast
            )

    def _load_sampler(self, *, frozen: bool) -> None:
        torch.set_num_threads(self._config.threads or len(os.sched_getaffinity(0)))
        self._loaded = load(self._config, frozen=frozen)
        check_cache(self._loaded.model)
        self._sampler = TransformersSampler(self._loaded, self._config.sampler)

    async def close(self) -> None:
        """Stop the worker thread; samples that are still running end early."""
        await super().close()
        self._closing = True
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)

    @property
    def version(self) -> int:
        """Weight version; every optimiser step raises it by one."""
        return self._trainer.version if self._trainer else 0

    async def health(self, request: HealthRequest) -> HealthResponse:
        """Say whether the policy can serve, and with which weights."""
        return HealthResponse(kind=self.kind, ready=self._ready, version=self.version)

    async def info(self, request: Empty) -> PolicyInfo:
        """Facts about the loaded model."""
        parameters = list(self._loaded.model.parameters())
        return PolicyInfo(
            model=self._config.model,
            parameters=sum(p.numel() for p in parameters),
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            vocab_size=self._loaded.vocab_size,
            context_length=self._loaded.context_length,
            eos_token_ids=self._loaded.eos_token_ids,
            version=self.version,
            tokenizer=vocabulary_digest(self._loaded.tokenizer),
        )

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """Tokens of prompts, the chat template applied."""
        tokenizer = self._loaded.tokenizer
        return TokenizeResponse(tokens=[encode(p, tokenizer, continues=request.continues) for p in request.prompts])

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        """Text of token ids."""
        for i, ids in enumerate(request.tokens):
            self._loaded.check_ids(ids.array, f"tokens[{i}]")
        tokenizer = self._loaded.tokenizer
        return DetokenizeResponse(
            texts=[tokenizer.decode(ids.array) for ids in request.tokens],
            ends=[ends_of(ids.array, tokenizer) for ids in request.tokens],
        )

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Complete prompts; the whole call is one batch."""
        prompts = self._encoded(request)
        stop = threading.Event()
        try:
            completions = await self._complete(prompts, request, stop, None)
        finally:
            stop.set()
        results = [
            Sampled(prompt_tokens=prompt.tokens, completions=done)
            for prompt, done in zip(prompts, completions, strict=True)
        ]
        return SampleResponse(results=results)

    async def stream(self, request: SampleRequest) -> AsyncIterator[SampleDelta]:
        """Complete prompts, yielding every token as it is sampled."""
        prompts = self._encoded(request)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[SampleDelta | None]()
        stop = threading.Event()

        def on_token(row: Row, text: str) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, row.delta(text))

        work = asyncio.ensure_future(self._complete(prompts, request, stop, on_token))
        work.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (delta := await queue.get()) is not None:
                yield delta
            await work
        finally:
            stop.set()
            work.cancel()

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Log-probs of the tokens of sequences."""
        rows = [sequence.array for sequence in request.sequences]
        for i, row in enumerate(rows):
            self._loaded.check_tokens(row, f"sequences[{i}]")
        return await self._score(rows, request.temperature, request.last)

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Vectors of prompts."""
        rows = [encode(prompt, self._loaded.tokenizer) for prompt in request.prompts]
        for row, prompt in zip(rows, request.prompts, strict=True):
            self._loaded.check_tokens(row, f"prompt {prompt.uid!r}")
        work = self._in_context(lambda: forward.embed(self._loaded.model, rows, self._budget))
        vectors = await self._run(work)
        return EmbedResponse(vectors=vectors, lengths=[len(row) for row in rows], version=self.version)

    async def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """Add the gradient of the batch loss to what is accumulated."""
        trainer = self._need_trainer("forward_backward")
        for row in request.rows:
            self._loaded.check_tokens(row.tokens.array, f"row {row.row_id!r}")
        return await self._run(lambda: trainer.forward_backward(request))

    async def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """Apply the accumulated gradients."""
        trainer = self._need_trainer("optim_step")
        return await self._run(lambda: trainer.optim_step(request))

    async def publish(self, request: Empty) -> PublishResponse:
        """Nothing to move: the sampler reads the trainer's own weights."""
        return PublishResponse(version=self.version)

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Write model and tokenizer in Hugging Face format, and what training needs beside them."""
        return await self._run(lambda: self._save(Path(request.path), request.training_state))

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Take back what `save` wrote."""
        return await self._run(lambda: self._load_from(Path(request.path), request.training_state))

    def _save(self, directory: Path, training_state: bool) -> CheckpointResponse:
        if self._trainer:
            self._trainer.write(self._loaded, directory, training_state)
        else:
            write_model(self._loaded, directory, whole=not training_state)
        return CheckpointResponse(files=files_of(directory))

    def _load_from(self, directory: Path, training_state: bool) -> CheckpointResponse:
        if self._trainer:
            self._trainer.read(self._loaded, directory, training_state)
        else:
            read_weights(self._loaded, directory)
        return CheckpointResponse(files=files_of(directory))

    async def _complete(
        self, prompts: list[EncodedPrompt], request: SampleRequest, stop: threading.Event, on_token: OnToken | None
    ) -> list[list[Completion]]:
        """n completions per prompt; those that are unfinished when `stop` is set end as they are."""
        if request.params.structure is not None:
            raise BadInput("params.structure: the transformers sampler has none; set sampler.engine to vllm")

        def cancelled() -> bool:
            return self._closing or stop.is_set()

        def work() -> list[list[Completion]]:
            return self._sampler.sample(
                prompts, request.n, request.params, self.version, on_token=on_token, cancelled=cancelled
            )

        return await self._run(self._in_context(work))

    async def _score(self, rows: list[NDArray[np.int32]], temperature: float, last: int) -> ScoreResponse:
        work = self._in_context(lambda: forward.score(self._loaded.model, rows, temperature, self._budget, last))
        return ScoreResponse(logprobs=await self._run(work), version=self.version)

    @property
    def _budget(self) -> int:
        """Most tokens that go through the model at once."""
        return (self._config.trainer or TrainerConfig()).micro_batch_tokens

    def _autocast(self) -> AbstractContextManager[Any]:
        return precision(self._config, self._loaded)

    def _in_context(self, work: Callable[[], Result]) -> Callable[[], Result]:
        def run() -> Result:
            with self._autocast():
                return work()

        return run

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _encoded(self, request: SampleRequest) -> list[EncodedPrompt]:
        return [self._encoded_prompt(prompt) for prompt in request.prompts]

    def _encoded_prompt(self, prompt: Prompt) -> EncodedPrompt:
        tokens = encode(prompt, self._loaded.tokenizer)
        self._loaded.check_tokens(tokens, f"prompt {prompt.uid!r}", room=1)
        return EncodedPrompt(tokens, secrets.randbits(63) if prompt.seed is None else prompt.seed)

    def _need_trainer(self, method: str) -> TorchTrainer:
        if self._trainer is None:
            raise Stale(f"{method}: this policy is frozen (trainer is null in its configuration)")
        return self._trainer


def precision(config: ModelConfig, loaded: Loaded) -> AbstractContextManager[Any]:
    """The precision of every forward pass, of sampler and trainer alike."""
    if config.dtype == "float32" or not loaded.trainable:
        return nullcontext()
    return torch.autocast(loaded.model.device.type, dtype=torch.bfloat16)
