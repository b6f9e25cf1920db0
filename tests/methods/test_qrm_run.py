"""Tiny runs of Q-RM in the lookup chain, with real models in this process."""

import json
import math
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from cluster.cluster import Cluster
from cluster.configure import configure
from launch import main
from methods import qrm
from methods.qrm_report import PANELS
from protocols.errors import BadInput

pytestmark = pytest.mark.slow

SMALL = [
    "world=chain", "wandb=disabled", "chain.length=4", "chain.decisive=2", "chain.base_steps=120", "steps=6",
    "reward_steps=3", "reward_test_every=3", "test_every=1", "test_prompts=32", "test_samples=2",
    "prompts_per_step=8", "pairs_per_step=8", "pair_sampling.wanted=60", "checkpoint_every=1",
    "keep_checkpoints=9", "sampling.max_tokens=8",
]  # fmt: skip
Run = Callable[..., Awaitable[SimpleNamespace]]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that base model and pairs are made once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(runs_dir: Path) -> Run:
    async def play(name: str, *words: str) -> SimpleNamespace:
        config = configure(qrm.Config, [*SMALL, f"runs_dir={runs_dir}", f"run={name}", *words], None, qrm.preset)
        async with Cluster(config, method="qrm", run=name) as cluster:
            await qrm.run(cluster, config)
            folder, rows, finished = cluster.directory.path, cluster.metrics(), cluster.finished()
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        return SimpleNamespace(folder=folder, rows=rows, samples=samples, finished=finished)

    return play


def weights(folder: Path, step: int, actor: str) -> dict[str, Any]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / actor / "model.safetensors")


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(bool((a[name] == b[name]).all()) for name in a)


async def test_a_run_trains_reward_model_critic_and_policy(run: Run) -> None:
    done = await run("whole")
    assert [row["step"] for row in done.rows] == list(range(7))
    for name in ("eval/pairs", "eval/first_error_auc", "eval/reply_auc"):
        assert [row["step"] for row in done.rows if name in row] == [0, 3]
    assert [row["step"] for row in done.rows if "reward_model/loss" in row] == [1, 2, 3]
    assert [row["step"] for row in done.rows if "train/loss" in row] == [4, 5, 6]
    assert [row["step"] for row in done.rows if "eval/pass_at_2" in row] == [3, 4, 5, 6]
    assert all(math.isfinite(value) for row in done.rows for value in row.values())
    for actor, before, after, changes in (
        ("reward_model", 0, 3, True), ("reward_model", 3, 6, False), ("policy", 0, 3, False), ("policy", 3, 6, True),
        ("critic", 0, 3, False), ("critic", 3, 6, True),
    ):  # fmt: skip
        assert same(weights(done.folder, before, actor), weights(done.folder, after, actor)) != changes, (
            actor,
            before,
        )
    shown = {name for names in PANELS.values() for name in names} | set(qrm.HEADLINE)
    assert shown - {"eval/spans"} <= set().union(*done.rows)
    exported = AutoModelForSequenceClassification.from_pretrained(done.folder / "reward_model")
    assert exported.config.num_labels == 1


async def test_samples_show_the_value_of_each_token(run: Run) -> None:
    done = await run("whole")
    for row in done.samples:
        assert len(row["tokens"]) == len(row["values"]) == len(row["marks"])
        assert "".join(row["tokens"]) == row["output"]
        assert sum(row["marks"]) <= 1
        assert row["right"] == (not any(row["marks"]) and len(row["output"]) == 4)


async def test_a_continued_run_is_the_same_run(run: Run) -> None:
    whole = await run("whole")
    await run("parts", "steps=5")
    shutil.rmtree(whole.folder.parent / "parts" / "checkpoints" / "step-000005")
    parts = await run("parts", "steps=6")
    assert parts.rows == whole.rows
    assert parts.samples == whole.samples
    for actor in ("policy", "reward_model", "critic"):
        assert same(weights(whole.folder, 6, actor), weights(parts.folder, 6, actor))


@pytest.mark.parametrize("kind", ["q_function", "implicit"])
async def test_stages_one_by_one(run: Run, kind: str) -> None:
    whole = await run(f"whole-{kind}", f"reward.kind={kind}")
    first = await run(f"first-{kind}", f"reward.kind={kind}", "stage=reward", "steps=3")
    assert [row.get("reward_model/loss") for row in first.rows] == [
        row.get("reward_model/loss") for row in whole.rows[:4]
    ]
    trained = [f"reward.kind={kind}", f"reward.model={first.folder / 'reward_model'}"]
    second = await run(f"second-{kind}", "stage=policy", *trained, "steps=3")
    assert second.rows[0]["eval/pass_at_1"] == whole.rows[3]["eval/pass_at_1"]
    assert second.rows[0]["score/mean"] == pytest.approx(whole.rows[3]["score/mean"], abs=1e-5)
    assert not (second.folder / "checkpoints" / "step-000003" / "reward_model").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["reward.kind=outcome"],
        ["reward.kind=implicit"],
        ["reward.kind=implicit_outcome"],
        ["reward.kind=gated", "algorithm=reinforce"],
        ["source=rules", "stage=policy"],
        ["source=exact", "stage=policy", "algorithm=reinforce", "advantage.whiten=true"],
        ["form=reference"],
        ["form=reference", "algorithm=reinforce"],
        ["ppo.kl_coef=0.1", "mini_batches=2", "critic.clip=0.2", "samples_per_prompt=2"],
    ],
    ids=lambda words: " ".join(words),
)
async def test_baselines_and_forms(run: Run, words: list[str]) -> None:
    done = await run(re.sub(r"[^a-z]+", "-", " ".join(words)), *words)
    last = done.rows[-1]
    assert math.isfinite(last["train/loss"]) and last["train/grad_norm"] > 0
    assert ("critic/loss" in last) == (not any("reinforce" in word for word in words))


async def test_replies_that_are_too_long_to_read_are_left_out(run: Run) -> None:
    # Prompt and separator are 5 tokens, a whole reply is 5.
    done = await run("short", "critic.max_tokens=9", "prompts_per_step=32", "sampling.max_tokens=5")
    assert all(row["train/dropped"] > 0 for row in done.rows[4:])


async def test_exact_credit_teaches(run: Run) -> None:
    """Enough steps of the ceiling to see the policy become right."""
    words = ["source=exact", "stage=policy", "steps=40", "test_every=40", "prompts_per_step=32", "test_prompts=300"]
    done = await run("exact", *words, "checkpoint_every=40")
    assert done.rows[-1]["eval/pass_at_1"] > done.rows[0]["eval/pass_at_1"] + 0.15


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["world=text"], "prompts: expected a .jsonl file"),
        (["stage=policy"], "reward.model: expected the folder of a trained reward model"),
        (["reward_steps=6"], "reward_steps: got 6, expected fewer than steps=6"),
        (["chain.decisive=9"], "decisive: got 9, expected 1 to length=4"),
        (["world=text", "prompts=x.jsonl", "source=exact"], "source: exact credit is known in world=chain only"),
        (["policy.trainer=null"], "policy.trainer is null"),
        (["algorithm=reinforce", "advantage.credit=gae"], "gae needs a critic"),
        (["algorithm=reinforce", "mini_batches=2"], "mini_batches: expected 1 for reinforce"),
        (["algorithm=reinforce", "sampling.temperature=0.5"], "sampling.temperature 0.5 and that of the loss differ"),
        (["reward.kind=steps"], "reward.kind: got steps, expected one that learns from pairs"),
        (["reward.trainer=null"], "reward.trainer is null"),
        (["critic.kind=outcome"], "critic.kind, rules.kind: got outcome"),
        (["sampling.temperature=0.5"], "sampling.temperature 0.5 and that of the loss differ"),
    ],
)
def test_what_does_not_fit_together(words: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        configure(qrm.Config, [*SMALL, *words], None, qrm.preset)


def test_bad_files_end_with_code_2_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"instruction": "a", "chosen": "b", "rejected": "c"}\n{"instruction": "a", "chosen": 7}\n')
    assert main(["qrm", f"pairs={file}", "stage=reward", f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert "pairs.jsonl line 2: field chosen: got 7, expected text" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
