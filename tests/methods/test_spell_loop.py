"""The whole method in the toy world, with a scripted policy: also when things go badly or are switched off."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from methods.spell import State
from methods.worlds.cloze import cloze_question, parse_cloze, usable_spans, words_after
from methods.worlds.text import TextConfig, TextWorld
from protocols.errors import BadInput, Stale
from protocols.messages import FinishReason
from protocols.questions import Task
from protocols.training import OptimStepRequest, OptimStepResponse


def world_of(toys: SimpleNamespace, tasks: Any = (Task.GENERAL,), clusters: int = 12) -> Any:
    return toys.World([toys.cluster(f"c{i}", 8, tasks[i % len(tasks)]) for i in range(clusters)])


def samples_of(company: Any) -> list[dict[str, Any]]:
    text = (company.directory.path / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def role_of(policy: Any) -> list[set[str]]:
    """The roles that each update was on."""
    return [{row.row_id.split("/")[0] for row in request.rows} for request in policy.trained]


# A usual run


async def test_a_run_leaves_metrics_samples_and_a_summary(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer())
    config = toys.config(steps=3, test_every=2, grounding={"enabled": True}, roles={"verifier_share": 1.0})
    company = await run_spell(config, world_of(toys, list(Task)), policy=policy)
    rows = company.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert policy.version == 3
    assert ["eval/gold" in row for row in rows] == [True, False, True, True]
    for row in rows[1:]:
        assert row["batch/responder"] == 16
        assert row["rounds/good"] == 4
        assert sum(value for name, value in row.items() if name.startswith("fate/")) == pytest.approx(1)
        assert sum(value for name, value in row.items() if name.startswith("letters/")) == pytest.approx(1)
        per_task = [value for name, value in row.items() if name.startswith("batch/responder_")]
        assert sum(per_task) == 16
    assert {row["role"] for row in samples_of(company)} == {"questioner", "responder", "verifier"}
    kept = json.loads((company.directory.path / "summary.json").read_text())
    assert kept["notes"] == ["a toy world"]
    assert {row["name"] for row in kept["rows"]} >= {"gold accuracy, held out", "loop reward of answers"}
    panels = json.loads((company.directory.path / "panels.json").read_text())
    assert "eval/gold" in panels["Loop reward and truth"]


async def test_questions_get_longer_as_they_are_remembered(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer())
    company = await run_spell(toys.config(steps=6), world_of(toys, clusters=4), policy=policy)
    documents = [row["curriculum/documents"] for row in company.metrics()[1:]]
    history = [row["curriculum/history"] for row in company.metrics()[1:]]
    assert documents[0] < 4 < documents[-1] <= 8
    assert history[0] < 1 < history[-1] <= 3


def cloze_writer(toys: SimpleNamespace, right: float) -> Any:
    """Asks for the word after a span, and finds it more or less often."""

    def write(call: Any) -> str:
        paragraphs = call.text.partition("<text>\n")[2].partition("\n</text>")[0].split("\n")
        task = Task.MATH if "numerical" in call.text else Task.GENERAL
        if call.kind == "question":
            _, span, word = call.rng.choice(usable_spans(task, paragraphs))
            options = [word, "none a", "none b", "none c"] if "multiple choice" in call.text else []
            return toys.proposal(cloze_question(task, span), "A" if options else word, options)
        if call.kind == "vote":
            said, reference = re.findall(r"Answer [12]: (.*)", call.text)
            return "[[YES]]" if said == reference else "[[NO]]"
        question, *options = re.findall(r"Which .*\?", call.text)[-1:] + re.findall(r"\([A-D]\) (.*)", call.text)
        found = words_after(parse_cloze(question) or "", paragraphs) if call.rng.random() < right else {"nothing"}
        answer = (
            next((option for option in options if option in found), options[0])
            if options
            else min(found, default="?")
        )
        return toys.reply("ABCD"[options.index(answer)] if options else answer)

    return write


async def test_a_run_on_text(toys: SimpleNamespace, run_spell: Any, tmp_path: Path) -> None:
    """Real documents, cloze questions: their truth is looked up, so references are audited without a judge."""
    rng = random.Random(0)
    for i in range(24):
        words = [rng.choice("bcdfgm") + rng.choice("aeiou") + rng.choice("lnrst") for _ in range(30)]
        (tmp_path / f"{i}.txt").write_text(" ".join([*words, str(100 + i), "units", "were", "sold."]))
    tasks = [Task.GENERAL, Task.CHOICE, Task.MATH]
    world = TextWorld(TextConfig(documents=str(tmp_path), cluster_size=4, tasks=tasks, heldout_share=0.34), 0)
    policy = toys.Policy(cloze_writer(toys, right=0.6))
    company = await run_spell(toys.config(steps=3, test_every=3, grounding={"enabled": True}), world, policy=policy)
    rows = company.metrics()
    assert rows[0]["audit/right"] == rows[3]["audit/right"] == 1.0
    assert rows[0]["audit/usable"] == 1.0
    assert 0.3 < rows[3]["eval/gold"] < 0.9
    assert all(row["audit/wrong_in_loop"] == 0 for row in rows[1:])
    assert {row["task"] for row in samples_of(company)} == set(tasks)
    assert policy.version == 3


# Starvation


@pytest.mark.parametrize("right", [0.0, 1.0])
async def test_a_starved_run_goes_on_without_updates(toys: SimpleNamespace, run_spell: Any, right: float) -> None:
    """Bug 12 of the reference: after 10 batches without enough good questions it died."""
    policy = toys.Policy(toys.writer(right=right, vote_right=1.0))
    company = await run_spell(toys.config(steps=3), world_of(toys), policy=policy)
    rows = company.metrics()
    assert [row["rounds/starved"] for row in rows[1:]] == [1, 1, 1]
    assert [row["rounds/asked"] for row in rows[1:]] == [24, 24, 24]
    assert (policy.version, policy.trained) == (0, [])
    assert "train/loss" not in rows[-1]
    # The questioner reads one more document each time.
    assert [row["curriculum/documents"] for row in rows[1:]] == [2, 3, 4]
    # What it wrote is there to be looked at.
    assert {row["role"] for row in samples_of(company)} == {"questioner"}


async def test_the_state_of_a_starved_run_is_kept(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer(right=0.0, vote_right=1.0))
    company = await run_spell(toys.config(steps=2), world_of(toys), policy=policy)
    saved = sorted((company.directory.path / "checkpoints").glob("step-*/loop.json"))[-1]
    state = State.model_validate_json(saved.read_text())
    assert (state.extra_documents, state.rollout.keep_rates) == (2, [(24, 0), (24, 0)])
    assert state.rollout.drawn == {"doc_general_qa": 48}


async def test_expectations_are_of_the_last_five_steps(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer())
    company = await run_spell(toys.config(steps=7, checkpoint_every=1), world_of(toys), policy=policy)
    saved = sorted((company.directory.path / "checkpoints").glob("step-*/loop.json"))[-1]
    rows = company.metrics()[-5:]
    assert State.model_validate_json(saved.read_text()).rollout.keep_rates == [
        (row["rounds/asked"], row["rounds/good"] + row["rounds/surplus"]) for row in rows
    ]


@pytest.mark.parametrize(("good", "trained"), [(0, False), (1, True), (3, True)])
async def test_a_quarter_of_the_questions_is_enough(
    toys: SimpleNamespace, run_spell: Any, good: int, trained: bool
) -> None:
    able, lost = toys.writer(right=1.0), toys.writer(right=0.0)

    def write(call: Any) -> Any:
        mixed = call.kind == "answer" and call.uid in [f"1-{i}" for i in range(good)] and call.index % 2
        return (lost if mixed else able)(call)

    policy = toys.Policy(write)
    config = toys.config(steps=1, verifier={"mode": "rules"})
    company = await run_spell(config, world_of(toys), policy=policy)
    row = company.metrics()[1]
    assert (row["rounds/good"], row["rounds/starved"]) == (good, not trained)
    assert policy.version == trained


# Nothing usable


@pytest.mark.parametrize(
    "silence",
    ["", "no question", "<think>", "[]", "```json\n{}\n```", "\x00\ud800"[:1], "```json\n" + "[" * 5000],
)
async def test_no_valid_proposal(toys: SimpleNamespace, run_spell: Any, silence: str) -> None:
    """Bug 8 of the reference."""
    company = await run_spell(toys.config(steps=2), world_of(toys), policy=toys.Policy(lambda call: silence))
    row = company.metrics()[-1]
    assert row["rounds/good"] == row["fate/good"] == 0
    assert row["fate/bad_format"] + row["fate/truncated"] == 1
    assert row["audit/usable"] == 0


async def test_completions_without_tokens_and_of_padding(toys: SimpleNamespace, run_spell: Any) -> None:
    able = toys.writer()
    for tokens in ([], [0], [0, 0, 0, 0]):
        empty = toys.Written("", tokens, FinishReason.LENGTH)
        policy = toys.Policy(lambda call, empty=empty: empty)
        company = await run_spell(toys.config(steps=1, run=f"all{len(tokens)}"), world_of(toys), policy=policy)
        assert company.metrics()[1]["fate/bad_format"] == 1
        # Half of the answers are empty, so that their groups have a spread and are trained on.
        policy = toys.Policy(
            lambda call, empty=empty: empty if call.kind == "answer" and call.index % 2 else able(call)
        )
        company = await run_spell(toys.config(steps=1, run=f"half{len(tokens)}"), world_of(toys), policy=policy)
        assert policy.version == 1
        empty_rows = [row for row in policy.trained[0].rows if row.row_id.endswith(("/1", "/3"))]
        assert len(empty_rows) == (8 if tokens else 0)


async def test_documents_longer_than_any_prompt(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer())
    world = world_of(toys)
    world.training = [toys.cluster(f"c{i}", 3, words=400) for i in range(4)]
    config = toys.config(steps=1, questioner={"max_prompt_tokens": 300})
    company = await run_spell(config, world, policy=policy)
    row = company.metrics()[1]
    assert row["fate/overlong"] == 1
    assert row["curriculum/dropped_documents"] == 1
    kept = json.loads((company.directory.path / "summary.json").read_text())
    assert any("Most questions could not be asked" in note for note in kept["notes"])


async def test_a_model_with_a_short_context_is_never_asked_for_more(toys: SimpleNamespace, run_spell: Any) -> None:
    """The defaults are for 18,000 tokens; the scripted policy fails on a prompt that it cannot take."""
    policy = toys.Policy(toys.writer(), context=256)
    world = world_of(toys)
    world.training = [toys.cluster(f"c{i}", 8, words=20 + 5 * i) for i in range(6)]
    company = await run_spell(toys.config(steps=2), world, policy=policy)
    rows = company.metrics()
    assert any(row["fate/overlong"] for row in rows[1:])
    assert policy.calls


# Switches


@pytest.mark.parametrize("role", ["questioner", "responder", "verifier"])
async def test_every_role_can_stay_as_it_is(toys: SimpleNamespace, run_spell: Any, role: str) -> None:
    on = {name: name != role for name in ("questioner", "responder", "verifier")}
    policy = toys.Policy(toys.writer())
    config = toys.config(steps=2, roles={**on, "verifier_share": 0.5})
    company = await run_spell(config, world_of(toys), policy=policy)
    assert role_of(policy) == [{name for name, wanted in on.items() if wanted}] * 2
    assert company.metrics()[1][f"batch/{role}"] == 0


async def test_only_a_verifier_that_finds_nothing_to_learn(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer())
    roles = {"questioner": False, "responder": False}
    company = await run_spell(
        toys.config(steps=2, roles=roles, verifier={"mode": "rules"}), world_of(toys), policy=policy
    )
    assert (policy.version, len(company.metrics())) == (0, 3)


async def test_a_run_on_given_questions(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer())
    config = toys.config(steps=2, proposals="gold", grounding={"enabled": True})
    world = world_of(toys)
    company = await run_spell(config, world, policy=policy)
    assert role_of(policy) == [{"responder"}] * 2
    assert not policy.asked("probe") and not [call for call in policy.asked("vote") if "/" in call.uid]
    gold = {question.question for question in world.gold(world.training)}
    assert {row["question"] for row in samples_of(company)} <= gold
    assert company.metrics()[1]["audit/wrong_in_loop"] == 0


async def test_given_questions_that_are_not_there(toys: SimpleNamespace, run_spell: Any) -> None:
    world = world_of(toys)
    world.gold = lambda clusters: []
    with pytest.raises(BadInput, match="proposals: gold needs questions with known answers"):
        await run_spell(toys.config(proposals="gold"), world, policy=toys.Policy(toys.writer()))


async def test_a_kl_starts_a_frozen_reference(toys: SimpleNamespace, run_spell: Any) -> None:
    policy, reference = toys.Policy(toys.writer()), toys.Policy(toys.writer())
    config = toys.config(steps=2, loss={"kl_coef": 0.1}, policy={"model": "base", "lora": {"rank": 4}})
    company = await run_spell(config, world_of(toys), policy=policy, reference=reference)
    frozen = company.configs["reference"]
    assert (frozen.model, frozen.trainer, frozen.lora) == ("base", None, None)
    assert len(reference.scored) == 2
    assert all(row.reference_logprobs is not None for request in policy.trained for row in request.rows)


async def test_several_steps_per_batch(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer())
    company = await run_spell(toys.config(steps=2, epochs=2, mini_batches=2), world_of(toys), policy=policy)
    assert policy.version == 8
    assert len(policy.scored) == 2
    assert len(company.metrics()) == 3


async def test_task_weights(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer())
    weights = {"doc_general_qa": 0, "docmath_qa": 1, "doc_mc": 0}
    company = await run_spell(toys.config(steps=2, task_weights=weights), world_of(toys, list(Task)), policy=policy)
    assert {row["task"] for row in samples_of(company)} == {"docmath_qa"}
    with pytest.raises(BadInput, match="task_weights: the clusters to learn from serve doc_general_qa"):
        await run_spell(toys.config(run="none", task_weights=weights), world_of(toys), policy=policy)
    assert not company.directory.path.with_name("none").exists()


# Safety


async def test_a_step_with_samples_of_other_weights_is_refused(toys: SimpleNamespace, run_spell: Any) -> None:
    """Strictly on-policy: weights that change while questions are under way end the run."""
    policy = toys.Policy(toys.writer())
    count = 0

    async def meddle(kind: str) -> None:
        nonlocal count
        count += kind == "vote"
        # The first is the evaluation's, the second belongs to the first questions.
        if (kind, count) == ("vote", 3):
            await policy.optim_step(OptimStepRequest())

    policy.before = meddle
    with pytest.raises(Stale, match=r"was sampled under the weights \[0\], now they are 1"):
        await run_spell(toys.config(steps=1), world_of(toys), policy=policy)


async def test_a_run_is_not_continued_over_other_documents(toys: SimpleNamespace, run_spell: Any) -> None:
    await run_spell(toys.config(steps=1), world_of(toys), policy=toys.Policy(toys.writer()))
    with pytest.raises(BadInput, match="documents: they differ"):
        await run_spell(toys.config(steps=2), world_of(toys, clusters=13), policy=toys.Policy(toys.writer()))


async def test_a_continued_run_is_the_same_run(
    toys: SimpleNamespace, run_spell: Any, restless: Callable[[int], Any]
) -> None:
    """Stopped after any step and whatever the timing: memory, cursors and expectations are in the checkpoint."""
    config = toys.config(steps=4, test_every=2, checkpoint_every=1)

    class Kept(toys.Policy):
        """Its version is all that a scripted policy learns; a real one would keep it in its checkpoint."""

        async def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
            return OptimStepResponse(version=0, grad_norm=0.0, learning_rate=0.0)

    whole = await run_spell(config.model_copy(update={"run": "a"}), world_of(toys), policy=Kept(toys.writer()))
    # A run is evaluated at its end, so it is stopped where the whole one is evaluated too.
    for steps in (0, 2, 4):
        policy = Kept(toys.writer())
        policy.before = restless(steps)
        parts = await run_spell(config.model_copy(update={"run": "b", "steps": steps}), world_of(toys), policy=policy)
    assert parts.metrics() == whole.metrics()
    assert samples_of(parts) == samples_of(whole)
