"""What Q-RM tells its reader: replies with the value of each token, and the result of a run."""

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.steps import Step
from cluster.summary import Summary, SummaryRow
from methods.advantages import Values
from methods.qrm_config import Config
from methods.qrm_credit import Scored
from methods.qrm_rollouts import Rollout
from methods.qrm_world import World
from protocols.policy import DetokenizeRequest, PolicyService

PANELS = {
    "Reward model": ["eval/pairs", "reward_model/accuracy", "eval/first_error_auc", "eval/reply_auc", "eval/spans"],
    "Policy": ["eval/pass_at_1", "reward/right", "drift/alarm"],
    "Score of the policy's replies": ["score/mean", "reward/score"],
}


async def log_replies(
    step: Step,
    policy: PolicyService,
    rollouts: Sequence[Rollout],
    found: Sequence[Scored],
    advantages: Sequence[Values],
    world: World,
    count: int,
) -> None:
    """The first replies of a step, token by token, with their scores; the first wrong token is marked if known."""
    if not count:
        return
    rollouts = rollouts[:count]
    exact = world.exact(rollouts)
    request = DetokenizeRequest(tokens=[one.completion.tokens for one in rollouts])
    answer = await policy.detokenize(request)
    rows = []
    for i, one in enumerate(rollouts):
        text, ends = one.completion.text, answer.ends[i].array
        row = {
            "role": "policy",
            "uid": one.uid,
            "input": one.task.instruction,
            "output": text,
            "reference": one.task.reference,
            "right": one.right,
            "reward": found[i].reply,
            "tokens": [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)],
            "values": [round(float(value), 5) for value in found[i].tokens],
            "advantage": round(float(np.mean(advantages[i])), 6),
            "finish_reason": one.completion.finish_reason,
        }
        if exact is not None:
            row |= {"marks": [bool(credit < 0) for credit in exact[i]], "marks_name": "first wrong token"}
        rows.append(row)
    step.samples(rows)


def summary(rows: Sequence[Mapping[str, float]], world: World, config: Config, alarm: int, finished: str) -> Summary:
    """Before and after, and what must be known to read it."""
    notes = [finished] if finished else []
    notes += world.notes
    if alarm >= 0 and not finished:
        told = "Pass@1 had fallen while scores had not (drift.enforce=true ends a run there)"
        notes.append(f"drift: at step {alarm} {told}")
    if not world.test_pairs and config.reward_until:
        notes.append("No pairs were held out.")
    last = {name: value for row in rows for name, value in row.items() if value is not None}
    lines = []
    measures = {
        "held-out pairs ranked right": "eval/pairs",
        "first-error AUC": "eval/first_error_auc",
        "reply AUC": "eval/reply_auc",
        "right places above wrong ones (AUC)": "eval/spans",
        "Pass@1": "eval/pass_at_1",
        f"Pass@{config.test_samples}": f"eval/pass_at_{config.test_samples}",
        f"best of {config.test_samples} by score": f"eval/best_of_{config.test_samples}",
        "mean score of replies": "score/mean",
    }
    for label, name in measures.items():
        found = [(int(row["step"]), row[name]) for row in rows if row.get(name) is not None]
        if found:
            (first, before), (step, after) = found[0], found[-1]
            interval = ""
            if f"{name}_low" in last:
                interval = f", 95 % interval {last[f'{name}_low']:.3f} to {last[f'{name}_high']:.3f}"
            note = f"{name}, steps {first} and {step}{interval}"
            lines.append(SummaryRow(name=label, before=before, after=after, note=note))
    where = "the lookup chain" if config.world == "chain" else config.data.prompts or config.data.pairs
    return Summary(title=f"Q-RM ({config.reward.kind}) on {where}", rows=lines, notes=notes, panels=PANELS)
