"""One rank of a trainer, in a process of its own or in that of the actor which uses it."""

import asyncio
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from actors.actor import Actor
from actors.policy import forward, ranks
from actors.policy.loading import Loaded, load
from actors.policy.policy import precision
from actors.policy.torch_trainer import TorchTrainer, full_size
from actors.policy.weight_group import WeightGroup, open_store, types_of
from actors.policy.weights import files_of, read_weights, write_model
from protocols.errors import RepertoryError, Stale
from protocols.model import ModelConfig, TrainerConfig
from protocols.policy import PolicyConfig, ScoreRequest, ScoreResponse
from protocols.service import CheckpointRequest, CheckpointResponse, Empty, HealthRequest, HealthResponse
from protocols.tensor import Tensor
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
)
from protocols.workers import (
    PushResponse,
    Rank,
    SamplerService,
    TrainerInfo,
    TrainerService,
    ValuesRequest,
    ValuesResponse,
    WeightBucket,
)

BUCKET = 64 << 20
"""Bytes of weights that travel in one message."""
Result = TypeVar("Result")


class TrainerActor(Actor, TrainerService):
    """Loads the model, meets the other ranks, and works on one thread, call after call."""

    def __init__(self, config: ModelConfig, rank: Rank, sampler: SamplerService | None = None) -> None:
        super().__init__()
        self._config = config
        self._trainer_config = config.trainer or TrainerConfig()
        self._rank = rank
        self._sampler = sampler
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trainer")
        self._loaded: Loaded
        self._trainer: TorchTrainer | None = None
        self._store: Any = None
        self._group: WeightGroup | None = None

    async def setup(self) -> None:
        """Load the model and meet the other ranks. Raises BadInput as the policy does."""
        await self._run(self._load)

    def _load(self) -> None:
        torch.set_num_threads(self._config.threads or len(os.sched_getaffinity(0)))
        self._loaded = load(self._config)
        if self._config.trainer is None:
            return
        if self._rank.world > 1 or self._trainer_config.engine == "deepspeed":
            ranks.join(self._rank, self._loaded.model.device)
        options: dict[str, Any] = {"seed": self._config.seed, "rank": self._rank, "head": self._config.head}
        if self._trainer_config.engine == "torch":
            self._trainer = TorchTrainer(self._loaded.model, self._trainer_config, autocast=self._autocast, **options)
            return
        from actors.policy.deepspeed_trainer import DeepSpeedTrainer

        half = self._config.dtype == "bfloat16"
        self._trainer = DeepSpeedTrainer(self._loaded.model, self._trainer_config, half=half, **options)

    async def close(self) -> None:
        """Stop the worker thread and leave the group."""
        await super().close()
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)
        ranks.leave(self._rank)

    async def health(self, request: HealthRequest) -> HealthResponse:
        """Say whether the rank can serve, and with which weights."""
        return HealthResponse(kind=self.kind, ready=self._ready, version=self._version)

    @property
    def _version(self) -> int:
        return self._trainer.version if self._trainer else 0

    async def info(self, request: Empty) -> TrainerInfo:
        """Facts about what is trained."""
        parameters = list(self._loaded.model.parameters())
        return TrainerInfo(
            version=self._version,
            parameters=sum(map(full_size, parameters)),
            trainable_parameters=sum(full_size(p) for p in parameters if p.requires_grad),
        )

    async def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """Take the rank's share of the rows and add their gradient."""
        for row in request.rows:
            self._loaded.check_tokens(row.tokens.array, f"row {row.row_id!r}")
        trainer = self._need_trainer("forward_backward")
        return await self._run(lambda: trainer.forward_backward(request))

    async def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """Apply the accumulated gradients."""
        trainer = self._need_trainer("optim_step")
        return await self._run(lambda: trainer.optim_step(request))

    def _need_trainer(self, method: str) -> TorchTrainer:
        if self._trainer is None:
            raise Stale(f"{method}: this model is frozen (trainer is null in its configuration)")
        return self._trainer

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Log-probs under the trainer's own weights; every rank goes through all sequences."""
        return await self._run(lambda: self._score(request))

    def _score(self, request: ScoreRequest) -> ScoreResponse:
        rows = [sequence.array for sequence in request.sequences]
        with self._autocast():
            logprobs = forward.score(self._model, rows, request.temperature, self._budget, request.last)
        return ScoreResponse(logprobs=logprobs, version=self._version)

    async def values(self, request: ValuesRequest) -> ValuesResponse:
        """Scores by the scalar head; every rank goes through all sequences."""
        return await self._run(lambda: self._values(request))

    def _values(self, request: ValuesRequest) -> ValuesResponse:
        rows = [sequence.array for sequence in request.sequences]
        with self._autocast():
            values = forward.token_scores(self._model, rows, self._budget)
        return ValuesResponse(values=values, version=self._version)

    @property
    def _model(self) -> Any:
        return self._trainer.model if self._trainer else self._loaded.model

    @property
    def _budget(self) -> int:
        return self._trainer_config.micro_batch_tokens

    async def meet(self, request: Empty) -> Rank:
        """Open the place where samplers meet the first rank."""
        if self._rank.index:
            return Rank()
        host = self._rank.address.rpartition(":")[0] or "127.0.0.1"
        self._store, address = open_store(host)
        return Rank(address=address)

    async def join(self, request: Rank) -> Empty:
        """Enter the group in which weights are broadcast."""
        if self._rank.index == 0:
            device = self._loaded.model.device
            self._group = await self._run(lambda: WeightGroup(request, device, self._store))
        return Empty()

    async def push(self, request: Empty) -> PushResponse:
        """Gather the weights bucket by bucket with the other ranks; rank 0 sends them to the samplers."""
        trainer, sampler = self._need_trainer("push"), self._need_sampler()
        if isinstance(self._config, PolicyConfig) and self._config.sampler.publication == "broadcast":
            return await self._broadcast(trainer, sampler)
        version, size = trainer.version, 0
        pieces = trainer.buckets(BUCKET)
        bucket = await self._run(lambda: self._copied(pieces))
        while bucket is not None:
            following = await self._run(lambda: self._copied(pieces))
            if self._rank.index == 0:
                await sampler.receive(WeightBucket(version=version, tensors=bucket, last=following is None))
            size += sum(tensor.array.nbytes for tensor in bucket.values())
            bucket = following
        return PushResponse(version=version, bytes=size)

    def _need_sampler(self) -> SamplerService:
        if self._sampler is None:
            raise Stale("push: this model has no samplers")
        return self._sampler

    async def _broadcast(self, trainer: TorchTrainer, sampler: SamplerService) -> PushResponse:
        version, size = trainer.version, 0
        pieces = trainer.buckets(BUCKET)
        piece = await self._run(lambda: next(pieces, None))
        while piece is not None:
            if self._group is not None:
                # Without `last`: whether there is another piece is known when this one's shards are let go.
                bucket = WeightBucket(version=version, broadcast=types_of(piece), last=False)
                await self._with_samplers(sampler, bucket, self._group, piece)
            size += sum(tensor.nbytes for tensor in piece.values())
            piece = await self._run(lambda: next(pieces, None))
        if self._rank.index == 0:
            await sampler.receive(WeightBucket(version=version, last=True))
        return PushResponse(version=version, bytes=size)

    async def _with_samplers(
        self, sampler: SamplerService, bucket: WeightBucket, group: WeightGroup, piece: dict[str, torch.Tensor]
    ) -> None:
        calls = (sampler.receive(bucket), self._run(lambda: group.send(piece.values())))
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            # When one fails the other may wait for it in vain.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
        for task in done:
            task.result()

    def _copied(self, pieces: Iterator[dict[str, torch.Tensor]]) -> dict[str, Tensor] | None:
        """The next bucket, in memory that no later step changes."""
        piece = next(pieces, None)
        return None if piece is None else {name: Tensor.from_torch(w.clone()) for name, w in piece.items()}

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Rank 0 writes model and tokenizer in Hugging Face format, and the training state of all ranks."""
        return await self._run(lambda: self._save(Path(request.path), request.training_state))

    def _save(self, directory: Path, training_state: bool) -> CheckpointResponse:
        if self._rank.index == 0:
            directory.mkdir(parents=True, exist_ok=True)
        if self._trainer:
            self._trainer.write(self._loaded, directory, training_state)
        else:
            write_model(self._loaded, directory, whole=not training_state)
        ranks.gathered(None)  # Nobody says that it is written before rank 0 is done.
        return CheckpointResponse(files=files_of(directory))

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Take back what `save` wrote, with any number of ranks."""
        return await self._run(lambda: self._load_from(Path(request.path), request.training_state))

    def _load_from(self, directory: Path, training_state: bool) -> CheckpointResponse:
        if self._trainer:
            self._trainer.read(self._loaded, directory, training_state)
        else:
            read_weights(self._loaded, directory)
        return CheckpointResponse(files=files_of(directory))

    def _autocast(self) -> AbstractContextManager[Any]:
        # Under DeepSpeed the weights themselves are bfloat16.
        return nullcontext() if self._trainer_config.engine == "deepspeed" else precision(self._config, self._loaded)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._or_leave, work)

    def _or_leave(self, work: Callable[[], Result]) -> Result:
        """A rank that fails alone leaves the group, so that the others fail too instead of waiting for it."""
        try:
            return work()
        except RepertoryError:  # of what all ranks were given alike, or in a step that all of them took
            raise
        except Exception:  # raised again: whatever it was, the other ranks must not wait for this one
            ranks.leave(self._rank)
            raise
