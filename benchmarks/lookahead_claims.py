"""Measures the claims about Lookahead routing: python benchmarks/lookahead_claims.py PART.

Each arm is one `launch.py lookahead` run per seed; compared arms have the same queries, steps and batches. Runs that
are there already are not repeated. Prints a Markdown table and writes the values to <part>.json.

skills   hidden skills, 500 queries, a world per seed: lookahead against its lambda 0 and the classifier, and with the
         answers shuffled; both variants
selected the causal arms of `skills`, each with the router of the step that does best on 1,000 more queries
live     three small policies: collected, trained, then served by `launch.py serve` and asked by OpenAI's client, 300
         fresh queries, model="auto" against each policy alone
pool     hidden skills as collected answers: a fourth model is added to a router of three, or taken from one of four
tuning   the choice of learning rate and spread for `skills`, on worlds 100 and 101
real     the public models' real answers (REPERTORY_DATA/lookahead): every kind of router on the same split
heavier  the same for lookahead with lambda 1
sweep    `skills` for several values of lambda, masked
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai

from methods.worlds import trades
from methods.worlds.skills import WORDS, SkillsConfig, SkillsWorld
from methods.worlds.tiny import write_tiny

ROOT = Path(__file__).parent.parent
QUIET = ["wandb=disabled", "checkpoint_every=1000000", "router.threads=1"]
# The best of `tuning` for each arm. The two choices are the same for all masked arms.
CAUSAL = ["world_encoder=causal", "encoder_spread=0.02", "router.trainer.learning_rate=0.001"]
SKILLS = {
    "masked": {
        "classifier": ["kind=classifier"],
        "lookahead, lambda 0": ["lambda=0"],
        "lookahead, lambda 1": ["lambda=1"],
        "lookahead, lambda 1, answers shuffled": ["lambda=1", "skills.shuffle_answers=true"],
    },
    "causal": {
        "classifier": [*CAUSAL, "kind=classifier"],
        "lookahead, lambda 0": ["world_encoder=causal", "encoder_spread=0.05", "lambda=0"],
        "lookahead, lambda 1": [*CAUSAL, "lambda=1"],
        "lookahead, lambda 1, answers shuffled": [*CAUSAL, "lambda=1", "skills.shuffle_answers=true"],
    },
}
SOURCES = ("arena_hard", "gsm8k", "math", "self_oss")
QUERIES = "data.train_queries=1600"
# One pass over the queries, the same for every kind that trains the encoder. With a rate of 0.0001
# and 75 steps of 16 no loss of the choice fell; others than these two were not tried.
TUNED = [QUERIES, "steps=200", "queries_per_step=8", "router.new_rate=10", "router.trainer.learning_rate=3.0e-4"]
TUNED += ["router.trainer.micro_batch_tokens=1200"]
LOOKAHEAD = ["kind=lookahead", "router.response_tokens=8", *TUNED]
# Embeddings do not change, so these may take many more steps.
LIGHT = [QUERIES, "steps=600", "queries_per_step=64", "router.trainer.learning_rate=1.0e-3"]
REAL = {
    "lookahead, lambda 0.2": ["lambda=0.2", *LOOKAHEAD],
    "classifier": ["kind=classifier", *TUNED],
    "lookahead, lambda 0": ["lambda=0", *LOOKAHEAD],
    "zooter": ["kind=zooter", *TUNED],
    "router_dc": ["kind=router_dc", *TUNED],
    "matrix": ["kind=matrix", *LIGHT],
    "mlp": ["kind=mlp", *LIGHT],
    "linear": ["kind=linear", *LIGHT],
    "kmeans, 20": ["kind=kmeans", "router.neighbours=20", QUERIES],
    "kmeans, 100": ["kind=kmeans", "router.neighbours=100", QUERIES],
    "knn, 100": ["kind=knn", QUERIES],
    "best": ["kind=best", QUERIES],
    "random": ["kind=random"],
}
LAMBDAS = (0.05, 0.2, 0.5, 1, 2)
Row = dict[str, float]


def run(name: str, words: Sequence[str], runs: Path) -> dict[str, Row]:
    """Quality by group, the mean as "mean" and the best models in hindsight, of a run that is made now if needed."""
    name = name.replace(" ", "-").replace(",", "")
    command = [sys.executable, "launch.py", "lookahead", *QUIET, f"runs_dir={runs}", f"run={name}", *words]
    if not (runs / name / "summary.json").is_file():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        print(f"{name} done", file=sys.stderr, flush=True)
    told = json.loads((runs / name / "evaluation.json").read_text())
    groups = {one["group"]: one for one in told["router"]["groups"]}
    alone = {f"always {model}": one["mean"] for model, one in told["models"].items()}
    return {"mean": told["router"]["mean"], "hindsight": {"normalised": told["hindsight"]}} | groups | alone


def over_seeds(
    part: str, arms: dict[str, list[str]], seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor
) -> dict[str, list[dict[str, Row]]]:
    """Each arm's runs, seed by seed: if time runs out, whole seeds are there."""
    jobs = {
        (arm, seed): pool.submit(run, f"{part}-{arm}-{seed}", [*words, f"seed={seed}"], runs)
        for seed in seeds
        for arm, words in arms.items()
    }
    return {arm: [jobs[arm, seed].result() for seed in seeds] for arm in arms}


def skills(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, dict[str, list[float]]]:
    table = {}
    for variant, arms in SKILLS.items():
        words = {arm: ["world=skills", *given] for arm, given in arms.items()}
        found = over_seeds(f"skills-{variant}", words, seeds, runs, pool)
        for arm, made in found.items():
            table[f"{variant}: {arm}"] = {"mu_n": [one["mean"]["normalised"] for one in made]}
        best = [
            max(row["normalised"] for name, row in one.items() if name.startswith("always")) for one in found[arm]
        ]
        table[f"{variant}: best single model"] = {"mu_n": best}
    return table


def selected(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, dict[str, list[float]]]:
    words = ["world=skills", "skills.validation_queries=1000", "test_every=25"]
    arms = {arm: [*words, *given] for arm, given in SKILLS["causal"].items()}
    found = over_seeds("selected", arms, seeds, runs, pool)
    return {arm: {"mu_n": [one["mean"]["normalised"] for one in made]} for arm, made in found.items()}


def live(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, dict[str, list[float]]]:
    over_seeds("live", {"trades": ["world=trades"]}, seeds, runs, pool)
    found = [served(runs / f"live-trades-{seed}", seed) for seed in seeds]
    return {model: {"right, %": [100 * one[model] for one in found]} for model in found[0]}


def served(run: Path, seed: int) -> dict[str, float]:
    """Share of right answers of each model, asked from outside."""
    names = json.loads((run / "evaluation.json").read_text())["models"]
    # Collections are named after the queries, and those after the seed.
    folders = (run.parent / "collections").iterdir()
    (folder,) = [one for one in folders if json.loads((one / "reverse.json").read_text())["seed"] == seed]
    models = {name: json.loads((folder / f"{name}.json").read_text())["policy"]["model"] for name in names}
    pool = ", ".join(f"{name}: {{model: {model}, threads: 1}}" for name, model in models.items())
    words = [f"pool={{{pool}}}", f"router.trained={run / 'router'}", "router.threads=1", "verifier=null"]
    words += ["address=127.0.0.1:0", "gateway.http=127.0.0.1:0", f"runs_dir={run}", "policy.threads=1"]
    command = [sys.executable, "launch.py", "serve", *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://[^;]+/v1", line)
        if not found:
            raise SystemExit(line + process.stderr.read())
        client = openai.OpenAI(api_key="none", base_url=found[0])
        asked = trades.draw(np.random.default_rng((seed, 999)), 300)
        right = {name: statistics.fmean(answered(client, name, one) for one in asked) for name in ("auto", *names)}
        process.terminate()
    return right


def answered(client: openai.OpenAI, model: str, asked: trades.Asked) -> float:
    messages: list[Any] = [{"role": "user", "content": asked.query}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    return float((answer.choices[0].message.content or "").strip() == asked.reference)


def pool_changes(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, dict[str, list[float]]]:
    found = list(pool.map(lambda seed: changed(runs, seed), seeds))
    return {arm: {"mu_n": [one[arm] for one in found]} for arm in found[0]}


def changed(runs: Path, seed: int) -> dict[str, float]:
    """Quality of routers whose pool was changed; scores are flips of a coin, in tests too."""
    world, encoder = SkillsWorld(SkillsConfig(), seed), runs / f"encoder-{seed}"
    exam = world.draw(np.random.default_rng((seed, 1)), 4000)
    write_tiny(encoder, WORDS, width=48, masked=True, spread=0.05)
    file = runs / f"skills-{seed}.jsonl"
    made = enumerate(zip(exam.queries, exam.answers, exam.scores_BT.tolist(), strict=True))
    rows = (
        {"id": f"{i}", "instruction": q, "models": world.candidates, "responses": a, "scores": s}
        for i, (q, a, s) in made
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        f"data.collected=[{file}]",
        f"encoder={encoder}",
        "router.init=random",
        "router.response_tokens=4",
        "lambda=1",
    ]
    given += ["router.trainer.learning_rate=0.003", "router.trainer.schedule=constant", "data.train_queries=500"]
    given += ["test_every=1000000", "data.drop_ties=false", f"seed={seed}"]
    three, before = f"data.models=[{','.join(world.candidates[:3])}]", runs / f"pool-three-{seed}" / "router"
    arms = {
        "three": ["steps=600", three],
        "four": ["steps=600"],
        "fourth added, it alone trains": ["steps=300", f"router.trained={before}", "router.learn=new"],
        "fourth added, all train": ["steps=300", f"router.trained={before}"],
        "fourth removed, nothing trains": [
            three,
            "stage=evaluate",
            f"router.trained={runs / f'pool-four-{seed}' / 'router'}",
        ],
    }
    return {
        arm: run(f"pool-{arm}-{seed}", [*given, *words], runs)["mean"]["normalised"] for arm, words in arms.items()
    }


def tuning(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, dict[str, list[float]]]:
    arms = {}
    grid = itertools.product(("masked", "causal"), (0.02, 0.05), (1e-3, 3e-3), ("classifier", "0", "1"))
    for variant, spread, rate, arm in grid:
        given = ["world=skills", f"world_encoder={variant}", f"encoder_spread={spread}"]
        given += [
            f"router.trainer.learning_rate={rate}",
            "kind=classifier" if arm == "classifier" else f"lambda={arm}",
        ]
        arms[f"{variant} {arm} spread {spread} rate {rate}"] = given
    found = over_seeds("tuning", arms, (100, 101), runs, pool)
    return {arm: {"mu_n": [one["mean"]["normalised"] for one in made]} for arm, made in found.items()}


def real(
    seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor, arms: dict[str, list[str]] = REAL
) -> dict[str, dict[str, list[float]]]:
    folder = Path(os.environ["REPERTORY_DATA"]).resolve() / "lookahead"
    files = ",".join(str(folder / f"{source}.jsonl.gz") for source in SOURCES)
    common = [f"data.collected=[{files}]", "test_every=1000000", "router.max_tokens=72"]
    words = {arm: [*common, *given] for arm, given in arms.items()}
    found = over_seeds("real", words, seeds, runs, pool)
    columns = ("mean", *SOURCES)
    table = {arm: {c: [one[c]["normalised"] for one in made] for c in columns} for arm, made in found.items()}
    for arm, made in found.items():
        table[arm]["low"], table[arm]["high"] = ([one["mean"][end] for one in made] for end in ("low", "high"))
    hindsight = next(iter(found.values()))[0]
    table["best model of each source, in hindsight"] = {"mean": [hindsight["hindsight"]["normalised"]]}
    table |= {n: {"mean": [row["normalised"]]} for n, row in hindsight.items() if n.startswith("always")}
    return table


def sweep(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, dict[str, list[float]]]:
    arms = {f"lambda {value}": ["world=skills", f"lambda={value}"] for value in (0, *LAMBDAS)}
    found = over_seeds("sweep", arms, seeds, runs, pool)
    return {arm: {"mu_n": [one["mean"]["normalised"] for one in made]} for arm, made in found.items()}


def heavier(seeds: Sequence[int], runs: Path, pool: ThreadPoolExecutor) -> dict[str, dict[str, list[float]]]:
    return real(seeds, runs, pool, {"lookahead, lambda 1": ["lambda=1", *LOOKAHEAD]})


def show(table: dict[str, dict[str, list[float]]]) -> None:
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    print(f"| router | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for arm, row in table.items():
        cells = [spread(row[column]) if column in row else "" for column in columns]
        print(f"| {arm} | {' | '.join(cells)} |")


def spread(values: Sequence[float]) -> str:
    """Mean, and smallest and largest where there are several."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


PARTS = {
    "skills": skills,
    "selected": selected,
    "live": live,
    "pool": pool_changes,
    "tuning": tuning,
    "real": real,
    "heavier": heavier,
    "sweep": sweep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "lookahead-claims")
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.parallel) as pool:
        table = PARTS[options.part](options.seeds, options.runs.resolve(), pool)
    (options.runs / f"{options.part}.json").write_text(json.dumps(table, indent=1))
    show(table)


if __name__ == "__main__":
    main()
