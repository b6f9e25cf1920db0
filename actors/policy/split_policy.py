"""A policy whose samplers and trainer live apart: it hands calls on, and publishes weights from one to the other."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import numpy as np

from actors.actor import Actor
from actors.in_turn import InTurn
from protocols.errors import Corrupt
from protocols.messages import Prompt, SamplingParams
from protocols.policy import (
    DetokenizeRequest,
    DetokenizeResponse,
    EmbedRequest,
    EmbedResponse,
    PolicyConfig,
    PolicyInfo,
    PolicyService,
    PublishResponse,
    SampleDelta,
    SampleRequest,
    SampleResponse,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from protocols.service import CheckpointRequest, CheckpointResponse, Empty, HealthRequest, HealthResponse
from protocols.tensor import PerToken, Tensor, TokenIds
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
)
from protocols.workers import Rank, SamplerService, TrainerService

PROBES = 4
"""Sequences that samplers and trainer score after a publication."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05}
"""Nats; in float32 engines were seen to differ by 1e-5, one stale layer by 1e-2 after one small step."""
PROBE_LENGTH = 64
"""Tokens of a probe at least, where there are such rows: an engine caches beginnings in blocks."""


@dataclass(frozen=True)
class Answers:
    """One sampler's answers to the probes."""

    scores: ScoreResponse
    continued: list[Tensor]
    """Beginnings with the token that it drew, int32[T] each."""
    drawn: list[PerToken]
    """Log-prob of that token, float32[1] each."""


class SplitPolicyActor(Actor, PolicyService):
    """The verbs of a policy over its samplers and its trainer.

    `sampler` answers calls with the least loaded sampler; `samplers` are the same ones singly, for the probe.
    """

    def __init__(
        self,
        config: PolicyConfig,
        sampler: SamplerService,
        samplers: Sequence[SamplerService],
        trainer: TrainerService,
    ) -> None:
        super().__init__()
        self._sampler = sampler
        self._samplers = samplers
        self._trainer = trainer
        self._tolerance = config.sampler.publish_tolerance or TOLERANCES[config.dtype]
        self._broadcasts = config.sampler.publication == "broadcast"
        self._probes: list[TokenIds] = []
        self._probed: list[TokenIds] = []
        self._version = 0
        self._sleeps = config.sampler.sleep
        self._asleep = False
        self._turn = asyncio.Lock()
        self._alone = InTurn()

    async def setup(self) -> None:
        """Bring trainer and samplers together in a group, if weights are to be broadcast."""
        if not self._broadcasts:
            return
        place = (await self._trainer.meet(Empty())).address
        ranks = [Rank(index=i, world=len(self._samplers) + 1, address=place) for i in range(len(self._samplers) + 1)]
        joined = (sampler.join(rank) for sampler, rank in zip(self._samplers, ranks[1:], strict=True))
        await asyncio.gather(self._trainer.join(ranks[0]), *joined)

    async def health(self, request: HealthRequest) -> HealthResponse:
        """Say whether the policy can serve, and with which weights."""
        return HealthResponse(kind=self.kind, ready=self._ready, version=self._version)

    async def info(self, request: Empty) -> PolicyInfo:
        """Facts about the model that samples."""
        trained = await self._trainer.info(request)
        info = await self._sampler.info(request)
        return info.model_copy(update={"trainable_parameters": trained.trainable_parameters})

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """Tokens of prompts, the chat template applied."""
        return await self._sampler.tokenize(request)

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        """Text of token ids."""
        return await self._sampler.detokenize(request)

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Complete prompts on one of the samplers."""
        await self._wake()
        return await self._sampler.sample(request)

    async def stream(self, request: SampleRequest) -> AsyncIterator[SampleDelta]:
        """Complete prompts on one of the samplers, yielding every token as it is sampled."""
        await self._wake()
        async with aclosing(cast(AsyncGenerator[SampleDelta], self._sampler.stream(request))) as deltas:
            async for delta in deltas:
                yield delta

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Log-probs under the published weights."""
        await self._wake()
        return await self._sampler.score(request)

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Vectors of prompts under the published weights."""
        await self._wake()
        return await self._sampler.embed(request)

    async def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """Add the gradient of the batch loss, each rank that of its share."""
        if self._sleeps:
            await self._sleep()
        response = await self._alone(lambda: self._trainer.forward_backward(request))
        self._probes = probes_of([row.tokens for row in request.rows])
        return response

    async def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """Apply the accumulated gradients; samplers keep the weights that were published last."""
        return await self._alone(lambda: self._trainer.optim_step(request))

    async def publish(self, request: Empty) -> PublishResponse:
        """Bring the trainer's weights to every sampler, then compare log-probs of a few sequences.

        Raises Corrupt when a sampler differs from the trainer by more than `sampler.publish_tolerance`.
        """
        await self._wake()
        return await self._alone(self._publish)

    async def _publish(self) -> PublishResponse:
        pushed = await self._trainer.push(Empty())
        self._version = pushed.version
        return PublishResponse(version=pushed.version, gap=await self._gap(), bytes=pushed.bytes)

    async def _sleep(self) -> None:
        """Leave the device to the trainer."""
        async with self._turn:
            if not self._asleep:
                await self._sampler.sleep(Empty())
                self._asleep = True

    async def _wake(self) -> None:
        async with self._turn:
            if self._asleep:
                await self._sampler.wake(Empty())
                self._asleep = False

    async def _gap(self) -> float:
        """Largest difference of log-probs between any sampler and the trainer over the probes, in nats."""
        if not self._probes:
            return 0.0
        answers = await asyncio.gather(*(self._asked(sampler) for sampler in self._samplers))
        # Samplers that agree with each other are compared with the same scores.
        sequences = list(dict.fromkeys([*self._probes, *(ids for one in answers for ids in one.continued)]))
        expected = await self._trainer.score(ScoreRequest(sequences=sequences))
        wanted = dict(zip(sequences, expected.logprobs, strict=True))
        self._probed = self._probes
        return max(self._checked(i, one, wanted, expected.version) for i, one in enumerate(answers))

    async def _asked(self, sampler: SamplerService) -> "Answers":
        """What a sampler says of the probes: of whole sequences, and of the token that it draws after beginnings.

        An engine computes the first afresh and the second from what it has cached, also of the last probes.
        """
        beginnings = [Prompt(tokens=Tensor(ids.array[:-1], "int32")) for ids in [*self._probes, *self._probed]]
        one_token = SamplingParams(max_tokens=1, temperature=0)
        scores, sampled = await asyncio.gather(
            sampler.score(ScoreRequest(sequences=self._probes)),
            sampler.sample(SampleRequest(prompts=beginnings, params=one_token)),
        )
        drawn = [(result.prompt_tokens.array, result.completions[0]) for result in sampled.results]
        continued = [Tensor(np.r_[prompt, one.tokens.array], "int32") for prompt, one in drawn]
        return Answers(scores, continued, [one.logprobs for _, one in drawn])

    def _checked(self, index: int, answers: "Answers", wanted: dict[Tensor, PerToken], version: int) -> float:
        """The gap of one sampler. Raises Corrupt when it is too large, or the version another."""
        whole = zip(self._probes, answers.scores.logprobs, strict=True)
        ends = zip(answers.continued, answers.drawn, strict=True)
        pairs = [(wanted[ids].array, found.array) for ids, found in whole]
        pairs += [(wanted[ids].array[-1:], found.array) for ids, found in ends]
        gap = float(np.max([np.abs(one - other).max() for one, other in pairs]))
        # Written so that a NaN is over the tolerance too.
        found = answers.scores.version
        if not gap <= self._tolerance or found != version:
            raise Corrupt(
                f"publication: sampler {index} at version {found} differs from the trainer at version {version}"
                f" by {gap:.3g} nats, allowed is {self._tolerance:g} (sampler.publish_tolerance)"
            )
        return gap

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Let the trainer write model and training state."""
        return await self._alone(lambda: self._trainer.save(request))

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Take back what `save` wrote, and publish it."""
        await self._wake()
        return await self._alone(lambda: self._load(request))

    async def _load(self, request: CheckpointRequest) -> CheckpointResponse:
        response = await self._trainer.load(request)
        self._version = (await self._trainer.push(Empty())).version
        return response


def probes_of(sequences: Sequence[TokenIds]) -> list[TokenIds]:
    """The cheapest sequences that are long enough, or else the longest; one token alone has nothing to compare."""
    by_use = sorted(sequences, key=lambda ids: (len(ids) < PROBE_LENGTH, abs(len(ids) - PROBE_LENGTH)))
    return [ids for ids in by_use if len(ids) > 1][:PROBES]
