"""The policy `auto`: a router chooses who answers, and another one answers if that one is down."""

import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from cluster.together import together
from protocols.errors import BadInput, Unavailable
from protocols.policy import (
    DetokenizeRequest,
    DetokenizeResponse,
    EmbedRequest,
    EmbedResponse,
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
from protocols.router import RouteRequest, RouterService
from protocols.service import (
    CheckpointRequest,
    CheckpointResponse,
    Empty,
    HealthRequest,
    HealthResponse,
)
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
)

AUTO = "auto"
ROUTE = "x-repertory-route"
"""Header, and key of gRPC's trailing metadata, that tells who answered and why."""
LONGEST_TOLD = 1400
"""Of a header, in characters; what is said of each of many models is left out."""


@dataclass
class Decision:
    """Who is to answer a prompt: names from the best on, and who turned out to be down."""

    order: list[str]
    scores: dict[str, float]
    down: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """Who answers, as far as is known."""
        return next(name for name in self.order if name not in self.down)

    def failed(self, error: Unavailable) -> None:
        """Go on with the next one. Raises the error if there is none."""
        self.down.append(self.model)
        if len(self.down) == len(self.order):
            raise error

    def told(self) -> dict[str, object]:
        """What the caller learns of it."""
        scores = {name: round(score, 4) for name, score in self.scores.items()}
        return {"model": self.model, "scores": scores, "down": self.down}


class RoutedPolicy(PolicyService):
    """One call to `auto`: info, tokenize, detokenize, sample and stream are there, the rest needs a policy's name."""

    def __init__(self, router: RouterService, policies: Mapping[str, PolicyService]) -> None:
        self._router = router
        self._policies = policies
        self.decisions: list[Decision] = []
        """One per prompt, once they have been routed."""

    def told(self) -> str:
        """The decision as JSON in ASCII; of several prompts how many went to whom, for headers are short."""
        if len(self.decisions) == 1:
            told, long = self.decisions[0].told(), "scores"
        else:
            down = sorted({name for decision in self.decisions for name in decision.down})
            told, long = {"prompts": Counter(decision.model for decision in self.decisions), "down": down}, "prompts"
        whole = json.dumps(told)
        return whole if len(whole) <= LONGEST_TOLD else json.dumps(told | {long: {}})

    async def _routed(self, request: SampleRequest | TokenizeRequest) -> list[Decision]:
        """Decide once per call. Raises Unavailable when no candidate of the router is served here."""
        if not self.decisions:
            answer = await self._router.route(RouteRequest(prompts=request.prompts))
            for route in answer.routes:
                scores = dict(zip(answer.candidates, route.scores, strict=True))
                # The router's choice may weigh prices; after it, the best scores.
                order = sorted(scores, key=lambda name: (name != route.choice, -scores[name]))
                here = [name for name in order if name in self._policies]
                if not here:
                    raise Unavailable(f"{AUTO}: none of {', '.join(answer.candidates)} is served here")
                self.decisions.append(Decision(here, scores))
        return self.decisions

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Each prompt is answered by the policy of its route; those of one policy are one call to it."""
        decisions = await self._routed(request)
        results: dict[int, Sampled] = {}
        while len(results) < len(decisions):
            shares: dict[str, list[int]] = {}
            for i, decision in enumerate(decisions):
                if i not in results:
                    shares.setdefault(decision.model, []).append(i)
            for found in await together([self._share(request, *share) for share in shares.items()]):
                results |= found
        return SampleResponse(results=[results[i] for i in range(len(decisions))])

    async def _share(self, request: SampleRequest, name: str, places: list[int]) -> dict[int, Sampled]:
        """The answers of one policy by the place of their prompts; none if it is down."""
        part = request.model_copy(update={"prompts": [request.prompts[i] for i in places]})
        try:
            answer = await self._policies[name].sample(part)
        except Unavailable as error:
            for i in places:
                self.decisions[i].failed(error)
            return {}
        return dict(zip(places, answer.results, strict=True))

    def stream(self, request: SampleRequest) -> AsyncIterator[SampleDelta]:
        """One prompt, answered as tokens are drawn. Another policy begins anew only if none has come yet."""
        return self._stream(request)

    async def _stream(self, request: SampleRequest) -> AsyncGenerator[SampleDelta, None]:
        if len(request.prompts) != 1:
            raise BadInput(f"prompts: got {len(request.prompts)}; {AUTO} streams one prompt at a time")
        (decision,) = await self._routed(request)
        begun = False
        while True:
            stream = cast(AsyncGenerator[SampleDelta, None], self._policies[decision.model].stream(request))
            try:
                async with aclosing(stream) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
                return
            except Unavailable as error:
                if begun:
                    raise
                decision.failed(error)

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """Tokens as the first prompt's policy has them."""
        decision = (await self._routed(request))[0]
        while True:
            try:
                return await self._policies[decision.model].tokenize(request)
            except Unavailable as error:
                decision.failed(error)

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        """Text of tokens that the first prompt's policy has drawn."""
        if not self.decisions:
            raise BadInput(f"{AUTO}: tokens have no text before a policy is chosen; expected a model's name")
        models = {decision.model for decision in self.decisions}
        if len(models) > 1:
            raise BadInput(f"logprobs: {AUTO} gives them for prompts of one policy; these went to {len(models)}")
        return await self._policies[models.pop()].detokenize(request)

    async def info(self, request: Empty) -> PolicyInfo:
        """What holds whoever is chosen: the shortest context."""
        found, why = [], "none of the router's candidates is served here"
        pool = {one.name for one in (await self._router.info(request)).candidates}
        for policy in (policy for name, policy in self._policies.items() if name in pool):
            try:
                found.append(await policy.info(request))
            except Unavailable as error:
                why = error.message
        if not found:
            raise Unavailable(f"{AUTO}: no policy can be reached: {why}")
        shortest = min(found, key=lambda one: one.context_length)
        return shortest.model_copy(update={"model": AUTO, "trainable_parameters": 0, "eos_token_ids": []})

    async def health(self, request: HealthRequest) -> HealthResponse:
        """Whether the router can choose."""
        return await self._router.health(request)

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Not of a chosen one."""
        raise _refused("score")

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Not of a chosen one."""
        raise _refused("embed")

    async def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """Not of a chosen one."""
        raise _refused("forward_backward")

    async def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """Not of a chosen one."""
        raise _refused("optim_step")

    async def publish(self, request: Empty) -> PublishResponse:
        """Not of a chosen one."""
        raise _refused("publish")

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Not of a chosen one."""
        raise _refused("save")

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Not of a chosen one."""
        raise _refused("load")

    async def drain(self, request: Empty) -> Empty:
        """Not of a chosen one."""
        raise _refused("drain")


def _refused(method: str) -> BadInput:
    return BadInput(f"{AUTO}: got a call of {method}; expected a policy's name, {AUTO} only samples")
