"""Tiny runs in the fact ledger, with a real policy in this process."""

import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cluster.cluster import Cluster
from cluster.configure import configure
from methods import spell
from methods.spell_report import PANELS
from methods.spell_rounds import Fate
from methods.worlds import corpus
from protocols.errors import BadInput

pytestmark = pytest.mark.slow

SMALL = [
    "world=ledger", "wandb=disabled", "steps=3", "test_every=3", "questions_per_step=4", "chunk=6",
    "ledger.training_clusters=30", "ledger.heldout_clusters=2", "ledger.warmup_steps=80",
    "ledger.responder_steps=40", "audit.proposals=20", "audit.enforce=false", "checkpoint_every=1",
    "keep_checkpoints=9",
]  # fmt: skip
Run = Callable[..., Awaitable[SimpleNamespace]]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the base model is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(runs_dir: Path) -> Run:
    async def play(name: str, *words: str) -> SimpleNamespace:
        words = (*SMALL, f"runs_dir={runs_dir}", f"run={name}", *words)
        config = configure(spell.Config, words, None, spell.preset)
        async with Cluster(config, method="spell", run=name) as cluster:
            await spell.run(cluster, config)
            folder, rows, finished = cluster.directory.path, cluster.metrics(), cluster.finished()
        text = (folder / "samples.jsonl").read_text(encoding="utf-8") if (folder / "samples.jsonl").exists() else ""
        samples = [json.loads(line) for line in text.splitlines()]
        return SimpleNamespace(folder=folder, rows=rows, samples=samples, finished=finished)

    return play


def weights(folder: Path, step: int) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "policy" / "model.safetensors")


def same_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(bool((a[name] == b[name]).all()) for name in a)


async def test_a_run_and_its_repetition(run: Run) -> None:
    first = await run("first")
    assert [row["step"] for row in first.rows] == [0, 1, 2, 3]
    assert first.rows[0].keys() >= {
        "eval/gold", "eval/gold_1hop", "eval/gold_2hop", "eval/verifier", "audit/right", "audit/wrong",
        "audit/usable", "audit/audited",
    }  # fmt: skip
    for row in first.rows[1:]:
        assert row.keys() >= {
            "reward/responder", "rounds/asked", "rounds/good", "rounds/surplus", "rounds/keep_rate",
            "rounds/starved", "batch/responder", "batch/questioner", "batch/verifier",
            "verify/reward_agrees_with_truth", "verify/rule_agrees_with_truth", "curriculum/two_hop",
            "curriculum/documents", "audit/wrong_in_loop", *(f"fate/{fate.value}" for fate in Fate),
        }  # fmt: skip
        assert row["rounds/starved"] or row.keys() >= {"train/loss", "train/grad_norm", "train/policy_entropy"}
    assert any(not row["rounds/starved"] for row in first.rows[1:])
    for row in first.samples:
        assert row.keys() >= {
            "input", "output", "step", "role", "uid", "data_source", "advantage", "entropy", "score", "rule_score",
            "llm_score", "pred", "reward_model", "question_id", "evidence", "self_verification",
        }  # fmt: skip
    assert {row["role"] for row in first.samples} >= {"questioner", "responder"}
    summary = json.loads((first.folder / "summary.json").read_text())
    assert summary["title"] == "SPELL on the fact ledger"
    assert any(row["name"] == "gold accuracy, held out" for row in summary["rows"])
    assert json.loads((first.folder / "panels.json").read_text()) == PANELS

    second = await run("second")
    for journal in ("metrics.jsonl", "samples.jsonl"):
        assert (second.folder / journal).read_bytes() == (first.folder / journal).read_bytes()
    assert same_weights(weights(first.folder, 3), weights(second.folder, 3))
    assert not same_weights(weights(first.folder, 0), weights(first.folder, 3))


async def test_another_seed_is_another_run(run: Run) -> None:
    words = ("steps=1", "ledger.warmup_steps=4", "ledger.responder_steps=2")
    one, other = await run("seed0", *words), await run("seed1", *words, "seed=1")
    assert one.rows != other.rows


async def test_without_a_learning_rate_nothing_changes(run: Run) -> None:
    done = await run("rate0", "lr=0")
    assert same_weights(weights(done.folder, 0), weights(done.folder, 3))
    first, last = done.rows[0], done.rows[3]
    assert {k: v for k, v in first.items() if k.startswith("eval/")} == {
        k: v for k, v in last.items() if k.startswith("eval/")
    }
    assert any("train/loss" in row for row in done.rows)


async def test_the_supervised_baseline(run: Run) -> None:
    done = await run("gold", "proposals=gold", "verifier.mode=rules", "audit.enforce=true", "audit.least_right=1")
    assert done.finished == ""
    assert {row["role"] for row in done.samples} == {"responder"}
    assert all(row["audit/wrong_in_loop"] == 0 for row in done.rows[1:])
    assert all(row["batch/questioner"] == row["batch/verifier"] == 0 for row in done.rows[1:])


@pytest.mark.parametrize("role", ["questioner", "responder", "verifier"])
async def test_roles_that_do_not_learn(run: Run, role: str) -> None:
    done = await run(f"no-{role}", f"roles.{role}=false", "steps=1", "roles.verifier_share=0.25")
    assert done.rows[1][f"batch/{role}"] == 0
    assert role not in {row["role"] for row in done.samples}
    assert "train/loss" in done.rows[1]


async def test_weights_per_role_epochs_and_a_reference(run: Run) -> None:
    done = await run(
        "options", "steps=2", "roles.weights={questioner: 0.5, responder: 1, verifier: 1}", "epochs=2",
        "mini_batches=2", "loss.kl_coef=0.1", "loss.entropy_coef=0.01", "rewards.combine=mean",
    )  # fmt: skip
    trained = [row for row in done.rows if "train/loss" in row]
    assert trained
    for row in trained:
        assert {"train/responder_kl", "train/questioner_kl", "train/responder_ratio"} <= row.keys()
    # Ratio and KL start from the policy itself and move with it.
    assert trained[0]["train/responder_kl"] >= 0
    assert trained[-1]["train/responder_sampler_gap"] > 0


async def test_self_play_ahead_of_training(run: Run) -> None:
    done = await run("ahead", "staleness=2", "steps=5", "starved_share=0")
    trained = [row for row in done.rows if "train/loss" in row]
    assert [row["step"] for row in done.rows] == [0, 1, 2, 3, 4, 5]
    # A step's tokens are at most as many updates old, and in the end some are.
    assert all(0 <= row["train/lag"] <= 2 for row in trained)
    assert trained[-1]["train/lag"] > 0
    late = [row for row in trained if row["train/lag"] > 0]
    assert all(0 < row["train/policy_ess"] <= 1 and row["train/policy_sampler_gap"] > 0 for row in late)


async def test_the_gate_refuses_a_base_with_wrong_references(run: Run) -> None:
    done = await run("refused", "audit.enforce=true", "audit.least_right=0.99")
    assert [row["step"] for row in done.rows] == [0]
    assert done.finished.startswith("start gate: only")
    assert done.samples == []


async def test_files_with_the_embedded_model(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i}.txt").write_text("\n\n".join(corpus.documents(random.Random(i), 3, 30, heldout=True)))
    words = (
        f"documents={texts}", f"runs_dir={tmp_path}", "run=files", "wandb=disabled", "steps=2",
        "questions_per_step=4", "generation_batch=8", "chunk=8", "test_questions=24", "audit.proposals=10",
        "audit.enforce=false",
    )  # fmt: skip
    config = configure(spell.Config, words, None, spell.preset)
    async with Cluster(config, method="spell", run="files") as cluster:
        await spell.run(cluster, config)
        rows = cluster.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/gold"] > 0.1
    for row in rows[1:]:
        assert row["rounds/good"] >= 1
        assert row["batch/responder"] == 8 * row["rounds/good"]
        assert row["train/grad_norm"] > 0


async def test_a_reward_model_joins_by_configuration_alone(run: Run, runs_dir: Path) -> None:
    plain = await run("without")
    # Other tests leave bases of other recipes; they all have the same tokenizer and shape.
    base = min((runs_dir / "bases").glob("ledger-*"))
    judge = runs_dir / "judge"
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(judge)
    AutoTokenizer.from_pretrained(base).save_pretrained(judge)
    by_rule = await run("rule", "reward_model.kind=rules", "reward_model.match=cover")
    kinds = ["reward_model.kind=q_function", "reward_model.trainer=null", f"reward_model.model={judge}"]
    by_model = await run("model", *kinds, "rewards.model_weight=2")
    ignored = await run("ignored", *kinds, "rewards.model_weight=0")
    assert same_weights(weights(plain.folder, 1), weights(ignored.folder, 1))
    assert not same_weights(weights(plain.folder, 1), weights(by_model.folder, 1))
    assert [row["step"] for row in by_rule.rows] == [0, 1, 2, 3]
    assert not (by_model.folder / "checkpoints" / "step-000003" / "reward_model").exists()
    with pytest.raises(BadInput, match=r"reward_model\.trainer: expected null"):
        await run("learning", "reward_model.kind=outcome")
