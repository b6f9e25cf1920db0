"""Tiny runs of SEFT and its baselines, with real models in this process."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.cluster import Cluster
from cluster.configure import configure
from launch import main
from methods import seft
from methods.seft_rounds import PseudoLabel
from methods.worlds import sorting
from protocols.errors import Corrupt
from protocols.messages import ChatMessage
from protocols.service import CheckpointRequest

pytestmark = pytest.mark.slow

SMALL = [
    "world=sorting", "wandb=disabled", "sorting.annotated=20", "sorting.prompts=24", "sorting.dev_prompts=10",
    "sorting.test_prompts=12", "held_out=0.2", "reviser_steps=3", "examples_per_step=8", "rounds=2", "round_steps=2",
    "targets_per_step=8", "prompts_per_call=8", "prompts_per_round=20", "checkpoint_every=1", "keep_checkpoints=99",
    "acceptance.enforce=false", "drift.enforce=false", "least_own_score=0",
]  # fmt: skip
Run = Callable[..., Awaitable[SimpleNamespace]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(sorting, "STEPS", 30)

    async def play(name: str, *words: str) -> SimpleNamespace:
        given = [*SMALL, f"runs_dir={tmp_path}", f"run={name}", *words]
        config = configure(seft.Config, given, None, seft.preset)
        async with Cluster(config, method="seft", run=name) as cluster:
            await seft.run(cluster, config)
            folder, rows = cluster.directory.path, cluster.metrics()
        told = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
        rounds = [file.read_text() for file in sorted((folder / "rounds").glob("*.jsonl"))]
        return SimpleNamespace(folder=folder, rows=rows, rounds=rounds, **told)

    return play


def labels_of(text: str) -> list[PseudoLabel]:
    return [PseudoLabel.model_validate_json(line) for line in text.splitlines()]


async def test_a_run_trains_a_reviser_and_then_the_policy(run: Run) -> None:
    done = await run("one")
    assert [row["step"] for row in done.rows] == list(range(1, 8))
    assert ["reviser/loss" in row for row in done.rows] == 3 * [True] + 4 * [False]
    assert ["train/loss" in row for row in done.rows] == 3 * [False] + 4 * [True]
    assert [row["step"] for row in done.rows if "dev/score" in row] == [3, 5, 7]
    assert done.rows[2]["reviser/macro_f1"] >= 0
    internal, external = map(labels_of, done.rounds)
    assert len(internal) == len(external) == 20
    assert {one.source for one in internal} == {"own_best"}
    assert {one.source for one in external} <= {"kept", "revised"}
    # Fresh prompts as long as there are some.
    assert len({one.id for one in internal + external}) == 24
    assert all(one.target == one.reply and one.decoded_tokens == 0 for one in external if one.source == "kept")
    assert all(one.policy_version == 0 for one in internal) and all(one.policy_version == 2 for one in external)
    assert done.evaluation["best_round"] == max(range(3), key=lambda i: done.evaluation["dev"][i])
    counts = done.reviser_data["labels"].values()
    assert sum(counts) == len((done.folder / "reviser_data.jsonl").read_text().splitlines())
    assert max(counts) <= 2 * min(counts)

    assert {f"reviser, {times} damages" for times in (0, 1, 2, 4)} <= {row["name"] for row in done.summary["rows"]}

    again = await run("again", f"reviser_trained={done.folder / 'reviser'}", "reviser_policy.trainer.learning_rate=1")
    # Samples are drawn by round and prompt, not by step; so are the batches.
    assert [one.target for one in labels_of(again.rounds[0])] == [one.target for one in internal]
    assert [row["train/loss"] for row in again.rows[1:]] == [row["train/loss"] for row in done.rows[3:]]
    assert again.evaluation["best"] == done.evaluation["best"]


async def test_a_reviser_is_asked_as_it_was_taught(run: Run) -> None:
    done = await run("one", "steps=3")
    trained = f"reviser_trained={done.folder / 'reviser'}"
    with pytest.raises(Corrupt, match="it was trained with another `prompt`"):
        await run("other", trained, "reviser.prompt='{prompt} [REVISE] {reply} [ANSWER]'")


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "words",
    [[], ["from_start=true"], ["algorithm=dpo"], ["algorithm=best_of_n", "reward={kind: outcome}"]],
    ids=["seft", "from_start", "dpo", "best_of_n"],
)
async def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    whole = await run("whole", *words)
    names = ["learn_to_revise", "learn_rewards", "learn_policy", "judge_round", "accept"]
    for name in names:
        real = getattr(seft, name)
        calls = 0

        async def cut(*given: Any, real: Any = real) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2 or real.__name__ == "accept":
                raise Stop
            return await real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(seft, name, cut)
            try:
                await run(f"cut {name}".replace(" ", "-"), *words)
            except Stop:
                pass
            else:
                continue  # not part of this algorithm
        after = await run(f"cut-{name}", *words)
        assert after.rows == whole.rows
        assert after.rounds == whole.rounds
        assert after.evaluation == whole.evaluation


async def test_a_round_goes_on_with_the_call_that_was_under_way(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from methods import seft_rounds

    whole = await run("whole")
    for at in (2, 5):
        asked: list[str] = []
        real = seft_rounds.pseudo_labels

        async def cut(*given: Any, at: int = at, asked: list[str] = asked, real: Any = real) -> Any:
            if len(asked) == at - 1:
                raise Stop
            asked.append("")
            return await real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(seft_rounds, "pseudo_labels", cut)
            with pytest.raises(Stop):
                await run(f"cut-{at}")
        file = whole.folder.parent / f"cut-{at}" / "rounds" / f"round-{1 if at == 2 else 2}.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        # As if killed while it wrote a later call down.
        file.write_bytes(b"".join(lines) + b"".join(lines)[:100])
        after = await run(f"cut-{at}")
        assert after.rounds == whole.rounds
        assert after.rows == whole.rows


@pytest.mark.parametrize(
    ("words", "source"),
    [
        (["algorithm=self_train"], {"own"}),
        (["evolution=external", "reviser.adaptive=false"], {"revised"}),
        (
            ["evolution=external", "own_replies=2", "choose=true", "by_confidence=true", "annotated_share=0.25"],
            {"kept", "revised"},
        ),
        (["algorithm=sft"], set()),
        (["algorithm=orpo"], set()),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, list) else "",
)
async def test_other_algorithms(run: Run, words: list[str], source: set[str]) -> None:
    done = await run("one", *words)
    assert {one.source for text in done.rounds for one in labels_of(text)} <= source
    assert bool(done.rounds) == bool(source)
    assert {"score", "exact"} <= done.evaluation["best"].keys()


async def test_each_round_may_begin_with_the_first_policy(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    real = seft.learn_policy

    async def watched(cast: Any, config: Any, rows: Any, *more: Any) -> Any:
        step = more[-1]
        if config.round_of(step.index)[1] == 0:
            folder = tmp_path / f"{config.from_start}-{step.index}"
            await cast.policy.save(CheckpointRequest(path=str(folder)))
            begun.append({"folder": folder, "rows": len(rows)})
        return await real(cast, config, rows, *more)

    monkeypatch.setattr(seft, "learn_policy", watched)
    for words, same in (["from_start=true"], True), ([], False):
        begun.clear()
        done = await run(f"one-{same}", *words)
        first, second = ((one["folder"] / "model.safetensors").read_bytes() for one in begun)
        assert (first == second) == same
        learnt = [sum(not one.problem for one in labels_of(text)) for text in done.rounds]
        assert [one["rows"] for one in begun] == [learnt[0], learnt[1] + (learnt[0] if same else 0)]
        # The warm-up begins anew, and so do the moments.
        state = torch.load(begun[1]["folder"] / "trainer.pt", weights_only=True)
        assert (state["version"] == 0) == same and bool(state["optimizer"]["state"]) != same


async def test_a_stronger_model_replies_to_its_share(run: Run) -> None:
    base = await run("base", "steps=3")
    stronger = f"stronger={{model: {base.folder / 'policy'}}}"
    done = await run("one", "algorithm=self_train", stronger, "stronger_share=0.5", "rounds=1")
    (found,) = map(labels_of, done.rounds)
    assert 3 <= sum(one.source == "stronger" for one in found) <= 17
    assert {one.source for one in found} == {"own", "stronger"}


async def test_labels_stay_those_that_were_learnt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = await run("whole")

    async def cut(*given: Any) -> Any:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(seft, "learn_to_revise", cut)
        with pytest.raises(Stop):
            await run("cut")  # before anything is committed
    after = await run("cut")
    assert after.rows == whole.rows
    known = [json.loads((one.folder / "reviser" / "labels.json").read_text())["t1"] for one in (whole, after)]
    assert known == [whole.reviser_data["t1"]] * 2 and known[0] is not None


def test_a_folder_that_is_no_reviser_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["world=sorting", f"runs_dir={tmp_path}", f"reviser_trained={tmp_path}"]
    assert main(["plan", "seft", *given]) == 2
    assert f"reviser_trained: got '{tmp_path}', which has no labels.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "preferences: expected files of annotated replies, or a world"),
        (["world=sorting", "algorithm=best_of_n"], "reward: expected a reward model"),
        (["world=sorting", "reviser.adaptive=false"], "evolution: a reviser without labels cannot choose"),
        (["world=sorting", "reward={kind: outcome}"], "reward.trainer: best_of_n alone trains it"),
        (["world=sorting", "algorithm=sft", "choose=true"], "choose: it does nothing for this algorithm"),
        (["world=sorting", "evolution=internal", "stronger={}"], "stronger: it does nothing"),
        (
            ["world=sorting", "revisions=[a.jsonl]"],
            "prompts, test_prompts, revisions: the world 'sorting' has its own",
        ),
        (["preferences=[a]", "algorithm=sft", "revisions=[b]"], "revisions: it does nothing for this algorithm"),
        (["world=sorting", "rounds=1", "from_start=true"], "from_start: it does nothing"),
        (["world=sorting", "algorithm=sft", "from_start=true"], "from_start: it does nothing"),
        (["world=sorting", "steps=901"], "steps: got 901; expected the end of a round, at most 1700"),
        (["world=sorting", "annotated_share=0.999"], "annotated_share: no target of the round is left"),
        (["world=sorting", "policy.trainer=null"], "policy.trainer: expected one"),
        (["world=sorting", "reward={kind: rules}"], "reward.kind: rules need a right answer"),
        (["preferences=[a.jsonl]"], "prompts: expected files of prompts, which seft learns from"),
        (["world=sorting", "rounds=two"], "rounds"),
        (["world=sorting", "roundz=2"], "roundz"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["seft", f"runs_dir={tmp_path}", *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


async def test_a_judge_compares_the_best_policy_with_the_first(run: Run) -> None:
    done = await run("one", "algorithm=sft", "judge.model=embedded", "judge.threads=1")
    told = done.evaluation["judge"]
    assert 0 <= told["low"] <= told["win_rate"] <= told["high"] <= 1 and 0 < told["at_equal_length"] < 1
    assert told["too_long"] == 0
    rows = [json.loads(line) for line in (done.folder / "replies.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(0 < row["preference"] < 1 for row in rows)
    assert {row["name"] for row in done.summary["rows"]} >= {"preferred to the first policy", "score"}


async def test_an_adapter_is_trained_and_given_back_whole(run: Run) -> None:
    done = await run("one", "policy.lora.rank=2", "reviser_policy.lora.rank=2")
    assert (done.folder / "policy" / "model.safetensors").is_file()
    assert {f"reviser, {times} damages" for times in (0, 1, 2, 4)} <= {row["name"] for row in done.summary["rows"]}

    again = await run("again", f"reviser_trained={done.folder / 'reviser'}", "policy.lora.rank=2")
    assert again.evaluation["best"] == pytest.approx(done.evaluation["best"], abs=1e-3)


async def test_prompts_that_leave_no_room_are_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seft.data_of

    def with_a_long_one(config: Any) -> Any:
        data = whole(config)
        long = " ".join("1" for _ in range(200))
        for part in (data.prompts, data.dev, data.annotated):
            part[0] = part[0].model_copy(update={"messages": [ChatMessage(role="user", content=long)]})
        return data

    monkeypatch.setattr(seft, "data_of", with_a_long_one)
    done = await run("one", "own_replies=1")
    notes = " ".join(done.summary["notes"])
    for part in ("annotated", "dev", "prompts"):
        assert f"{part}: prompt too long for the policy: 1" in notes
