"""Tests of SEFT: how good the policy's replies are, and whether the reviser may be trusted with them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.seeds import derive_seed
from methods.seft_config import Acceptance, Config, Drift
from methods.seft_data import Task, closeness
from methods.seft_rounds import Cast
from methods.seft_triples import Triple, edit_distance
from methods.worlds import sorting
from protocols.messages import FinishReason, Prompt
from protocols.policy import SampleRequest
from protocols.reviser import LABELS, ReviseItem, ReviseRequest, Revision
from protocols.reward_model import Reply, RewardRequest
from protocols.verifier import ComparedItem, CompareRequest, Comparison, VerifierService

PER_CALL = 512


@dataclass(frozen=True)
class Replied:
    """The policy's most likely reply to each task, and what it is worth."""

    texts: list[str]
    scores: list[float]
    """NaN where there is nothing to compare with."""


async def most_likely(cast: Cast, config: Config, tasks: Sequence[Task]) -> Replied:
    """Greedy replies, scored."""
    texts: list[str] = []
    ended: list[bool] = []
    for start in range(0, len(tasks), PER_CALL):
        piece = tasks[start : start + PER_CALL]
        prompts = [Prompt(messages=one.messages, uid=one.id) for one in piece]
        answer = await cast.policy.sample(SampleRequest(prompts=prompts, params=config.greedy))
        completions = [result.completions[0] for result in answer.results]
        texts += [one.text for one in completions]
        ended += [one.finish_reason is FinishReason.STOP for one in completions]
    return Replied(texts, await scores_of(cast, config, tasks, texts, ended))


async def scores_of(
    cast: Cast, config: Config, tasks: Sequence[Task], texts: Sequence[str], ended: Sequence[bool] = ()
) -> list[float]:
    """By the reward model if there is one, else by closeness to the reference; NaN without either.

    `ended`: which texts are whole; all, if nothing is said.
    """
    if cast.reward is None or config.world:
        return [
            closeness(config, task, text) if task.reference else math.nan
            for task, text in zip(tasks, texts, strict=True)
        ]
    found: list[float] = []
    for start in range(0, len(tasks), PER_CALL):
        places = range(start, min(start + PER_CALL, len(tasks)))
        prompts = [Prompt(messages=tasks[i].messages) for i in places]
        replies = [
            Reply(uid=tasks[i].id, prompt=prompt, text=texts[i], ended=not ended or ended[i])
            for i, prompt in zip(places, prompts, strict=True)
        ]
        found += [one.score for one in (await cast.reward.score(RewardRequest(replies=replies))).scores]
    return found


async def labelled(
    cast: Cast, config: Config, tasks: Sequence[Task], texts: Sequence[str], *, write: bool
) -> list[Revision]:
    """What the reviser makes of replies."""
    assert cast.reviser is not None
    found: list[Revision] = []
    for start in range(0, len(tasks), PER_CALL):
        items = [
            ReviseItem(uid=task.id, messages=task.messages, reply=text)
            for task, text in zip(tasks[start : start + PER_CALL], texts[start : start + PER_CALL], strict=True)
        ]
        request = ReviseRequest(items=items, params=config.greedy, labels_only=not write)
        found += (await cast.reviser.revise(request)).revisions
    return found


async def compared(
    judge: VerifierService, tasks: Sequence[Task], ones: Sequence[str], others: Sequence[str]
) -> list[Comparison]:
    """A judge's view of two replies to each task."""
    found: list[Comparison] = []
    for start in range(0, len(tasks), PER_CALL):
        items = [
            ComparedItem(uid=tasks[i].id, messages=tasks[i].messages, one=ones[i], other=others[i])
            for i in range(start, min(start + PER_CALL, len(tasks)))
        ]
        found += (await judge.compare(CompareRequest(items=items))).comparisons
    return found


async def worth_of(cast: Cast, config: Config, tasks: Sequence[Task], replied: Replied) -> dict[str, float]:
    """Score, share that equals the reference, length; how many replies the reviser would keep, and how many of these
    are as good as the reference."""
    exact = [text.strip() == task.reference.strip() for task, text in zip(tasks, replied.texts, strict=True)]
    metrics = {
        "score": mean_of_known(replied.scores),
        "exact": share(same for same, task in zip(exact, tasks, strict=True) if task.reference),
        "words": float(np.mean([len(text.split()) for text in replied.texts])),
    }
    if cast.reviser is not None and config.reviser.adaptive:
        labels = [one.label for one in await labelled(cast, config, tasks, replied.texts, write=False)]
        metrics |= {f"label_{label}": labels.count(label) / len(labels) for label in LABELS}
        if config.world or cast.reward is not None:
            # Closeness in words would find nothing but the reference itself as good.
            best = await scores_of(cast, config, tasks, [task.reference for task in tasks])
            kept = [i for i, label in enumerate(labels) if label == "no" and tasks[i].reference]
            good = [replied.scores[i] >= best[i] or replied.texts[i] == tasks[i].reference for i in kept]
            metrics["no_precision"] = share(good)
    return metrics


def mean_of_known(scores: Sequence[float]) -> float:
    """Mean of the numbers among them; NaN if there are none."""
    known = [one for one in scores if not math.isnan(one)]
    return float(np.mean(known)) if known else math.nan


@dataclass(frozen=True)
class Revised:
    """One reply of known worth with its revision."""

    label: str
    """What it should be labelled."""
    said: str
    before: float
    after: float
    copied: bool
    distance: float
    """Normalised edit distance of reply and revision."""


async def test_reviser(cast: Cast, config: Config, triples: Sequence[Triple], best: dict[str, str]) -> list[Revised]:
    """Replies to annotated prompts that the reviser has not seen; `best`: of each source, the best reply."""
    tasks = [Task(id=one.id, messages=one.messages, reference=best[one.source_id]) for one in triples]
    replies = [one.reply for one in triples]
    revisions = await labelled(cast, config, tasks, replies, write=True)
    before = await scores_of(cast, config, tasks, replies)
    after = await scores_of(cast, config, tasks, [one.text for one in revisions])
    return [
        Revised(
            label=one.label,
            said=revision.label or "",
            before=old,
            after=old if revision.text == one.reply else new,
            copied=revision.text == one.reply,
            distance=edit_distance(one.reply, revision.text)[1],
        )
        for one, revision, old, new in zip(triples, revisions, before, after, strict=True)
    ]


def reviser_metrics(found: Sequence[Revised]) -> dict[str, float]:
    """Label accuracy and macro-F1, harm to the best replies, gain of the others, copies among written texts."""
    metrics = {"accuracy": share(one.said == one.label for one in found), "macro_f1": macro_f1(found)}
    metrics["harm"] = share(one.after < one.before for one in found if one.label == "no")
    for label in ("minor", "major"):
        gains = [one.after - one.before for one in found if one.label == label]
        metrics[f"gain_{label}"] = float(np.mean(gains)) if gains else math.nan
    metrics["copies"] = share(one.copied for one in found if one.said != "no")
    metrics["distance"] = float(np.mean([one.distance for one in found])) if found else math.nan
    return metrics


def share(of: Iterable[bool]) -> float:
    """Mean of truth values; NaN of none."""
    values = list(of)
    return float(np.mean(values)) if values else math.nan


def macro_f1(found: Sequence[Revised]) -> float:
    """Mean over the labels that occur of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in LABELS:
        right = sum(one.said == one.label == label for one in found)
        wrong = sum((one.said == label) != (one.label == label) for one in found)
        if any(one.label == label for one in found):
            scores.append(2 * right / (2 * right + wrong) if right else 0.0)
    return float(np.mean(scores)) if scores else math.nan


def refusal(metrics: dict[str, float], limits: Acceptance) -> str:
    """Why a reviser is not accepted; empty if it is. What could not be measured does not count against it."""
    if metrics["reviser/harm"] > limits.harm:
        return f"harm: it makes {metrics['reviser/harm']:.2f} of the best replies worse, at most {limits.harm:g} may"
    if metrics["reviser/gain_major"] <= 0:
        return f"gain_major: what it makes of replies labelled `major` gains {metrics['reviser/gain_major']:.3f}"
    if metrics["reviser/copies"] > limits.copies:
        return f"copies: {metrics['reviser/copies']:.2f} of its texts are copies, at most {limits.copies:g} may be"
    if metrics.get("reviser/no_precision", math.nan) < limits.no_precision:
        return (
            f"no_precision: of the policy's replies that it labels `no`, {metrics['reviser/no_precision']:.2f} are as"
            f" good as the best, at least {limits.no_precision:g} must be"
        )
    return ""


def end_of_rounds(scores: Sequence[float], kept: Sequence[float], drift: Drift) -> str:
    """Why the rounds are to end, empty if they are not: the last one has not gained (specification 2.4, item 6).

    It is drift when meanwhile the reviser has come to like the policy's replies (section 4, item 2). `scores` begin
    with the first policy's, `kept` are the shares of its replies and later ones that the reviser would keep.
    """
    if len(scores) < 2 or scores[-1] > max(scores[:-1]) + drift.gain:
        return ""
    told = f"the last round has not gained: {scores[-1]:.4f}, the best before is {max(scores[:-1]):.4f}"
    if len(kept) > 1 and kept[-1] - kept[0] > drift.rise:
        return f"drift: the reviser keeps {kept[-1]:.2f} of the replies, at first {kept[0]:.2f}, but {told}"
    return told


async def on_damages(cast: Cast, config: Config, tasks: Sequence[Task]) -> dict[str, float]:
    """In the sorting desk: what the reviser makes of right answers that were damaged so many times."""
    rng = np.random.default_rng(derive_seed(config.seed_of_world, "damaged tests"))
    found: dict[str, float] = {}
    for times in sorting.DAMAGES:
        texts = [sorting.damage(rng, task.reference, times) for task in tasks]
        revisions = await labelled(cast, config, tasks, texts, write=True)
        before = await scores_of(cast, config, tasks, texts)
        after = await scores_of(cast, config, tasks, [one.text for one in revisions])
        labels = [one.label for one in revisions]
        found |= {f"{label}_{times}": labels.count(label) / len(labels) for label in LABELS}
        found |= {f"before_{times}": float(np.mean(before)), f"after_{times}": float(np.mean(after))}
        found[f"harm_{times}"] = share(new < old for old, new in zip(before, after, strict=True))
    return found
