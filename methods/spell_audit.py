"""What SPELL's own reward cannot tell: gold accuracy, the share of wrong references, the gate against collusion.

Loop reward rises in every run, also where questioner and responder agree on wrong answers (specification,
section 4). So accuracy is measured on questions with known answers, references are audited, a base that writes
too many wrong ones is refused, and a fall of gold accuracy ends the run.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.seeds import derive_seed
from methods.spell_config import AuditConfig, Config
from methods.spell_maths import pass_at_k
from methods.spell_rounds import Cast, ClusterSource, Round, propose
from methods.worlds.world import World
from protocols.messages import ChatMessage, Prompt, SamplingParams
from protocols.policy import PolicyService, Sampled, SampleRequest, TokenizeRequest
from protocols.prompts import response_prompt
from protocols.questions import Cluster, GoldQuestion
from protocols.service import Empty
from protocols.verifier import JudgeItem, JudgeRequest, VerifierService

CALL = 64


@dataclass(frozen=True)
class Judge:
    """A stronger model: it answers from the documents, and says whether an answer matches a reference."""

    policy: PolicyService
    verifier: VerifierService


@dataclass(frozen=True)
class Examiner:
    """Measures a policy against the truth of a world."""

    cast: Cast
    world: World
    config: Config
    judge: Judge | None = None

    async def examine(self, step: int, documents: int) -> dict[str, float]:
        """All that can be measured now, as metrics."""
        metrics = await self.gold_accuracy()
        metrics |= await self.verifier_accuracy()
        metrics |= await self.audit(derive_seed(self.config.seed, "audit", step), documents)
        return metrics

    async def gold_accuracy(self) -> dict[str, float]:
        """Share of right answers to held-out questions, in all, by task and by hops. Same questions each time."""
        questions = self._test_questions()
        clusters = {cluster.question_id: cluster for cluster in self.world.heldout}
        right: dict[str, list[float]] = defaultdict(list)
        for i in range(0, len(questions), CALL):
            part = questions[i : i + CALL]
            for question, score in zip(part, await self._scores(part, clusters), strict=True):
                right["eval/gold"].append(score)
                right[f"eval/gold_{question.hops}hop"].append(score)
                right[f"eval/gold_{question.task.value}"].append(score)
        means = {name: float(np.mean(values)) for name, values in right.items()}
        return means | pass_rates(right["eval/gold"], self.config.test_samples)

    def _test_questions(self) -> list[GoldQuestion]:
        questions = self.world.gold(self.world.heldout)
        rng = np.random.default_rng(derive_seed(self.config.seed, "test questions"))
        chosen = rng.permutation(len(questions))[: self.config.test_questions]
        return [questions[i] for i in sorted(chosen)]

    async def _scores(self, questions: Sequence[GoldQuestion], clusters: dict[str, Cluster]) -> list[float]:
        """Share of right answers to each question, over its samples."""
        prompts = await self._gold_prompts(questions, clusters)
        return await self._best_scores(questions, await self.replies(prompts))

    async def replies(self, prompts: Sequence[Prompt]) -> list[list[str]]:
        """What counts as the policy's replies to each question: `test_samples` of them, as they are."""
        params, count = self.config.answer_sampling, self.config.test_samples
        answer = await self.cast.policy.sample(SampleRequest(prompts=list(prompts), n=count, params=params))
        return [[completion.text for completion in sampled.completions] for sampled in answer.results]

    async def _gold_prompts(self, questions: Sequence[GoldQuestion], clusters: dict[str, Cluster]) -> list[Prompt]:
        """The questions over their documents."""
        prompts = []
        for question in questions:
            shown = clusters[question.question_id].paragraphs
            if self.config.text.gold_on_evidence and question.evidence:
                shown = [shown[i] for i in question.evidence]
            message = ChatMessage(role="user", content=response_prompt(shown, question))
            seed = derive_seed(self.config.seed, "test answers", question.id)
            prompts.append(Prompt(messages=[message], seed=seed, uid=question.id))
        return await shortened(self.cast.policy, prompts, self.config.max_input_tokens)

    async def _best_scores(self, questions: Sequence[GoldQuestion], replies: Sequence[Sequence[str]]) -> list[float]:
        """Share of right replies per question; a reply may match the answer or any of its aliases."""
        items, owners = [], []
        for q, (question, texts) in enumerate(zip(questions, replies, strict=True)):
            for r, text in enumerate(texts):
                for reference in (question.answer, *question.aliases):
                    items.append(JudgeItem(uid=f"{q}/{r}", question=question, reply=text, reference=reference))
                    owners.append((q, r))
        best: dict[tuple[int, int], float] = defaultdict(float)
        for owner, score in zip(owners, await self._match(items), strict=True):
            best[owner] = max(best[owner], score)
        return [float(np.mean([best[q, r] for r in range(len(texts))])) for q, texts in enumerate(replies)]

    async def _match(self, items: list[JudgeItem]) -> list[float]:
        """Whether answers match references: by the rule, or by the judge too if there is one (appendix E.2)."""
        if self.judge is None:
            judgements = (await self.cast.verifier.judge(JudgeRequest(items=items, votes=0))).judgements
        else:
            params = SamplingParams(max_tokens=self.config.vote_sampling.max_tokens, temperature=0.0)
            request = JudgeRequest(items=items, votes=1, params=params)
            judgements = (await self.judge.verifier.judge(request)).judgements
        return [judgement.score for judgement in judgements]

    async def verifier_accuracy(self) -> dict[str, float]:
        """Share of votes that are right, over as many equal as different pairs of answers."""
        pairs = self.world.verdict_pairs()
        if not pairs or self.config.verifier.mode == "rules":
            return {}
        items = [
            JudgeItem(
                uid=str(i),
                question=question,
                reply=reply,
                reference=reference,
                seed=derive_seed(self.config.seed, "test votes", i),
            )
            for i, (question, reply, reference, _) in enumerate(pairs)
        ]
        request = JudgeRequest(items=items, votes=self.config.votes, params=self.config.vote_sampling)
        judgements = (await self.cast.verifier.judge(request)).judgements
        right: dict[bool, list[float]] = {True: [], False: []}
        for judgement, (*_, same) in zip(judgements, pairs, strict=True):
            right[same] += [float(vote == same) for vote in judgement.votes]
        if not right[True] or not right[False]:
            return {}
        return {"eval/verifier": float((np.mean(right[True]) + np.mean(right[False])) / 2)}

    async def audit(self, seed: int, documents: int) -> dict[str, float]:
        """Shares of fresh proposals that are usable, and among those of known truth, that are right."""
        weights = self.config.task_weights
        source = ClusterSource(self.world.training, weights, seed, drawn={})
        wanted = self.config.audit.proposals
        rounds: list[Round] = []
        truths: list[bool] = []
        # Where no truth is to be had, more proposals would not bring any.
        while len(truths) < wanted and len(rounds) < (5 * wanted if truths else wanted):
            clusters = source.draw(CALL, busy=set())
            uids = [f"audit-{len(rounds) + i}" for i in range(len(clusters))]
            fresh = await propose(self.cast, self.config, clusters, uids, seed, documents)
            rounds += fresh
            truths += await self.truths(fresh)
        usable = [round_ for round_ in rounds if round_.fate is None]
        metrics = {"audit/usable": len(usable) / len(rounds), "audit/audited": float(len(truths))}
        if truths:
            metrics |= {"audit/right": float(np.mean(truths)), "audit/wrong": 1 - float(np.mean(truths))}
        return metrics

    async def truths(self, rounds: Sequence[Round]) -> list[bool]:
        """For each usable proposal whose truth can be known, whether its reference is right."""
        usable = [round_ for round_ in rounds if round_.proposal.status == "ok"]
        known = [self.world.audit(round_.cluster, round_.proposal) for round_ in usable]
        open_ = [round_ for round_, truth in zip(usable, known, strict=True) if truth is None]
        judged = await self._ask_judge(open_)
        return [truth for truth in known if truth is not None] + judged

    async def _ask_judge(self, rounds: Sequence[Round]) -> list[bool]:
        """Let a stronger model answer from the same documents; right is what most of its answers match."""
        if self.judge is None or not rounds:
            return []
        prompts = []
        for round_ in rounds:
            shown = [round_.cluster.paragraphs[i] for i in round_.proposal.evidence]
            text = response_prompt(shown, round_.proposal.as_question())
            seed = derive_seed(self.config.seed, "judge", round_.proposal.uid)
            prompts.append(
                Prompt(messages=[ChatMessage(role="user", content=text)], seed=seed, uid=round_.proposal.uid)
            )
        context = (await self.judge.policy.info(Empty())).context_length
        params = self.config.answer_sampling
        prompts = await shortened(self.judge.policy, prompts, max(context // 2, context - params.max_tokens))
        request = SampleRequest(prompts=prompts, n=self.config.audit.judge_samples, params=params)
        results: list[Sampled] = (await self.judge.policy.sample(request)).results
        items = [
            JudgeItem(
                uid=f"{round_.proposal.uid}/{i}",
                question=round_.proposal.as_question(),
                reply=completion.text,
                reference=round_.proposal.answer,
            )
            for round_, sampled in zip(rounds, results, strict=True)
            for i, completion in enumerate(sampled.completions)
        ]
        scores = np.array(await self._match(items)).reshape(len(rounds), -1)
        return [bool(share > 0.5) for share in scores.mean(axis=1)]


def pass_rates(shares: Sequence[float], samples: int) -> dict[str, float]:
    """Mean pass@k of questions with a share of right samples each, for every power of two up to their number."""
    powers = [2**i for i in range(1, samples.bit_length()) if shares]
    return {
        f"eval/pass_at_{k}": float(np.mean([pass_at_k(samples, round(share * samples), k) for share in shares]))
        for k in powers
    }


async def shortened(policy: PolicyService, prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """The prompts as tokens; those over the limit lose their middle (SPELL appendix E.2)."""
    tokens = (await policy.tokenize(TokenizeRequest(prompts=list(prompts)))).tokens
    return [
        Prompt(tokens=without_middle(ids.array, limit), seed=prompt.seed, uid=prompt.uid)
        for prompt, ids in zip(prompts, tokens, strict=True)
    ]


def without_middle(tokens: np.ndarray, limit: int) -> np.ndarray:
    """The first and the last half of the limit, if there are more tokens than that."""
    if len(tokens) <= limit:
        return tokens
    head = limit // 2
    return np.concatenate([tokens[:head], tokens[len(tokens) - (limit - head) :]])


def gate(metrics: Mapping[str, float], config: Config) -> str:
    """Why a base must not be trained, or nothing. It must write enough right references (section 4).

    A run on gold questions is trained on none of its own references.
    """
    least = config.audit.least_right
    if config.proposals == "gold" or metrics.get("audit/right", 1.0) >= least:
        return ""
    return (
        f"start gate: only {metrics['audit/right']:.0%} of {metrics['audit/audited']:.0f} audited reference answers"
        f" are right, {least:.0%} are needed; such a base teaches itself its own mistakes. Fine-tune"
        " the questioner's role first, or set audit.enforce=false to train regardless"
    )


def fallen(accuracy: float, best: float, falls: int, config: AuditConfig) -> tuple[float, int, str]:
    """The best gold accuracy so far, the number of audits in a row that lie clearly below it, and, from the
    second on, why the run must end."""
    if accuracy >= best - config.fall:
        return max(best, accuracy), 0, ""
    falls += 1
    reason = f"re-audit: gold accuracy {accuracy:.3f} is more than {config.fall:g} below its best, {best:.3f}, twice"
    return best, falls, reason + " in a row" if falls >= 2 else ""
