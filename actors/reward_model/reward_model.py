"""The reward model actor: reads replies, and lets a trainer score and learn."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actors.actor import Actor, start
from actors.in_turn import InTurn
from actors.policy.chat import vocabulary_digest
from actors.policy.loading import Loaded, load_outline
from actors.policy.trainer_worker import TrainerActor
from actors.reward_model.learning import TERM, Learnable, check_kind, learnable_of, loss_of, rows_of
from actors.reward_model.reading import PromptReader, Read, Unreadable, brought_back, own_ends, read
from protocols.errors import BadInput, Corrupt, Stale
from protocols.policy import ScoreRequest
from protocols.reward_model import (
    LearnRequest,
    LearnResponse,
    Reply,
    ReplyScore,
    RewardModelConfig,
    RewardModelInfo,
    RewardModelService,
    RewardRequest,
    RewardResponse,
)
from protocols.service import CheckpointRequest, CheckpointResponse, Empty, HealthRequest, HealthResponse
from protocols.tensor import PerToken, Tensor
from protocols.training import ForwardBackwardRequest, OptimStepRequest
from protocols.workers import Rank, TrainerService, ValuesRequest

DPO_BETA = 0.1

Scores = NDArray[np.float64]


class RewardModelActor(Actor, RewardModelService):
    """Scores by a model. `trainer` are its ranks; without them it is trained in this process, where the reference
    of log-ratios is in any case."""

    def __init__(
        self,
        config: RewardModelConfig,
        trainer: TrainerService | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._trainer: TrainerService
        self._given = trainer
        self._reference: TrainerService | None = None
        self._own: list[TrainerActor] = []
        self._outline: Loaded
        self._prompts: PromptReader
        self._limit = config.max_tokens
        self._in_turn = InTurn()
        self._version = 0

    async def setup(self) -> None:
        """Load the model. Raises BadInput when there is none or the configuration does not fit it."""
        self._outline = load_outline(self._config)
        self._prompts = PromptReader(self._outline.tokenizer)
        self._limit = min(self._config.max_tokens, self._outline.context_length)
        self._trainer = self._given or await self._start(self._config)
        if self._config.needs_reference:
            self._reference = await self._start(untrained(self._config))

    async def _start(self, config: RewardModelConfig) -> TrainerService:
        actor = TrainerActor(config, Rank())
        self._own.append(actor)
        await start(actor)
        return actor

    async def close(self) -> None:
        """Stop what was started here."""
        await super().close()
        for actor in self._own:
            await actor.close()

    async def health(self, request: HealthRequest) -> HealthResponse:
        """Say whether the reward model can serve, and with which weights."""
        return HealthResponse(kind=self.kind, ready=self._ready, version=self._version)

    async def info(self, request: Empty) -> RewardModelInfo:
        """Facts about the reward model."""
        trained = await self._trainer.info(request)
        return RewardModelInfo(
            kind=self._config.kind,
            model=self._config.model,
            parameters=trained.parameters,
            trainable_parameters=trained.trainable_parameters,
            tokenizer=vocabulary_digest(self._outline.tokenizer),
            max_tokens=self._limit,
            version=trained.version,
        )

    async def score(self, request: RewardRequest) -> RewardResponse:
        """Score replies and their tokens; the whole call is one batch."""
        replies = [self._readable(reply) for reply in request.replies]
        raw, version = await self._in_turn(lambda: self._raw([one.tokens for one in replies]))
        scores = [self._scored(one, values) for one, values in zip(replies, raw, strict=True)]
        return RewardResponse(scores=scores, version=version)

    def _readable(self, reply: Reply) -> Read:
        try:
            return self._read(reply)
        except Unreadable as error:  # which callers elsewhere do not know
            raise BadInput(error.message) from error

    def _read(self, reply: Reply) -> Read:
        if reply.ends is not None and self._config.kind == "value":
            raise BadInput(f"reply {reply.uid!r}: a critic reads tokens of its own tokenizer; expected `tokens`")
        one = read(reply, self._prompts, self._limit)
        self._outline.check_tokens(one.tokens, f"reply {reply.uid!r}")
        return one

    async def _raw(self, sequences: Sequence[NDArray[np.int32]]) -> tuple[list[Scores], int]:
        """What the model says of every token of whole sequences, float64[P + S] each, and its version."""
        tokens = [Tensor(sequence) for sequence in sequences]
        if not self._config.needs_reference:
            answer = await self._trainer.values(ValuesRequest(sequences=tokens))
            return [values.array.astype(np.float64) for values in answer.values], answer.version
        own = await self._trainer.score(ScoreRequest(sequences=tokens))
        reference = await self._reference_logprobs(tokens)
        pairs = zip(own.logprobs, reference, strict=True)
        return [one.array.astype(np.float64) - other.array for one, other in pairs], own.version

    async def _reference_logprobs(self, tokens: Sequence[Tensor]) -> list[PerToken]:
        assert self._reference is not None
        return (await self._reference.score(ScoreRequest(sequences=list(tokens)))).logprobs

    def _scored(self, one: Read, raw: Scores) -> ReplyScore:
        before = self._config.kind == "value"
        values_S = raw[one.prompt - before : len(raw) - before]
        if not np.isfinite(values_S).all():
            raise Corrupt(f"reply {one.uid!r}: the reward model's scores are not numbers")
        values_S, score = judged(self._config, values_S)
        values_T = brought_back(one, values_S, adds_up=self._config.needs_reference)
        return ReplyScore(
            uid=one.uid,
            score=score,
            tokens=Tensor(values_T, "float32"),
            ends=own_ends(one),
            truncated=one.truncated,
        )

    async def train(self, request: LearnRequest) -> LearnResponse:
        """Take one optimiser step on preferences or labelled replies."""
        if not self._config.learns:
            raise Stale("train: this reward model is frozen (trainer is null in its configuration)")
        check_kind(self._config.kind, request)
        found, dropped = learnable_of(request, self._read, self._config.kind)
        if not found:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none was given"
            raise BadInput(f"train: no pair or reply is left to learn from ({reasons})")
        return await self._in_turn(lambda: self._learn(found, dropped, request.learning_rate))

    async def _learn(self, found: Sequence[Learnable], dropped: Counter[str], rate: float | None) -> LearnResponse:
        rows = rows_of(found, self._config.kind)
        if self._config.needs_reference:
            reference = await self._reference_logprobs([row.tokens for row in rows])
            rows = [
                row.model_copy(update={"reference_logprobs": values})
                for row, values in zip(rows, reference, strict=True)
            ]
        losses = {TERM: loss_of(self._config)}
        report = await self._trainer.forward_backward(ForwardBackwardRequest(rows=rows, losses=losses))
        update = await self._trainer.optim_step(OptimStepRequest(learning_rate=rate))
        self._version = update.version
        return LearnResponse(
            loss=report.loss,
            metrics=report.terms[TERM].metrics,
            learnt=len(found),
            dropped=dict(dropped),
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            version=update.version,
        )

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Write the model in Hugging Face format (a sequence classifier, if its head is scalar)."""
        return await self._in_turn(lambda: self._trainer.save(request))

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Take back what `save` wrote."""
        response = await self._in_turn(lambda: self._trainer.load(request))
        self._version = (await self._trainer.info(Empty())).version
        return response


def untrained(config: RewardModelConfig) -> RewardModelConfig:
    """The model that log-ratios are taken to."""
    model = config.reference or config.model
    return config.model_copy(update={"model": model, "trainer": None, "lora": None})


def judged(config: RewardModelConfig, values_S: Scores) -> tuple[Scores, float]:
    """Scores of a reply's tokens, float64[S], and of the whole, from what the model said of each."""
    match config.kind:
        case "implicit" | "implicit_outcome":
            values_S = values_S * (config.beta or DPO_BETA if config.kind == "implicit" else 1.0)
            return values_S, float(values_S.sum())
        case "gated":
            values_S = np.exp(-np.logaddexp(0, -values_S))  # the sigmoid, without overflow
            return values_S, float(values_S.mean())
        case "steps":
            values_S = np.tanh(values_S)
            return values_S, float(values_S[-1])
        case "outcome":
            return values_S, float(values_S[-1])
        case "value":
            return values_S, float(values_S[0])
    return values_S, float(values_S.mean())
