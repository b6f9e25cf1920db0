"""Measures the claims about SEFT in the sorting desk: python benchmarks/seft_claims.py PART.

Each arm is one `launch.py seft` run per seed, a world per seed; arms of a seed have the same first policy, annotated
prompts and, where they revise, the same reviser. Runs that are there already are not repeated. Prints a Markdown
table of quality and share exactly right on the test prompts, and writes the values to <part>.json.

claims   SEFT beside its baselines with 120 annotated prompts
scarce   SEFT beside fine-tuning on the best annotated replies with 60 and 300 annotated prompts
ideas    ways beyond the plain loop
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
QUIET = ["world=sorting", "wandb=disabled", "checkpoint_every=1000000", "acceptance.enforce=false"]
ENDED_ITSELF = 3
"""Exit code of a run whose rounds gained nothing more."""
EXTERNAL = ["evolution=external"]
# As many steps as two rounds of SEFT; of eight tests the best counts, by the same development prompts.
ANNOTATED = ["rounds=8", "round_steps=100", "drift.enforce=false"]
# The best of four settings on world 100, as the reviser's is.
SFT = ["algorithm=sft", *ANNOTATED, "policy.trainer.learning_rate=1.0e-3", "policy.trainer.weight_decay=3.0"]
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
    "SFT on the best annotated replies": Arm(SFT),
    "SFT, as SEFT trains its policy": Arm(["algorithm=sft", *ANNOTATED]),
    "self-training, 6,000 prompts": Arm(["algorithm=self_train"]),
    "reviser without labels, 6,000 prompts": Arm(EXTERNAL, ["reviser.adaptive=false"]),
    "SEFT, external, 2,000 prompts": Arm([*EXTERNAL, "sorting.prompts=2000"], []),
    "SEFT, internal, 2,000 prompts": Arm(["evolution=internal", "sorting.prompts=2000"], []),
    "SEFT, external, 500 prompts": Arm([*EXTERNAL, "sorting.prompts=500"], []),
    "DPO, rate 5e-5": Arm([*DPO, "policy.trainer.learning_rate=5.0e-5"]),
    "DPO, rate 2e-4": Arm([*DPO, "policy.trainer.learning_rate=2.0e-4"]),
    "ORPO": Arm(["algorithm=orpo", *ANNOTATED]),
    "best of 4 by a reward model, 2,000 prompts": Arm(["algorithm=best_of_n", REWARD, "sorting.prompts=2000"]),
    "SEFT, internal then external, 6,000 prompts": Arm(["evolution=both"], []),
}
SCARCE = {
    f"{name}, {count} annotated": Arm([f"sorting.annotated={count}", *arm.words], reviser)
    for count in (60, 300)
    for name, arm, reviser in (
        ("SEFT, external", Arm(EXTERNAL), [f"sorting.annotated={count}"]),
        ("SFT", Arm(SFT), None),
    )
}
IDEAS = {
    "reviser learns from the policy's own replies": Arm(EXTERNAL, ["own_replies=4"]),
    "weighted by confidence": Arm([*EXTERNAL, "by_confidence=true"], []),
    "choice between reply and revision": Arm([*EXTERNAL, "choose=true"], []),
    "a quarter of each step is best annotated replies": Arm([*EXTERNAL, "annotated_share=0.25"], []),
    "four rounds": Arm([*EXTERNAL, "rounds=4", "drift.enforce=false"], []),
    "each round from the first policy": Arm([*EXTERNAL, "from_start=true", "drift.enforce=false"], []),
}


def run(name: str, words: Sequence[str], runs: Path) -> dict[str, Any]:
    """What a run came to; it is made now if needed."""
    command = [sys.executable, "launch.py", "seft", *QUIET, f"runs_dir={runs}", f"run={name}", *words]
    if not (runs / name / "evaluation.json").is_file():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode not in (0, ENDED_ITSELF):
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        print(f"{name} done", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads((runs / name / "evaluation.json").read_text())
    return found


def measured(
    arms: dict[str, Arm], seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor
) -> dict[str, list[dict[str, Any]]]:
    """All arms, each with all seeds before the next one; revisers first, each of which is trained once."""
    revisers = {plain(" ".join(arm.reviser)): arm.reviser for arm in arms.values() if arm.reviser is not None}

    def train(job: tuple[str, int]) -> None:
        name, seed = job
        words = [f"seed={seed}", *EXTERNAL, *revisers[name], f"reviser_steps={REVISER_STEPS}"]
        run(f"reviser-{name}-{seed}", [*words, f"steps={REVISER_STEPS}"], runs)

    def play(job: tuple[str, int]) -> dict[str, Any]:
        name, seed = job
        words = [f"seed={seed}", *arms[name].words]
        if (given := arms[name].reviser) is not None:
            words += [word for word in given if word.startswith("reviser.")]
            taught = runs / f"reviser-{plain(' '.join(given))}-{seed}" / "reviser"
            words.append(f"reviser_trained={taught}")
        return run(plain(f"{name} {seed}"), words, runs)

    list(pool.map(train, [(name, seed) for name in revisers for seed in seeds]))
    jobs = [(name, seed) for name in arms for seed in seeds]
    found = dict(zip(jobs, pool.map(play, jobs), strict=True))
    return {name: [found[name, seed] for seed in seeds] for name in arms}


def plain(name: str) -> str:
    """As the name of a run."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name)


def cell(values: Sequence[float]) -> str:
    """Mean, and each seed's value."""
    return f"{statistics.fmean(values):.3f} ({' '.join(f'{value:.3f}' for value in values)})"


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    print("| arm | quality | exactly right | best round |\n| --- | --- | --- | --- |")
    first = [one["first"] for one in next(iter(found.values()))]
    print(f"| first policy | {cell([o['score'] for o in first])} | {cell([o['exact'] for o in first])} | |")
    for arm, made in found.items():
        best, rounds = [one["best"] for one in made], " ".join(str(one["best_round"]) for one in made)
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
        found = measured(PARTS[options.part], options.seeds, runs, pool)
    (options.runs / f"{options.part}.json").write_text(json.dumps(found, indent=1))
    show(found)


if __name__ == "__main__":
    main()
