"""What SPELL tells its reader: metrics of a step, sampled texts, the result of a run."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cluster.steps import Step
from cluster.summary import Summary, SummaryRow
from methods.spell_audit import gate
from methods.spell_batch import ROLES, Batch, Sample, dump_row, questioner_sample
from methods.spell_config import Config
from methods.spell_rounds import Fate, Round
from methods.worlds.world import World
from protocols.policy import DetokenizeRequest, PolicyService

PANELS = {
    "Loop reward and truth": ["reward/responder", "eval/gold", "audit/wrong"],
    "Gold accuracy": ["eval/gold_1hop", "eval/gold_2hop", "eval/verifier"],
    "Difficulty": ["curriculum/two_hop", "curriculum/documents", "curriculum/history"],
    "What becomes of proposals": [f"fate/{fate.value}" for fate in Fate],
}


def log_rounds(step: Step, rounds: Sequence[Round], batch: Batch, starved: bool, world: World) -> None:
    """Metrics of one step's questions and of what is trained on."""
    answered = [round_ for round_ in rounds if round_.rewards]
    fates = Counter(round_.fate for round_ in rounds)
    metrics: dict[str, float] = {
        "rounds/asked": len(rounds),
        "rounds/good": batch.good,
        "rounds/surplus": batch.surplus,
        "rounds/keep_rate": fates[Fate.GOOD] / max(1, len(rounds)),
        "rounds/starved": float(starved),
    }
    metrics |= {f"fate/{fate.value}": fates[fate] / max(1, len(rounds)) for fate in Fate}
    metrics |= {f"batch/{role}": len(batch.of(role)) for role in ROLES}
    metrics |= {f"batch/{role}_{task}": n for (role, task), n in batch.counts().items()}
    for role in ROLES:
        metrics |= _mean(f"reward/{role}", [sample.reward for sample in batch.of(role)])
    # The responder's reward over all questions that were answered, not only over those that teach.
    metrics |= _mean("reward/responder", [reward for round_ in answered for reward in round_.rewards])
    metrics |= _agreement(answered, world) | _curriculum(rounds, world) | _lengths(batch)
    metrics |= _audited(rounds, world)
    step.log(metrics)
    step.sampled(sum(round_.sampled_tokens() for round_ in rounds))


def _agreement(answered: Sequence[Round], world: World) -> dict[str, float]:
    """How far the rule, the votes and the truth agree on answers."""
    rule, reward, vote, share = [], [], [], []
    for round_ in answered:
        for judgement, given in zip(round_.judgements, round_.rewards, strict=True):
            if judgement.majority is not None:
                vote.append(float(judgement.majority == judgement.rule_score))
                share.append(judgement.agree_share or 0.0)
            same = world.same(judgement.parsed or "", round_.proposal.answer)
            if same is not None and judgement.parsed is not None:
                rule.append(float(judgement.rule_score == same))
                reward.append(float(given == same))
    return (
        _mean("verify/majority_agrees_with_rule", vote)
        | _mean("verify/majority_share", share)
        | _mean("verify/rule_agrees_with_truth", rule)
        | _mean("verify/reward_agrees_with_truth", reward)
    )


def _curriculum(rounds: Sequence[Round], world: World) -> dict[str, float]:
    """How hard the questions are and how much their writer read."""
    usable = [round_ for round_ in rounds if round_.proposal.question]
    hops = [hops for round_ in usable if (hops := world.hops(round_.proposal.question)) is not None]
    letters = Counter(round_.proposal.answer for round_ in usable if round_.proposal.options)
    return (
        _mean("curriculum/two_hop", [float(hop >= 2) for hop in hops])
        | _mean("curriculum/documents", [len(round_.proposal.evidence) for round_ in rounds])
        | _mean("curriculum/history", [round_.proposal.history_used for round_ in rounds])
        | _mean("curriculum/dropped_documents", [round_.proposal.dropped_documents for round_ in rounds])
        | _mean("curriculum/accuracy", [round_.accuracy for round_ in rounds if round_.rewards])
        | {f"letters/{letter}": n / letters.total() for letter, n in sorted(letters.items())}
    )


def _audited(rounds: Sequence[Round], world: World) -> dict[str, float]:
    """Share of wrong references among the questions that were put to the responder."""
    truths = [world.audit(round_.cluster, round_.proposal) for round_ in rounds if round_.rewards]
    return _mean("audit/wrong_in_loop", [float(not truth) for truth in truths if truth is not None])


def _lengths(batch: Batch) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for role in ROLES:
        samples = batch.of(role)
        metrics |= _mean(f"length/{role}", [len(sample.completion.tokens) for sample in samples])
        metrics |= _mean(f"length/{role}_prompt", [len(sample.prompt_tokens) for sample in samples])
    return metrics


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.mean(values))} if values else {}


async def log_samples(
    step: Step, rounds: Sequence[Round], batch: Batch, config: Config, policy: PolicyService
) -> None:
    """Whole groups of the first questions of the batch: question, answers and votes, with their prompts.

    Where nothing can be learned from, what the questioner wrote, so that one can see why.
    """
    chosen = dumped(batch, config.dump_questions)
    if not batch.samples:
        written = [round_ for round_ in rounds if round_.proposal.completion][: config.dump_questions]
        chosen = [questioner_sample(round_, round_.questioner_reward(config), 0.0) for round_ in written]
    if not chosen:
        return
    request = DetokenizeRequest(tokens=[sample.prompt_tokens for sample in chosen])
    texts = (await policy.detokenize(request)).texts
    step.samples(dump_row(sample, text) for sample, text in zip(chosen, texts, strict=True))


def dumped(batch: Batch, questions: int) -> list[Sample]:
    """The samples of the first questions, some rejected ones among them, and some votes."""
    first = list(dict.fromkeys(sample.uid for sample in batch.of("questioner")))
    if len(first) > questions:
        good = first[: batch.good][: questions - questions // 3]
        first = good + first[batch.good :][: questions - len(good)]
    answered = {sample.uid.split("/")[0] for sample in batch.of("responder")}
    kept = set(first) | set(sorted(answered)[: questions - len(first)])
    votes = batch.of("verifier")[: 4 * questions]
    return [s for s in batch.samples if s.role != "verifier" and s.uid.split("/")[0] in kept] + votes


def summary(rows: Sequence[Mapping[str, float]], world: World, config: Config, finished: str) -> Summary:
    """Before and after, on held-out questions; the loop's own reward beside it, because it is not accuracy."""
    notes = [finished] if finished else []
    notes += world.notes()
    base = dict(rows[0]) if rows else {}
    warning = gate(base, config)
    if warning and warning != finished:
        notes.append(f"not enforced: {warning}")
    if not base.get("audit/audited"):
        notes.append(
            "No reference could be audited: neither truth nor a judge (audit.judge=) is at hand, so the start gate"
            " was open. Loop reward alone does not show learning."
        )
    if _mostly_overlong(rows):
        notes.append(
            "Most questions could not be asked: their prompts exceed the model's context or"
            f" max_input_tokens={config.max_input_tokens}. text.passage_words and text.cluster_size make clusters"
            " shorter."
        )
    measures = {
        "gold accuracy, held out": "eval/gold",
        "gold accuracy, 1 hop": "eval/gold_1hop",
        "gold accuracy, 2 hops": "eval/gold_2hop",
        "verifier accuracy": "eval/verifier",
        "wrong references among audited": "audit/wrong",
        "usable proposals": "audit/usable",
        "2-hop share of questions": "curriculum/two_hop",
        "loop reward of answers": "reward/responder",
    }
    lines = [_before_after(label, name, rows) for label, name in measures.items()]
    title = f"SPELL on {'the fact ledger' if config.world == 'ledger' else config.text.documents}"
    return Summary(title=title, rows=[line for line in lines if line], notes=notes, panels=PANELS)


def _mostly_overlong(rows: Sequence[Mapping[str, float]]) -> bool:
    shares = [row["fate/overlong"] for row in rows if "fate/overlong" in row]
    return bool(shares) and float(np.mean(shares)) > 0.5


def _before_after(label: str, name: str, rows: Sequence[Mapping[str, float]]) -> SummaryRow | None:
    found = [(int(row["step"]), row[name]) for row in rows if row.get(name) is not None]
    if not found:
        return None
    (first, before), (last, after) = found[0], found[-1]
    return SummaryRow(name=label, before=before, after=after, note=f"{name}, steps {first} and {last}")
