"""Measures the claims about SEFT in the sorting desk: python benchmarks/seft_claims.py PART.

Each arm is one `launch.py seft` run per seed, a world per seed; arms of a seed have the same first policy, annotated
prompts and, where they revise, the same reviser. Runs that are there already are not repeated. Prints a Markdown
table of quality / share exactly right on the test prompts, and writes the values to <part>.json.

claims SEFT beside its baselines with 120 annotated prompts scarce SEFT beside fine-tuning on the best annotated
replies with 60 and 300 annotated prompts ideas ways beyond the plain loop
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
QUIET = ["world=sorting", "wandb=disabled", "checkpoint_every=1000000"]
EXTERNAL = ["evolution=external"]
# As many steps as two rounds of SEFT; of eight tests the best counts, by the same development prompts.
ANNOTATED = ["rounds=8", "round_steps=100", "drift.enforce=false"]
DPO = ["algorithm=dpo", *ANNOTATED]
REWARD = "reward={kind: outcome, threads: 1, trainer: {learning_rate: 1.0e-3}}"
REVISER_STEPS = 900


@dataclass(frozen=True)
class Arm:
    """What is changed, and for its reviser, if it has one."""

    words: list[str]
    reviser: list[str] | None = None


CLAIMS = {
    "SEFT, external, 6,000 prompts": Arm(EXTERNAL, []),
    "SFT on the best annotated replies": Arm(["algorithm=sft", *ANNOTATED]),
    "DPO, rate 5e-5": Arm([*DPO, "policy.trainer.learning_rate=5.0e-5"]),
    "DPO, rate 2e-4": Arm([*DPO, "policy.trainer.learning_rate=2.0e-4"]),
    "ORPO": Arm(["algorithm=orpo", *ANNOTATED]),
    "self-training, 6,000 prompts": Arm(["algorithm=self_train"]),
    "SEFT, external, 2,000 prompts": Arm([*EXTERNAL, "sorting.prompts=2000"], []),
    "SEFT, internal, 2,000 prompts": Arm(["evolution=internal", "sorting.prompts=2000"], []),
    "SEFT, external, 500 prompts": Arm([*EXTERNAL, "sorting.prompts=500"], []),
    "reviser without labels, 6,000 prompts": Arm(EXTERNAL, ["reviser.adaptive=false"]),
    "best of 4 by a reward model, 2,000 prompts": Arm(["algorithm=best_of_n", REWARD, "sorting.prompts=2000"]),
    "SEFT, internal then external, 6,000 prompts": Arm(["evolution=both"], []),
}
SCARCE = {
    f"{name}, {count} annotated": Arm([f"sorting.annotated={count}", *arm.words], reviser)
    for count in (60, 300)
    for name, arm, reviser in (
        ("SEFT, external", Arm(EXTERNAL), [f"sorting.annotated={count}"]),
        ("SFT", Arm(["algorithm=sft", *ANNOTATED]), None),
    )
}
IDEAS = {
    "reviser learns from the policy's own replies": Arm(EXTERNAL, ["own_replies=4"]),
    "weighted by confidence": Arm([*EXTERNAL, "by_confidence=true"], []),
    "choice between reply and revision": Arm([*EXTERNAL, "choose=true"], []),
}


def run(name: str, words: Sequence[str], runs: Path) -> dict[str, Any]:
    """What a run came to; it is made now if needed."""
    command = [sys.executable, "launch.py", "seft", *QUIET, f"runs_dir={runs}", f"run={name}", *words]
    if not (runs / name / "evaluation.json").is_file():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        print(f"{name} done", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads((runs / name / "evaluation.json").read_text())
    return found


def one_seed(arms: dict[str, Arm], seed: int, runs: Path) -> dict[str, dict[str, Any]]:
    """All arms of a world, one after another: those that share a reviser train it once."""
    found = {}
    for name, arm in arms.items():
        given = [f"seed={seed}", *arm.words]
        if arm.reviser is not None:
            named = plain(f"reviser {' '.join(arm.reviser)} {seed}")
            words = [f"seed={seed}", *EXTERNAL, *arm.reviser, f"reviser_steps={REVISER_STEPS}"]
            run(named, [*words, f"steps={REVISER_STEPS}"], runs)
            asked = [word for word in arm.reviser if word.startswith("reviser.")]
            given += [*asked, f"reviser_trained={runs / named / 'reviser'}"]
        found[name] = run(plain(f"{name} {seed}"), given, runs)
    return found


def plain(name: str) -> str:
    """As the name of a run."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name)


def cell(values: Sequence[float]) -> str:
    """Mean, and each seed's value."""
    return f"{statistics.fmean(values):.3f} ({' '.join(f'{value:.3f}' for value in values)})"


def show(found: list[dict[str, dict[str, Any]]]) -> None:
    print("| arm | quality | exactly right | best round |\n| --- | --- | --- | --- |")
    first = [next(iter(of.values()))["first"] for of in found]
    print(f"| first policy | {cell([o['score'] for o in first])} | {cell([o['exact'] for o in first])} | |")
    for arm in found[0]:
        best = [of[arm]["best"] for of in found]
        rounds = " ".join(str(of[arm]["best_round"]) for of in found)
        print(f"| {arm} | {cell([o['score'] for o in best])} | {cell([o['exact'] for o in best])} | {rounds} |")


PARTS = {"claims": CLAIMS, "scarce": SCARCE, "ideas": IDEAS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seft-claims")
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    runs = options.runs.resolve()
    with ThreadPoolExecutor(options.parallel) as pool:
        found = list(pool.map(lambda seed: one_seed(PARTS[options.part], seed, runs), options.seeds))
    (options.runs / f"{options.part}.json").write_text(json.dumps(found, indent=1))
    show(found)


if __name__ == "__main__":
    main()
