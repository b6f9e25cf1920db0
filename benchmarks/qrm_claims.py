"""Measures the claims about Q-RM in the lookup chain: python benchmarks/qrm_claims.py credit|learning|drift|regimes.

Each arm is one `launch.py qrm world=chain` run per seed; compared arms have the same base, pairs, prompts and steps.
Runs that are there already are not repeated. Prints Markdown tables and writes the values to <part>.json.

credit    first-error AUC of reward models that learnt from the same pairs, a world per seed
learning  steps to Pass@1 0.70 with each reward: one world, one reward model per kind, a seed per run
drift     200 steps with a learnt reward: does the alarm ring before Pass@1 has lost 10 points?
regimes   steps to 0.70 with exact credit, outcomes and Q-RM, by length, batch and algorithm
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUIET = ["world=chain", "wandb=disabled", "checkpoint_every=1000000", "dump_replies=0"]
KINDS = ("q_function", "outcome", "implicit")
# Tuned on world 0 of length 12: at the scalar heads' rate DPO moves too far from its reference.
RATES = {"implicit": ["reward.trainer.learning_rate=0.001"]}
LENGTHS, BATCHES, ALGORITHMS = (8, 24, 64), (16, 64), ("ppo", "reinforce")
REWARDS = ("exact", "outcome", "q_function")
TARGET = 0.7
Row = dict[str, float]


def run(name: str, words: Sequence[str], runs: Path) -> list[Row]:
    """The metrics of a run, which is made or continued now if it is not there."""
    command = [sys.executable, "launch.py", "qrm", *QUIET, f"runs_dir={runs}", f"run={name}", *words]
    if not (runs / name / "summary.json").is_file():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode not in (0, 3):
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        print(f"{name} done", file=sys.stderr, flush=True)
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def reward_model(
    kind: str, world: int, runs: Path, steps: int = 4000, words: Sequence[str] = (), name: str = ""
) -> tuple[Path, list[Row]]:
    """Folder of a trained reward model, and what its training measured."""
    name = name or f"reward-{kind}-{world}"
    given = ["stage=reward", f"reward.kind={kind}", f"world_seed={world}", f"seed={world}", *RATES.get(kind, [])]
    rows = run(name, [*given, f"steps={steps}", "reward_test_every=1000", *words], runs)
    return runs / name / "reward_model", rows


def last(rows: list[Row], metric: str) -> float:
    return [row[metric] for row in rows if row.get(metric) is not None][-1]


def curve(rows: list[Row]) -> list[tuple[float, float]]:
    return [(row["step"], row["eval/pass_at_1"]) for row in rows if row.get("eval/pass_at_1") is not None]


def steps_to(rows: list[Row], target: float = TARGET) -> float:
    """First tested step at which Pass@1 reached the target; infinite if none did."""
    return next((step for step, value in curve(rows) if value >= target), math.inf)


def credit(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    jobs = {(kind, seed): pool.submit(reward_model, kind, seed, runs) for seed in seeds for kind in KINDS}
    metrics = {
        "first-error AUC": "eval/first_error_auc",
        "reply AUC": "eval/reply_auc",
        "pairs ranked right": "eval/pairs",
    }
    return {
        f"{label}, {kind}": [last(jobs[kind, seed].result()[1], metric) for seed in seeds]
        for label, metric in metrics.items()
        for kind in KINDS
    }


def source(kind: str, world: int, runs: Path) -> list[str]:
    """The words that make a reward of this kind the policy's."""
    if kind == "outcome-true":
        return ["source=rules"]
    return [f"reward.kind={kind}", f"reward.model={reward_model(kind, world, runs)[0]}"]


def learning(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    kinds = (*KINDS, "outcome-true")

    def one(kind: str, seed: int) -> list[Row]:
        words = ["stage=policy", f"seed={seed}", "world_seed=0", "steps=60", *source(kind, 0, runs)]
        return run(f"learning-{kind}-{seed}", words, runs)

    jobs = {(kind, seed): pool.submit(one, kind, seed) for seed in seeds for kind in kinds}
    table = {}
    for kind in kinds:
        found = [jobs[kind, seed].result() for seed in seeds]
        table[f"steps to {TARGET}, {kind}"] = [steps_to(rows) for rows in found]
        table[f"best Pass@1, {kind}"] = [max(value for _, value in curve(rows)) for rows in found]
        table[f"Pass@1 after 60 steps, {kind}"] = [curve(rows)[-1][1] for rows in found]
    return table


def drift(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    """The alarm must ring before the test at which Pass@1 is 10 points below its best; a world per seed."""
    arms = {
        "q_function": [],
        "q_function, no baseline": ["advantage.baseline_weight=0"],
        "q_function, a quarter of its steps": [],
        "implicit": [],
        "implicit, no baseline": ["advantage.baseline_weight=0"],
        "outcome, copied": ["advantage.credit=copied"],
    }  # fmt: skip

    def one(arm: str, seed: int) -> list[Row]:
        kind = arm.split(",")[0]
        if "quarter" in arm:
            scorer, _ = reward_model(kind, seed, runs, steps=1000, name=f"reward-{kind}-quarter-{seed}")
        else:
            scorer, _ = reward_model(kind, seed, runs)
        words = [f"reward.kind={kind}", f"reward.model={scorer}", "stage=policy", f"seed={seed}", "steps=200"]
        name = f"drift-{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
        return run(name, [*words, f"world_seed={seed}", *arms[arm]], runs)

    jobs = {(arm, seed): pool.submit(one, arm, seed) for seed in seeds for arm in arms}
    table = {}
    for arm in arms:
        found = [jobs[arm, seed].result() for seed in seeds]
        table[f"first alarm, {arm}"] = [
            next((row["step"] for row in rows if row.get("drift/alarm")), math.inf) for rows in found
        ]
        table[f"10 points lost, {arm}"] = [lost(rows) for rows in found]
        table[f"best Pass@1, {arm}"] = [max(value for _, value in curve(rows)) for rows in found]
        table[f"Pass@1 after 200 steps, {arm}"] = [curve(rows)[-1][1] for rows in found]
    return table


def lost(rows: list[Row], points: float = 0.1) -> float:
    """First tested step at which Pass@1 was so far below its best before."""
    best = 0.0
    for step, value in curve(rows):
        if value < best - points:
            return step
        best = max(best, value)
    return math.inf


def regimes(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    def scorer(length: int) -> tuple[Path, list[Row]]:
        words = [f"chain.length={length}", f"sampling.max_tokens={length + 4}"]
        return reward_model("q_function", 0, runs, words=words, name=f"reward-q_function-length-{length}")

    scorers = {length: pool.submit(scorer, length) for length in LENGTHS}

    def one(length: int, batch: int, algorithm: str, reward: str, seed: int) -> list[Row]:
        words = {
            "exact": ["source=exact"],
            "outcome": ["source=rules"],
            "q_function": [f"reward.model={scorers[length].result()[0]}"],
        }[reward]
        words += [f"chain.length={length}", f"sampling.max_tokens={length + 4}", f"prompts_per_step={batch}"]
        words += [f"algorithm={algorithm}", "stage=policy", f"seed={seed}", "world_seed=0", "test_prompts=500"]
        words += ["steps=150", f"target={TARGET}"]
        return run(f"regime-{length}-{batch}-{algorithm}-{reward}-{seed}", words, runs)

    arms = [(n, b, a, r) for n in LENGTHS for b in BATCHES for a in ALGORITHMS for r in REWARDS]
    jobs = {(*arm, seed): pool.submit(one, *arm, seed) for seed in seeds for arm in arms}
    table = {f"first-error AUC, length {n}": [last(scorers[n].result()[1], "eval/first_error_auc")] for n in LENGTHS}
    for arm in arms:
        length, batch, algorithm, reward = arm
        table[f"length {length}, batch {batch}, {algorithm}, {reward}"] = [
            steps_to(jobs[(*arm, seed)].result()) for seed in seeds
        ]
    return table


PARTS = {"credit": credit, "learning": learning, "drift": drift, "regimes": regimes}


def show(table: dict[str, list[float]]) -> None:
    print("| measure | median | seeds |\n|---|---|---|")
    for name, values in table.items():
        print(f"| {name} | {statistics.median(values):.3g} | {', '.join(f'{value:.3g}' for value in values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "qrm-claims")
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.parallel) as pool:
        table = PARTS[options.part](options.seeds, options.runs.resolve(), pool)
    (options.runs / f"{options.part}.json").write_text(json.dumps(table, indent=1))
    show(table)


if __name__ == "__main__":
    main()
