"""Rewards by rule: whether the final answer of a reply is the right one."""

import asyncio

from actors.actor import Actor
from actors.in_turn import InTurn
from actors.reward_model.matching import MathMatcher, texts_match
from protocols.errors import BadInput, Stale
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
from protocols.service import Empty


class RuleRewardActor(Actor, RewardModelService):
    """A reward model without weights."""

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self._config = config
        self._matcher = MathMatcher()
        self._in_turn = InTurn()

    async def setup(self) -> None:
        """Start the process that compares. Raises Unavailable when it does not answer."""
        if self._config.match == "math":
            await asyncio.to_thread(self._matcher.start)

    async def close(self) -> None:
        """End the process that compares."""
        await super().close()
        self._matcher.close()

    async def info(self, request: Empty) -> RewardModelInfo:
        """There is no model."""
        return RewardModelInfo(
            kind="rules",
            model="",
            parameters=0,
            trainable_parameters=0,
            tokenizer="",
            max_tokens=self._config.max_tokens,
            version=0,
        )

    async def score(self, request: RewardRequest) -> RewardResponse:
        """1 for a right answer, 0 for another or none. Raises BadInput for a reply without text or reference."""
        for reply in request.replies:
            if not reply.reference:
                raise BadInput(f"reply {reply.uid!r}: reference: expected the right answer to compare with")
            if reply.tokens is not None and not reply.text:
                raise BadInput(f"reply {reply.uid!r}: text: expected the reply as text, a rule reads no tokens")
        # Algebra takes its time; other calls are answered meanwhile.
        scores = await self._in_turn(lambda: asyncio.to_thread(self._scores, request))
        return RewardResponse(scores=scores)

    def _scores(self, request: RewardRequest) -> list[ReplyScore]:
        return [self._score(reply) for reply in request.replies]

    def _score(self, reply: Reply) -> ReplyScore:
        if self._config.match == "math":
            right, answer = self._matcher.compare(reply.text, reply.reference)
            return ReplyScore(uid=reply.uid, score=float(right), answer=answer)
        right = texts_match(reply.text, reply.reference, self._config.match)
        return ReplyScore(uid=reply.uid, score=float(right))

    async def train(self, request: LearnRequest) -> LearnResponse:
        """Rules do not learn."""
        raise Stale("train: a reward model of kind rules has no weights")
