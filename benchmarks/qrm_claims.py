"""Measures the claims about Q-RM in the lookup chain: python benchmarks/qrm_claims.py PART.

Each arm is one `launch.py qrm world=chain` run per seed; compared arms have the same base, pairs, prompts and steps.
Runs that are there already are not repeated. Prints Markdown tables and writes the values to <part>.json.

credit    first-error AUC of reward models that learnt from the same pairs, a world per seed
learning  steps to Pass@1 0.70 with each reward: one world, one reward model per kind, a seed per run
forms     the same for Q-RM: paper and reference code, PPO and REINFORCE
drift     200 steps with a learnt reward, a world per seed: is it exploited?
alarm     does the alarm ring before Pass@1 has lost 10 points, and does it keep quiet otherwise?
regimes   Pass@1 after 60 steps with exact credit, outcomes and Q-RM, by length, batch and algorithm
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUIET = ["world=chain", "wandb=disabled", "checkpoint_every=1000000", "dump_replies=0"]
KINDS = ("q_function", "outcome", "implicit")
# Tuned on world 0 of length 12: at the scalar heads' rate DPO moves too far from its reference.
RATES = {"implicit": ["reward.trainer.learning_rate=0.001"]}
LENGTHS, BATCHES, ALGORITHMS = (8, 24, 64), (16, 64), ("ppo", "reinforce")
# Steps of the Q-RM by length; for 64 tokens it takes more than there was time for.
SCORERS = {8: 4000, 24: 12000}
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
    if kind == "outcome-copied":
        return [*source("outcome", world, runs), "advantage.credit=copied"]
    return [f"reward.kind={kind}", f"reward.model={reward_model(kind, world, runs)[0]}"]


def learning(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    arms = {kind: source(kind, 0, runs) for kind in (*KINDS, "outcome-copied", "outcome-true")}
    return learnt("learning", arms, seeds, runs, pool)


def forms(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    arms = {
        "paper-ppo": [],
        "paper-reinforce": ["algorithm=reinforce"],
        "reference-ppo": ["form=reference"],
        "reference-reinforce": ["form=reference", "algorithm=reinforce"],
    }
    scorer = source("q_function", 0, runs)
    return learnt("forms", {arm: [*words, *scorer] for arm, words in arms.items()}, seeds, runs, pool)


def learnt(
    part: str, arms: Mapping[str, Sequence[str]], seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor
) -> dict[str, list[float]]:
    """How fast and how far 60 steps of the policy get in world 0, by arm."""

    def one(arm: str, seed: int) -> list[Row]:
        words = ["stage=policy", f"seed={seed}", "world_seed=0", "steps=60", *arms[arm]]
        return run(f"{part}-{arm}-{seed}", words, runs)

    jobs = {(arm, seed): pool.submit(one, arm, seed) for seed in seeds for arm in arms}
    table = {}
    for arm in arms:
        found = [jobs[arm, seed].result() for seed in seeds]
        table[f"steps to {TARGET}, {arm}"] = [steps_to(rows) for rows in found]
        table[f"best Pass@1, {arm}"] = [max(value for _, value in curve(rows)) for rows in found]
        table[f"Pass@1 after 60 steps, {arm}"] = [curve(rows)[-1][1] for rows in found]
    return table


def drift(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    arms = {
        "q_function": [],
        "q_function, no baseline": ["advantage.baseline_weight=0"],
        "q_function, KL": ["ppo.kl_coef=0.1"],
        "q_function, a quarter of its steps": [],
        "implicit": [],
        "implicit, no baseline": ["advantage.baseline_weight=0"],
        "outcome, copied": ["advantage.credit=copied"],
    }  # fmt: skip

    def one(arm: str, seed: int) -> list[Row]:
        kind = arm.split(",")[0]
        scorer, _ = quarter(seed, runs) if "quarter" in arm else reward_model(kind, seed, runs)
        words = [f"reward.kind={kind}", f"reward.model={scorer}", "stage=policy", f"seed={seed}", "steps=200"]
        name = f"drift-{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
        return run(name, [*words, f"world_seed={seed}", *arms[arm]], runs)

    jobs = {(arm, seed): pool.submit(one, arm, seed) for seed in seeds for arm in arms}
    table = {}
    for arm in arms:
        found = [jobs[arm, seed].result() for seed in seeds]
        table[f"steps to {TARGET}, {arm}"] = [steps_to(rows) for rows in found]
        table[f"10 points lost, {arm}"] = [lost(rows) for rows in found]
        table[f"best Pass@1, {arm}"] = [max(value for _, value in curve(rows)) for rows in found]
        table[f"Pass@1 after 200 steps, {arm}"] = [curve(rows)[-1][1] for rows in found]
    return table


def quarter(world: int, runs: Path) -> tuple[Path, list[Row]]:
    """A Q-RM after a quarter of the steps."""
    return reward_model("q_function", world, runs, steps=1000, name=f"reward-q_function-quarter-{world}")


def alarm(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    """In each world and with each of its two Q-RMs a run per seed that is tested after every step."""
    arms = [(world, steps) for world in (0, 1, 2) for steps in (4000, 1000)]

    def one(world: int, steps: int, seed: int) -> list[Row]:
        scorer, _ = quarter(world, runs) if steps == 1000 else reward_model("q_function", world, runs)
        words = [f"reward.model={scorer}", "stage=policy", f"seed={seed}", f"world_seed={world}"]
        return run(f"alarm-{world}-{steps}-{seed}", [*words, "steps=60", "test_every=1"], runs)

    jobs = {(*arm, seed): pool.submit(one, *arm, seed) for seed in seeds for arm in arms}
    table = {}
    for world, steps in arms:
        found = [jobs[world, steps, seed].result() for seed in seeds]
        rung = [next((row["step"] for row in rows if row.get("drift/alarm")), math.inf) for rows in found]
        table[f"world {world}, Q-RM of {steps} steps, alarm"] = rung
        table[f"world {world}, Q-RM of {steps} steps, 10 points lost"] = [lost(rows) for rows in found]
    return table


def lost(rows: list[Row], points: float = 0.1) -> float:
    """First tested step at which Pass@1 was so far below its best before."""
    best = 0.0
    for step, value in curve(rows):
        if value < best - points:
            return step
        best = max(best, value)
    return math.inf


Arm = tuple[int, int, str, str]
"""Length, batch, algorithm, reward."""


def regimes(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    def scorer(length: int) -> tuple[Path, list[Row]]:
        words = [f"chain.length={length}", f"sampling.max_tokens={length + 4}"]
        name = f"reward-q_function-length-{length}"
        return reward_model("q_function", 0, runs, SCORERS[length], words, name)

    scorers = {length: pool.submit(scorer, length) for length in SCORERS}

    def one(length: int, batch: int, algorithm: str, reward: str, seed: int) -> list[Row]:
        if reward == "q_function":
            words = [f"reward.model={scorers[length].result()[0]}"]
        else:
            # The level of exact credit is known: centred, it would move fillers, which are worth 0.
            exact = ["source=exact", "advantage.normalisation=scale_only"]
            words = exact if reward == "exact" else ["source=rules"]
        words += [f"chain.length={length}", f"sampling.max_tokens={length + 4}", f"prompts_per_step={batch}"]
        words += [f"algorithm={algorithm}", "stage=policy", f"seed={seed}", "world_seed=0", "test_prompts=500"]
        return run(
            f"regime-{length}-{batch}-{algorithm}-{reward}-{seed}", [*words, "steps=60", "test_every=10"], runs
        )

    arms: list[Arm] = [
        (length, batch, algorithm, reward)
        for length in LENGTHS
        for batch in BATCHES
        for algorithm in ALGORITHMS
        for reward in REWARDS
        if reward != "q_function" or length in SCORERS
    ]
    jobs = {(*arm, seed): pool.submit(one, *arm, seed) for seed in seeds for arm in arms}
    curves = {arm: [[value for _, value in curve(jobs[*arm, seed].result())] for seed in seeds] for arm in arms}
    table = {}
    for length in LENGTHS:
        if length in SCORERS:
            table[f"length {length}, first-error AUC"] = [last(scorers[length].result()[1], "eval/first_error_auc")]
            table[f"length {length}, reply AUC"] = [last(scorers[length].result()[1], "eval/reply_auc")]
        table[f"length {length}, Pass@1 of the base"] = [values[0] for values in curves[length, 64, "ppo", "exact"]]
    for length, batch, algorithm, reward in arms:
        name, found = f"length {length}, batch {batch}, {algorithm}", curves[length, batch, algorithm, reward]
        table[f"{name}, {reward}"] = [values[-1] for values in found]
        if reward != "outcome":
            table[f"{name}, {reward}, factor"] = [factor(found, curves[length, batch, algorithm, "outcome"])]
    draw(curves, runs / "regimes.svg")
    return table


def factor(curves: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """How many times fewer steps it takes to where the others end, of means over seeds, between tests by the line;
    0 if it does not get there."""
    mean, goal = (
        [statistics.mean(values) for values in zip(*curves, strict=True)],
        statistics.mean(c[-1] for c in others),
    )
    for i in range(1, len(mean)):
        if mean[i] >= goal:
            return (len(mean) - 1) / (i - 1 + (goal - mean[i - 1]) / (mean[i] - mean[i - 1]))
    return 0.0


def draw(curves: Mapping[Arm, Sequence[Sequence[float]]], path: Path) -> None:
    """Pass@1 after the last step over the length: median, lowest and highest of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    panels = figure.subplots(len(BATCHES), len(ALGORITHMS), sharex=True, sharey=True)
    for (batch, algorithm), axes in zip(itertools.product(BATCHES, ALGORITHMS), panels.flat, strict=True):
        for index, reward in enumerate(REWARDS):
            lengths = [length for length in LENGTHS if (length, batch, algorithm, reward) in curves]
            found = [[values[-1] for values in curves[length, batch, algorithm, reward]] for length in lengths]
            middle = [statistics.median(seeds) for seeds in found]
            ends = [[m - min(f), max(f) - m] for m, f in zip(middle, found, strict=True)]
            # A little apart, so that bars do not hide each other.
            places = [length * 1.05 ** (index - 1) for length in lengths]
            axes.errorbar(places, middle, list(zip(*ends, strict=True)), marker="o", capsize=3, label=reward)
        bases = [statistics.median(values[0] for values in curves[n, batch, algorithm, "exact"]) for n in LENGTHS]
        axes.plot(LENGTHS, bases, "--", color="grey", label="base")
        axes.set(title=f"{algorithm}, batches of {batch}", xscale="log", ylim=(0, 1))
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel("tokens of a reply")
    figure.supylabel("Pass@1 after 60 steps")
    figure.savefig(path)


PARTS = {"credit": credit, "learning": learning, "forms": forms, "drift": drift, "alarm": alarm, "regimes": regimes}


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
