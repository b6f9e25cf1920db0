"""How well a model plays the three roles on some documents, measured with cloze questions.

Truth is looked up in the text, so no labels and no judge are needed. The questions of `Exam` are the same for
every model, and it asks through the real questioner and verifier.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from methods.worlds.cloze import gold_cloze, reference_right, usable_spans
from methods.worlds.lessons import Pair, Span, draw_pair
from protocols.messages import ChatMessage, Prompt, SamplingParams
from protocols.policy import PolicyService, SampleRequest
from protocols.prompts import response_prompt
from protocols.questioner import ProposeRequest, QuestionerService
from protocols.questions import Cluster, GoldQuestion, Proposal, ProposalStatus, Question, Task
from protocols.verifier import JudgeItem, JudgeRequest, VerifierService

SAMPLES = 8
READABLE = {
    ProposalStatus.OK,
    ProposalStatus.DUPLICATE,
    ProposalStatus.UNSUPPORTED,
}


@dataclass(frozen=True)
class Exam:
    """The roles of a model, and how its replies are sampled."""

    policy: PolicyService
    questioner: QuestionerService
    verifier: VerifierService
    params: SamplingParams
    seed: int = 0

    async def take(self, clusters: Sequence[Cluster], questions: int) -> dict[str, float]:
        """All measures for clusters of one task; `questions` are asked per role."""
        task, rng = clusters[0].task, random.Random(f"exam {self.seed}")
        by_name = {cluster.question_id: cluster for cluster in clusters}
        proposals = await self.proposals(clusters, questions)
        measures = proposal_measures(proposals, by_name)
        usable = [(p.as_question(), p.answer, by_name[p.question_id]) for p in proposals if p.status == "ok"]
        measures |= _prefixed("own", await self.answers(usable))
        gold = [g for cluster in clusters for g in gold_cloze(cluster, 1 + questions // len(clusters), rng)]
        chosen = rng.sample(gold, min(questions, len(gold)))
        measures |= _prefixed("gold", await self.answers([_with_cluster(g, by_name) for g in chosen]))
        if task is not Task.CHOICE:
            measures |= await self.verdicts(draw_pairs(clusters, questions, rng))
        return measures

    async def proposals(self, clusters: Sequence[Cluster], count: int) -> list[Proposal]:
        """One proposal per cluster, again and again until there are `count`."""
        found: list[Proposal] = []
        while len(found) < count:
            part = list(clusters[: count - len(found)])
            uids = [f"{len(found) + i}" for i in range(len(part))]
            request = ProposeRequest(clusters=part, uids=uids, seed=self.seed, params=self.params)
            found += (await self.questioner.propose(request)).proposals
        return found

    async def answers(self, asked: Sequence[tuple[Question, str, Cluster]]) -> dict[str, float]:
        """Answers to questions over their clusters: how many are right by rule, and how they spread."""
        if not asked:
            return {}
        prompts = [
            Prompt(messages=[ChatMessage(role="user", content=response_prompt(cluster.paragraphs, question))], seed=i)
            for i, (question, _, cluster) in enumerate(asked)
        ]
        request = SampleRequest(prompts=prompts, n=SAMPLES, params=self.params)
        results = (await self.policy.sample(request)).results
        items = [
            JudgeItem(uid=str(i), question=question, reply=completion.text, reference=reference)
            for i, ((question, reference, _), sampled) in enumerate(zip(asked, results, strict=True))
            for completion in sampled.completions
        ]
        judgements = (await self.verifier.judge(JudgeRequest(items=items, votes=0))).judgements
        right_NG = np.array([judgement.score for judgement in judgements]).reshape(-1, SAMPLES)
        means_N = right_NG.mean(axis=1)
        return {
            "right": float(means_N.mean()),
            "readable": float(np.mean([judgement.parsed is not None for judgement in judgements])),
            "spread": float(np.mean((means_N > 0) & (means_N < 1))),
            "never": float(np.mean(means_N == 0)),
            "always": float(np.mean(means_N == 1)),
            "prompt_tokens": float(np.mean([len(sampled.prompt_tokens) for sampled in results])),
        }

    async def verdicts(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Share of votes that are right, over equal and over different pairs of answers, and its mean."""
        items = [
            JudgeItem(
                uid=str(i),
                question=Question(task=pair.task, question=pair.question),
                reply=pair.reply,
                reference=pair.reference,
                seed=i,
            )
            for i, pair in enumerate(pairs)
        ]
        request = JudgeRequest(items=items, votes=4, params=self.params)
        judgements = (await self.verifier.judge(request)).judgements
        right: dict[bool, list[bool]] = {True: [], False: []}
        for judgement, pair in zip(judgements, pairs, strict=True):
            right[pair.same] += [vote == pair.same for vote in judgement.votes]
        same, differ = (float(np.mean(votes)) if votes else 0.0 for votes in (right[True], right[False]))
        return {"verdict_same": same, "verdict_different": differ, "verdict": (same + differ) / 2}


def proposal_measures(proposals: Sequence[Proposal], clusters: dict[str, Cluster]) -> dict[str, float]:
    """Shares of proposals that can be read, are usable, are cloze questions, have right references, are new."""
    status = Counter(proposal.status for proposal in proposals)
    usable = [proposal for proposal in proposals if proposal.status is ProposalStatus.OK]
    truths = [reference_right(proposal, clusters[proposal.question_id].paragraphs) for proposal in usable]
    known = [truth for truth in truths if truth is not None]
    different = {(proposal.question_id, proposal.question) for proposal in usable}
    lengths = [len(proposal.prompt_tokens) for proposal in proposals if proposal.prompt_tokens is not None]
    return {
        "readable": sum(status[name] for name in READABLE) / len(proposals),
        "usable": len(usable) / len(proposals),
        "cloze": len(known) / max(len(usable), 1),
        "references_right": sum(known) / max(len(known), 1),
        "repeated": 1 - len(different) / max(len(usable), 1),
        "question_prompt_tokens": float(np.mean(lengths)),
        **{f"status_{name}": count / len(proposals) for name, count in status.items() if name != "ok"},
    }


def draw_pairs(clusters: Sequence[Cluster], count: int, rng: random.Random) -> list[Pair]:
    """Pairs of answers to questions about the clusters, about as many equal as different."""
    task = clusters[0].task
    spans = [[Span(*parts) for parts in usable_spans(task, cluster.paragraphs)] for cluster in clusters]
    known = [found for found in spans if len(found) > 1]
    return [draw_pair(rng, task, rng.choice(known)) for _ in range(count)]


def _with_cluster(gold: GoldQuestion, clusters: dict[str, Cluster]) -> tuple[Question, str, Cluster]:
    return gold, gold.answer, clusters[gold.question_id]


def _prefixed(prefix: str, measures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in measures.items()}
