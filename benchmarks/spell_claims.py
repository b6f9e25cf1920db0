"""Measures every claim about SPELL in the ledger world: python benchmarks/spell_claims.py [--seeds 0 1 2].

Each arm is one `launch.py spell world=ledger` run per seed, with the same budget as what it is compared with. Runs
that are there already are not repeated. Prints a Markdown table and writes the values to claims.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
FREE = ["audit.enforce=false"]
ARMS: dict[str, list[str]] = {
    "spell": ["steps=100"],
    "questioner-frozen": ["steps=100", "roles.questioner=false"],
    "reverse": ["steps=60", "rewards.shape=reverse"],
    "verifier-frozen": ["steps=40", "roles.verifier=false"],
    "rule-only": ["steps=40", "verifier.mode=rules"],
    "rlvr": ["steps=60", "proposals=gold", "verifier.mode=rules"],
    "rate-0": ["steps=40", "lr=0"],
    "spoiled-0.25": ["steps=45", "ledger.wrong_references=0.25"],
    "spoiled-0.5": ["steps=45", "ledger.wrong_references=0.5"],
    "spoiled-0.8": ["steps=45", "ledger.wrong_references=0.8"],
    "spoiled-0.95": ["steps=45", "ledger.wrong_references=0.95"],
    # A responder that was taught for longer.
    "spoiled-0.8-able": ["steps=45", "ledger.wrong_references=0.8", "ledger.responder_steps=450"],
}
Row = dict[str, float]


def run(arm: str, seed: int, runs: Path) -> list[Row]:
    words = [f"runs_dir={runs}", f"run={arm}-{seed}", f"seed={seed}", "wandb=disabled", "test_every=5"]
    command = [sys.executable, "launch.py", "spell", "world=ledger", *FREE, *words, *ARMS[arm]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    print(f"{arm} seed {seed} done", file=sys.stderr, flush=True)
    lines = (runs / f"{arm}-{seed}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def at(rows: list[Row], name: str, step: int) -> float:
    """The value at a step, or the last one before it."""
    return [row[name] for row in rows if row["step"] <= step and row.get(name) is not None][-1]


def mean(rows: list[Row], name: str, first: int, last: int) -> float:
    return statistics.mean(r[name] for r in rows if first <= r["step"] <= last and r.get(name) is not None)


def starved_at(rows: list[Row], batches: int = 10, batch: int = 24) -> float:
    """First step that asked all it may and found no good question; the length of the run if none did."""
    empty = [r["step"] for r in rows if r.get("rounds/good") == 0 and r["rounds/asked"] >= batches * batch]
    return empty[0] if empty else rows[-1]["step"]


def claims(found: dict[str, dict[int, list[Row]]]) -> dict[str, dict[str, list[float]]]:
    """Per claim, the values of each compared thing over the seeds."""

    def over(arm: str, value: object) -> list[float]:
        return [value(rows) for rows in found[arm].values()]  # type: ignore[operator]

    one, two, share, wrong = "eval/gold_1hop", "eval/gold_2hop", "curriculum/two_hop", "audit/wrong_in_loop"
    table = {
        "label-free gain: gold 1-hop accuracy, 40 updates": {
            "base": over("spell", lambda r: at(r, one, 0)),
            "SPELL": over("spell", lambda r: at(r, one, 40)),
            "learning rate 0": over("rate-0", lambda r: at(r, one, 40)),
        },
        "close to supervised RL: gold 1-hop accuracy, 60 updates": {
            "SPELL": over("spell", lambda r: at(r, one, 60)),
            "RLVR, true answers": over("rlvr", lambda r: at(r, one, 60)),
        },
        "2-hop accuracy, 60 updates": {
            "base": over("spell", lambda r: at(r, two, 0)),
            "SPELL": over("spell", lambda r: at(r, two, 60)),
            "RLVR, true answers": over("rlvr", lambda r: at(r, two, 60)),
        },
        "curriculum: share of 2-hop proposals": {
            "SPELL 1-20": over("spell", lambda r: mean(r, share, 1, 20)),
            "SPELL 81-100": over("spell", lambda r: mean(r, share, 81, 100)),
            "frozen 1-20": over("questioner-frozen", lambda r: mean(r, share, 1, 20)),
            "frozen 81-100": over("questioner-frozen", lambda r: mean(r, share, 81, 100)),
        },
        "starvation: first step without a good question in 10 batches": {
            "SPELL": over("spell", starved_at),
            "questioner frozen": over("questioner-frozen", starved_at),
            "starved steps of 100, SPELL": over("spell", lambda r: sum(row.get("rounds/starved", 0) for row in r)),
            "starved steps of 100, frozen": over(
                "questioner-frozen", lambda r: sum(row.get("rounds/starved", 0) for row in r)
            ),
        },
        "good questions per step, 61-100 (of 12)": {
            "SPELL": over("spell", lambda r: mean(r, "rounds/good", 61, 100)),
            "questioner frozen": over("questioner-frozen", lambda r: mean(r, "rounds/good", 61, 100)),
        },
        "Gaussian against 1-r at step 60": {
            "2-hop share, Gaussian": over("spell", lambda r: mean(r, share, 51, 60)),
            "2-hop share, 1-r": over("reverse", lambda r: mean(r, share, 51, 60)),
            "gold 1-hop, Gaussian": over("spell", lambda r: at(r, one, 60)),
            "gold 1-hop, 1-r": over("reverse", lambda r: at(r, one, 60)),
            "gold 2-hop, mean of 41-60, Gaussian": over("spell", lambda r: mean(r, two, 41, 60)),
            "gold 2-hop, mean of 41-60, 1-r": over("reverse", lambda r: mean(r, two, 41, 60)),
            "wrong references asked, 41-60, Gaussian": over("spell", lambda r: mean(r, wrong, 41, 60)),
            "wrong references asked, 41-60, 1-r": over("reverse", lambda r: mean(r, wrong, 41, 60)),
        },
        "verifier learns: accuracy on balanced gold pairs, 40 updates": {
            "base": over("spell", lambda r: at(r, "eval/verifier", 0)),
            "SPELL": over("spell", lambda r: at(r, "eval/verifier", 40)),
            "verifier frozen": over("verifier-frozen", lambda r: at(r, "eval/verifier", 40)),
        },
        "verifier repairs the rule: agreement with true equivalence, steps 1-40": {
            "reward (rule and votes)": over("spell", lambda r: mean(r, "verify/reward_agrees_with_truth", 1, 40)),
            "rule only": over("spell", lambda r: mean(r, "verify/rule_agrees_with_truth", 1, 40)),
        },
        "without votes: gold 1-hop accuracy, 40 updates": {"rule only": over("rule-only", lambda r: at(r, one, 40))},
        "wrong references among audited": {
            "base": over("spell", lambda r: at(r, "audit/wrong", 0)),
            "step 40": over("spell", lambda r: at(r, "audit/wrong", 40)),
            "step 100": over("spell", lambda r: at(r, "audit/wrong", 100)),
        },
    }
    for arm in ("spell", *(name for name in ARMS if name.startswith("spoiled"))):
        table[f"start gate: {arm}, 45 updates"] = {
            "references right": over(arm, lambda r: at(r, "audit/right", 0)),
            "gold 1-hop before": over(arm, lambda r: at(r, one, 0)),
            "gold 1-hop after": over(arm, lambda r: at(r, one, 45)),
            "loop reward, first 5": over(arm, lambda r: mean(r, "reward/responder", 1, 5)),
            "loop reward, last 5": over(arm, lambda r: mean(r, "reward/responder", 41, 45)),
        }
    return table


def show(table: dict[str, dict[str, list[float]]], seeds: Sequence[int]) -> None:
    print(f"| claim | arm | mean | {' | '.join(f'seed {seed}' for seed in seeds)} |")
    print("|" + "---|" * (3 + len(seeds)))
    for claim, arms in table.items():
        for arm, values in arms.items():
            print(
                f"| {claim} | {arm} | {statistics.mean(values):.3f} | "
                + " | ".join(f"{v:.3f}" for v in values)
                + " |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    with ThreadPoolExecutor(options.parallel) as pool:
        jobs = {
            (arm, seed): pool.submit(run, arm, seed, options.runs) for arm in options.arms for seed in options.seeds
        }
        found = {arm: {seed: jobs[arm, seed].result() for seed in options.seeds} for arm in options.arms}
    if set(options.arms) == set(ARMS):
        table = claims(found)
        (options.runs / "claims.json").write_text(json.dumps(table, indent=1))
        show(table, options.seeds)


if __name__ == "__main__":
    main()
