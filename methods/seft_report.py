"""What SEFT tells its reader: what a round was made of, and what the run came to."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cluster.run_directory import write_atomically
from cluster.summary import Summary, SummaryRow
from methods.qrm_measures import wilson
from methods.seft_config import Config
from methods.seft_data import Data, Task
from methods.seft_rounds import PseudoLabel
from methods.seft_triples import edit_distance
from methods.worlds import sorting
from protocols.reviser import LABELS
from protocols.verifier import Comparison

PANELS = {
    "Development prompts": ["dev/score", "dev/exact"],
    "Replies that the reviser would keep": ["dev/label_no", "dev/label_minor", "dev/label_major"],
    "Losses": ["reviser/loss", "train/loss"],
}


def round_metrics(found: Sequence[PseudoLabel]) -> dict[str, float]:
    """Labels, changes, lengths, what was left out and why, and tokens."""
    metrics = {"prompts": float(len(found))}
    metrics |= {f"source_{name}": count / len(found) for name, count in Counter(one.source for one in found).items()}
    labels = [likeliest(one) for one in found if one.label_probs is not None]
    metrics |= {f"label_{label}": labels.count(label) / len(labels) for label in LABELS if labels}
    changed = [one for one in found if one.target != one.reply]
    metrics["changed"] = len(changed) / len(found)
    if changed:
        metrics["distance"] = float(np.mean([edit_distance(one.reply, one.target)[1] for one in changed]))
    metrics["words_in"] = float(np.mean([len(one.reply.split()) for one in found]))
    metrics["words_out"] = float(np.mean([len(one.target.split()) for one in found]))
    metrics["sampled_tokens"] = float(sum(one.sampled_tokens for one in found))
    metrics["decoded_tokens"] = float(sum(one.decoded_tokens for one in found))
    problems = Counter(one.problem for one in found if one.problem)
    metrics |= {f"dropped_{reason.replace(' ', '_')}": float(count) for reason, count in problems.items()}
    return {f"round/{name}": value for name, value in metrics.items()}


def likeliest(one: PseudoLabel) -> str:
    """The reply's label."""
    assert one.label_probs is not None
    return max(LABELS, key=lambda label: getattr(one.label_probs, label))


def summary(
    rows: Sequence[Mapping[str, float]],
    config: Config,
    data: Data,
    found: Mapping[str, Mapping[str, float]],
    best: int,
    finished: str,
) -> Summary:
    """The first policy beside the best, what the reviser is worth, and what must be known to read it."""
    before, after, wins = found["first"], found["best"], found["judge"]
    count = len(data.test or data.dev)
    where = "test" if data.test else "development"
    lines = []
    if after["score"] == after["score"]:
        note = f"{count} {where} prompts"
        lines.append(SummaryRow(name="score", before=before["score"], after=after["score"], note=note))
    if after["exact"] == after["exact"]:
        known = sum(bool(task.reference) for task in data.test or data.dev)
        low, high = wilson(round(after["exact"] * known), known)
        note = f"95 % {low:.3f} to {high:.3f}"
        lines.append(
            SummaryRow(name="equal to the reference", before=before["exact"], after=after["exact"], note=note)
        )
    lines.append(
        SummaryRow(name="words", before=before["words"], after=after["words"], note="mean length of a reply")
    )
    if "label_no" in after:
        note = "share of replies that the reviser would keep"
        lines.append(SummaryRow(name="label no", before=before["label_no"], after=after["label_no"], note=note))
    if wins:
        note = f"95 % {wins['low']:.3f} to {wins['high']:.3f}; at equal lengths {wins['at_equal_length']:.3f}, "
        note += f"the same in both orders {wins['same_in_both_orders']:.3f}"
        lines.append(SummaryRow(name="preferred to the first policy", after=wins["win_rate"], note=note))
    tested = "held-out annotated prompts" + (" and revisions" if data.revisions_held_out else "")
    last = {name: value for row in rows for name, value in row.items() if value is not None}
    for name in ("accuracy", "macro_f1", "harm", "gain_minor", "gain_major", "copies", "no_precision"):
        if (value := last.get(f"reviser/{name}")) is not None:
            note = "development prompts" if name == "no_precision" else tested
            lines.append(SummaryRow(name=f"reviser/{name}", after=value, note=note))
    lines += damages(found["reviser"])
    notes = [finished] if finished else []
    notes.append(f"The best round is {best}, by {len(data.dev)} development prompts; 0 is the first policy.")
    notes.append(
        f"{len(data.annotated)} annotated prompts, {len(data.held_out)} held out, {len(data.prompts)} others."
    )
    if data.revisions or data.revisions_held_out:
        notes.append(f"{len(data.revisions)} revisions judged by people, {len(data.revisions_held_out)} held out.")
    notes += [f"Left out, {reason}: {count}." for reason, count in sorted(data.dropped.items())]
    return Summary(title=f"SEFT: {title(config)}", rows=lines, notes=notes, panels=PANELS)


def damages(found: Mapping[str, float]) -> list[SummaryRow]:
    """In the sorting desk: what the reviser makes of damaged answers, a row for each number of damages."""
    rows = []
    for times in sorting.DAMAGES if found else ():
        labels = ", ".join(f"{label} {found[f'{label}_{times}']:.2f}" for label in LABELS)
        note = f"quality; {labels}; made worse {found[f'harm_{times}']:.2f}; test prompts"
        name, before, after = f"reviser, {times} damages", found[f"before_{times}"], found[f"after_{times}"]
        rows.append(SummaryRow(name=name, before=before, after=after, note=note))
    return rows


def title(config: Config) -> str:
    """What was run."""
    return f"{config.algorithm}, {config.evolution} evolution" if config.revises else config.algorithm


def write_replies(
    file: Path, tasks: Sequence[Task], first: Sequence[str], best: Sequence[str], judged: Sequence[Comparison]
) -> None:
    """Write each test prompt with the replies of the first and the best policy, and what the judge thinks."""
    rows = []
    for i, task in enumerate(tasks):
        row = {"id": task.id, "messages": [turn.model_dump() for turn in task.messages], "first": first[i]}
        row |= {"best": best[i], "reference": task.reference}
        rows.append(row | ({"preference": judged[i].preference} if judged else {}))
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def known(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Measures as JSON has them: what could not be measured is null."""
    return {part: {name: v if math.isfinite(v) else None for name, v in of.items()} for part, of in found.items()}
