"""The verifier: judges replies against references by rules, by votes of a policy, or both."""

from collections.abc import Sequence

from actors.actor import Actor
from actors.rules import parse_answer, rule_score
from actors.votes import majority, parse_vote
from protocols.errors import BadInput
from protocols.messages import ChatMessage, Prompt
from protocols.policy import PolicyService, Sampled, SampleRequest
from protocols.prompts import verdict_prompt
from protocols.questions import Task
from protocols.verifier import (
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
