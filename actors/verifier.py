"""The verifier: judges replies against references by rules, by votes of a policy, or both."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actors.actor import Actor
from actors.policy.chat import spoken
from actors.rules import parse_answer, rule_score
from actors.votes import majority, parse_vote
from protocols.endings import ending_logprobs
from protocols.errors import BadInput
from protocols.messages import ChatMessage, Prompt
from protocols.policy import PolicyService, Sampled, SampleRequest, TokenizeRequest
from protocols.prompts import verdict_prompt
from protocols.questions import Task
from protocols.service import Empty
from protocols.verifier import (
    COMPARE,
    ComparedItem,
    CompareRequest,
    CompareResponse,
    Comparison,
    JudgeItem,
    Judgement,
    JudgeRequest,
    JudgeResponse,
    VerifierConfig,
    VerifierService,
)


class VerifierActor(Actor, VerifierService):
    """The verifier's role over a policy handle; with rules alone it needs none."""

    def __init__(self, config: VerifierConfig, policy: PolicyService | None) -> None:
        super().__init__()
        self._config = config
        self._policy = policy

    async def setup(self) -> None:
        """Raises BadInput if votes are wanted and there is no policy to cast them."""
        if self._config.mode != "rules" and self._policy is None:
            raise BadInput(f"verifier.mode: {self._config.mode!r} needs a policy; only `rules` goes without")

    async def judge(self, request: JudgeRequest) -> JudgeResponse:
        """Read each reply's answer, score it by rule, and let the policy vote on it."""
        judged = [self._by_rule(item) for item in request.items]
        asked = [i for i, item in enumerate(request.items) if self._votes_on(item, judged[i], request.votes)]
        cast = await self._vote([request.items[i] for i in asked], [judged[i] for i in asked], request)
        for i, sampled in zip(asked, cast, strict=True):
            judged[i] = _with_votes(judged[i], sampled, by_rule_too=self._config.mode == "both")
        return JudgeResponse(judgements=judged)

    def _by_rule(self, item: JudgeItem) -> Judgement:
        task = item.question.task
        parsed = parse_answer(task, item.reply)
        score = rule_score(task, parsed, item.reference, self._config.cover)
        return Judgement(uid=item.uid, parsed=parsed, score=score, rule_score=score)

    def _votes_on(self, item: JudgeItem, judgement: Judgement, votes: int) -> bool:
        if self._config.mode == "rules" or judgement.parsed is None or not votes:
            return False
        return self._config.vote_on_choice or item.question.task is not Task.CHOICE

    async def _vote(
        self, items: Sequence[JudgeItem], judged: Sequence[Judgement], request: JudgeRequest
    ) -> list[Sampled]:
        if not items:
            return []
        assert self._policy is not None
        prompts = [
            Prompt(
                messages=[ChatMessage(role="user", content=_text(item, judgement))],
                seed=item.seed,
                uid=item.uid,
            )
            for item, judgement in zip(items, judged, strict=True)
        ]
        response = await self._policy.sample(SampleRequest(prompts=prompts, n=request.votes, params=request.params))
        return response.results

    async def compare(self, request: CompareRequest) -> CompareResponse:
        """Ask the policy for both orders of each pair, by the log-probs of the two names."""
        if self._policy is None:
            raise BadInput("compare: this verifier goes by rules alone; expected one with a policy")
        names = await self._names(self._policy)
        first, second = self._config.names
        prompts = [_question(item, first, second, swapped) for item in request.items for swapped in (False, True)]
        asked = (await self._policy.tokenize(TokenizeRequest(prompts=prompts))).tokens
        room = (await self._policy.info(Empty())).context_length - max(map(len, names))
        fitting = [i for i in range(len(request.items)) if max(map(len, asked[2 * i : 2 * i + 2])) <= room]
        comparisons = [Comparison(uid=item.uid) for item in request.items]
        if not fitting:
            return CompareResponse(comparisons=comparisons)
        orders = [asked[2 * i + swapped].array for i in fitting for swapped in (0, 1)]
        logits, version = await ending_logprobs(self._policy, orders, names)
        logits_B22 = logits.reshape(-1, 2, 2)
        # In the second order the first reply bears the second name.
        odds_B2 = (logits_B22[:, :, 0] - logits_B22[:, :, 1]) * [1, -1]
        chances_B2 = np.exp(-np.logaddexp(0.0, -odds_B2))
        for i, chances in zip(fitting, chances_B2.tolist(), strict=True):
            found = {"preference": sum(chances) / 2, "shown_first": chances[0], "shown_second": chances[1]}
            comparisons[i] = comparisons[i].model_copy(update=found)
        return CompareResponse(comparisons=comparisons, version=version)

    async def _names(self, policy: PolicyService) -> list[NDArray[np.int32]]:
        """Tokens of what compared replies are called. Raises BadInput when they do not tell them apart."""
        prompts = [Prompt(text=name, uid=f"verifier.names {name!r}") for name in self._config.names]
        told = (await policy.tokenize(TokenizeRequest(prompts=prompts, continues=True))).tokens
        one, other = (tokens.array.tolist() for tokens in told)
        if one == other[: len(one)] or other == one[: len(other)]:
            raise BadInput(
                f"verifier.names: got {self._config.names}, of which one's tokens begin the other's in the policy's"
                " model; expected words that its tokenizer tells apart"
            )
        return [tokens.array for tokens in told]


def _question(item: ComparedItem, first: str, second: str, swapped: bool) -> Prompt:
    one, other = (item.other, item.one) if swapped else (item.one, item.other)
    content = COMPARE.format(prompt=spoken(item.messages), one=one, other=other, first=first, second=second)
    return Prompt(messages=[ChatMessage(role="user", content=content)], uid=item.uid)


def _text(item: JudgeItem, judgement: Judgement) -> str:
    return verdict_prompt(item.question, judgement.parsed or "", item.reference)


def _with_votes(judgement: Judgement, sampled: Sampled, *, by_rule_too: bool) -> Judgement:
    votes = [parse_vote(completion.text) for completion in sampled.completions]
    winner, share = majority(votes)
    voted = float(winner == 1)
    return judgement.model_copy(
        update={
            "score": max(voted, judgement.rule_score) if by_rule_too else voted,
            "votes": votes,
            "majority": winner,
            "agree_share": share,
            "prompt_tokens": sampled.prompt_tokens,
            "completions": sampled.completions,
        }
    )
