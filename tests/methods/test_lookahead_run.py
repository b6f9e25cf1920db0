"""Tiny runs of Lookahead routing, with real models in this process."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cluster import Cluster
from cluster.configure import configure
from launch import main
from methods import lookahead

pytestmark = pytest.mark.slow

SMALL = [
    "world=skills", "wandb=disabled", "skills.queries=96", "skills.test_queries=200", "skills.validation_queries=64",
    "steps=6", "test_every=2", "checkpoint_every=2", "keep_checkpoints=9", "queries_per_step=16",
]  # fmt: skip
Run = Callable[..., Awaitable[SimpleNamespace]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    async def play(name: str, *words: str, base: list[str] = SMALL) -> SimpleNamespace:
        given = [*base, f"runs_dir={tmp_path}", f"run={name}", *words]
        config = configure(lookahead.Config, given, None, lookahead.preset)
        async with Cluster(config, method="lookahead", run=name) as cluster:
            await lookahead.run(cluster, config)
            folder, rows = cluster.directory.path, cluster.metrics()
        told = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
        return SimpleNamespace(folder=folder, rows=rows, **told)

    return play


async def test_a_run_trains_and_tests_a_router(run: Run) -> None:
    done = await run("one")
    assert [row["step"] for row in done.rows] == list(range(7))
    assert [row["step"] for row in done.rows if "eval/validation" in row] == [0, 2, 4, 6]
    rates = [row["train/mask_rate"] for row in done.rows[1:]]
    assert rates == pytest.approx([0.3, 0.3 + 0.7 / 2.4, 0.3 + 1.4 / 2.4, 1, 1, 1])
    found = done.evaluation["router"]["mean"]
    assert found["queries"] == 200 and found["low"] <= found["normalised"] <= found["high"]
    assert set(done.evaluation["models"]) == {f"model-{i}" for i in range(4)}
    best = max(done.rows, key=lambda row: (row.get("eval/validation", -1e9), -row["step"]))
    assert f"Router of step {best['step']};" in " ".join(done.summary["notes"])
    again = await run("again", "stage=evaluate", f"router.trained={done.folder / 'router'}")
    assert again.evaluation == done.evaluation


@pytest.mark.parametrize("words", [["world_encoder=causal"], ["kind=router_dc"], ["kind=mlp"]], ids=lambda w: w[0])
async def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(run: Run, words: list[str]) -> None:
    whole = await run("whole", *words)

    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        kept = lookahead.validated

        async def stop(router: Any, data: Any, seed: int) -> dict[str, float]:
            metrics = await kept(router, data, seed)
            validations.append(metrics)
            if len(validations) == 3:  # in step 4, two after the last commit
                raise Stop
            return metrics

        validations: list[dict[str, float]] = []
        patch.setattr(lookahead, "validated", stop)
        with pytest.raises(Stop):
            await run("part", *words)
    part = await run("part", *words)
    assert part.rows == whole.rows
    assert part.evaluation == whole.evaluation


async def test_kinds_that_remember_take_one_step(run: Run) -> None:
    done = await run("knn", "kind=knn", "router.neighbours=5")
    assert [row["step"] for row in done.rows] == [0, 1]
    same = await run("best", "kind=best")
    shares = same.evaluation["router"]["mean"]["shares"]
    assert sorted(shares) == [0, 0, 0, 1]
    # It is the one that has learnt, even where the one that has not would do as well.
    for one in (done, same):
        assert json.loads((one.folder / "router" / "router.json").read_text())["version"] == 96


async def test_a_stage_for_training_alone(run: Run) -> None:
    done = await run("train", "stage=train")
    assert len(done.rows) == 7 and "evaluation" not in vars(done)
    assert (done.folder / "router" / "router.json").is_file()
    whole = await run("whole")
    tested = await run("test", "stage=evaluate", f"router.trained={done.folder / 'router'}")
    assert tested.evaluation == whole.evaluation
    # What a router is made like is taken from its folder.
    bare = [word for word in SMALL if not word.startswith("router.")]
    linear = await run("linear", "kind=linear", "router.hidden=8", "router.max_tokens=50")
    again = await run("again", "stage=evaluate", f"router.trained={linear.folder / 'router'}", base=bare)
    assert again.evaluation == linear.evaluation


async def test_where_nothing_can_be_won_the_last_router_is_kept(run: Run, tmp_path: Path) -> None:
    await run("skills", "steps=1")
    rows = [
        {"id": str(i), "instruction": f"{i % 10}", "models": ["a", "b"], "responses": ["a", "b"], "scores": [1, 1]}
        for i in range(60)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "wandb=disabled", "steps=4", "test_every=2", f"data.collected=[{data}]", "data.drop_ties=false",
        f"router.model={tmp_path / 'bases' / 'skills-masked-0.05'}", "router.init=random", "router.response_tokens=2",
    ]  # fmt: skip
    done = await run("even", base=words)
    assert json.loads((done.folder / "router" / "router.json").read_text())["version"] == 4


async def test_prices_make_a_curve(run: Run, tmp_path: Path) -> None:
    rows = [
        {
            "id": str(i), "instruction": f"{i % 10} {i % 7}", "models": ["dear", "cheap"],
            "responses": ["a b", "c d"], "scores": [1, i % 2],
        }
        for i in range(120)
    ]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = tmp_path / "bases" / "skills-masked-0.05"
    await run("skills", "steps=1")
    words = [
        "wandb=disabled", "steps=2", f"data.collected=[{data}]", "data.prices={dear: 2, cheap: 0.5}",
        f"router.model={encoder}", "router.init=random", "router.response_tokens=2", "router.threads=1",
        "price_weights=[0, 5]",
    ]  # fmt: skip
    done = await run("priced", base=words)
    curve = done.evaluation["by_price_weight"]
    assert list(curve) == ["0", "5"]
    assert curve["5"]["mean"]["price"] == 0.5
    assert (done.folder / "quality-price.svg").read_text().startswith("<?xml")


async def test_three_small_policies_and_their_router(run: Run) -> None:
    """The whole loop on live actors: better than each of the three alone."""
    done = await run("live", base=["world=trades", "wandb=disabled", "trade_queries=300", "steps=120"])
    router = done.evaluation["router"]["mean"]
    alone = [one["mean"]["router"] for one in done.evaluation["models"].values()]
    assert router["router"] > max(alone) + 0.1
    assert router["normalised"] > 80
    # The pool's answers are there, so nobody is asked, or even loaded, again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "policy", None)
        again = await run("again", base=["world=trades", "wandb=disabled", "trade_queries=300", "stage=collect"])
    assert "training" in again.summary["title"] and again.rows == []


def test_a_typo_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["lookahead", "world=skills", "router.respons_tokens=4", f"runs_dir={tmp_path}"])
    assert code == 2
    assert "did you mean router.response_tokens?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
