"""A policy whose samplers and trainer live apart: it hands calls on, and publishes weights from one to the other."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import cast

import numpy as np

from actors.actor import Actor
from protocols.errors import Corrupt
from protocols.policy import (
    DetokenizeRequest,
    DetokenizeResponse,
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
from protocols.tensor import TokenIds
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
)
from protocols.workers import SamplerService, TrainerService

PROBES = 4
"""Sequences that samplers and trainer score after a publication."""


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
        self._tolerance = config.sampler.publish_tolerance
        self._probes: list[TokenIds] = []
        self._version = 0

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
        return await self._sampler.sample(request)

    async def stream(self, request: SampleRequest) -> AsyncIterator[SampleDelta]:
        """Complete prompts on one of the samplers, yielding every token as it is sampled."""
        async with aclosing(cast(AsyncGenerator[SampleDelta], self._sampler.stream(request))) as deltas:
            async for delta in deltas:
                yield delta

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Log-probs under the published weights."""
        return await self._sampler.score(request)

    async def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """Add the gradient of the batch loss, each rank that of its share."""
        # The shortest rows are the cheapest probes.
        rows = sorted(request.rows, key=lambda row: len(row.tokens))
        response = await self._trainer.forward_backward(request)
        self._probes = [row.tokens for row in rows[:PROBES]]
        return response

    async def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """Apply the accumulated gradients; samplers keep the weights that were published last."""
        return await self._trainer.optim_step(request)

    async def publish(self, request: Empty) -> PublishResponse:
        """Bring the trainer's weights to every sampler, then compare log-probs of a few sequences.

        Raises Corrupt when a sampler differs from the trainer by more than `sampler.publish_tolerance`.
        """
        pushed = await self._trainer.push(request)
        self._version = pushed.version
        return PublishResponse(version=pushed.version, gap=await self._gap(), bytes=pushed.bytes)

    async def _gap(self) -> float:
        """Largest difference of log-probs between any sampler and the trainer over the probes, in nats."""
        if not self._probes:
            return 0.0
        request = ScoreRequest(sequences=self._probes)
        expected, *found = await asyncio.gather(
            self._trainer.score(request), *(sampler.score(request) for sampler in self._samplers)
        )
        worst = 0.0
        for index, response in enumerate(found):
            gap = largest_gap(expected, response)
            # Written so that a NaN is over the tolerance too.
            if not gap <= self._tolerance or response.version != expected.version:
                raise Corrupt(
                    f"publication: sampler {index} at version {response.version} differs from the trainer at version"
                    f" {expected.version} by {gap:.3g} nats, allowed is {self._tolerance:g}"
                    " (sampler.publish_tolerance)"
                )
            worst = max(worst, gap)
        return worst

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Let the trainer write model and training state."""
        return await self._trainer.save(request)

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Take back what `save` wrote, and publish it."""
        response = await self._trainer.load(request)
        self._version = (await self._trainer.push(Empty())).version
        return response


def largest_gap(one: ScoreResponse, other: ScoreResponse) -> float:
    """Largest absolute difference of log-probs over all tokens; NaN if any of them is."""
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    return float(np.max([np.abs(a.array - b.array).max() for a, b in pairs]))
