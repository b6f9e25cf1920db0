"""Real text without training: parsing, packing, growth and scorers, with a scripted policy."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from methods.worlds.text import TextConfig, TextWorld
from protocols.questioner import ProposeRequest, QuestionerConfig, RememberRequest
from protocols.questions import LETTERS, Cluster, Task

GENERAL, MATH, CHOICE = Task.GENERAL, Task.MATH, Task.CHOICE


def everything(world: TextWorld) -> dict[str, Cluster]:
    return {one.question_id: one for one in [*world.training, *world.heldout]}


DATA = "REPERTORY_DATA"


def data_folder() -> Path:
    if not os.environ.get(DATA):
        pytest.skip(f"{DATA} is not set")
    return Path(os.environ[DATA]) / "spell"


def real_world(name: str, **options: Any) -> TextWorld:
    folder = data_folder()
    paths = {"documents": str(folder / f"{name}.jsonl"), "clusters": str(folder / "clusters.jsonl")}
    return TextWorld(TextConfig.model_validate(paths | options), 0)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "clusters", "tasks"),
    [
        ("documents", 7, {GENERAL, CHOICE}),
        ("short_paragraphs", 16, {GENERAL, CHOICE}),
        ("financial_paragraphs", 10, {MATH}),
    ],
)
def test_real_documents_load(name: str, clusters: int, tasks: set[Task]) -> None:
    found = everything(real_world(name))
    assert len(found) == clusters
    assert {one.task for one in found.values()} == tasks
    assert all(3 <= len(one.paragraphs) <= 20 for one in found.values())


@pytest.mark.data
def test_real_questions_load() -> None:
    folder = data_folder()
    lines = (folder / "qa_dev.jsonl").read_text(encoding="utf-8").splitlines()
    given = {row["id"]: row for row in map(json.loads, lines)}
    texts = {}
    for name in ("short_paragraphs", "financial_paragraphs"):
        text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
        texts.update({row["id"]: row["text"] for row in map(json.loads, text.splitlines())})
    seen = Counter[Task]()
    for name in ("short_paragraphs", "financial_paragraphs"):
        world = real_world(name, qa=str(folder / "qa_dev.jsonl"), heldout_share=0)
        clusters = everything(world)
        for question in world.gold(world.heldout):
            shown = [clusters[question.question_id].paragraphs[i] for i in question.evidence]
            wanted = [texts[i] for i in given[question.id]["evidence_ids"]]
            assert len(shown) == len(wanted)
            assert all(any(text in one for one in shown) for text in wanted)
            seen[question.task] += 1
    assert seen == {GENERAL: 305, MATH: 497, CHOICE: 42}


@pytest.mark.data
async def test_packing_and_growth_on_real_text(toys: SimpleNamespace) -> None:
    """A scripted questioner over every real cluster, its every question admitted."""
    limit = 3000

    def write(call: Any) -> str:
        words = call.text.split("</text>")[0].split()
        number = next((word for word in words if re.fullmatch(r"[1-9]\d*", word)), "1")
        answer = number if "numerical" in call.text else words[1]
        options = [answer, "none a", "none b", "none c"] if "multiple choice" in call.text else []
        return toys.proposal(f"What about {call.uid}?", "A" if options else answer, options)

    worlds = [real_world(name) for name in ("short_paragraphs", "financial_paragraphs", "documents")]
    clusters = [one for world in worlds for one in everything(world).values()]
    policy = toys.Policy(write)
    cast = await toys.cast(policy, QuestionerConfig(max_prompt_tokens=limit))
    read: dict[str, list[int]] = {}
    statuses = Counter[str]()
    dropped = 0
    for turn in range(5):
        uids = [f"{one.question_id}-{turn}" for one in clusters]
        response = await cast.questioner.propose(ProposeRequest(clusters=clusters, uids=uids, seed=turn))
        for made in response.proposals:
            read.setdefault(made.question_id, []).append(len(made.evidence))
            statuses[made.status] += 1
            dropped += made.dropped_documents
        worth = [made for made in response.proposals if made.status == "ok"]
        await cast.questioner.remember(RememberRequest(proposals=worth))
    assert max(len(call.text.split()) for call in policy.calls) <= limit
    sizes = {one.question_id: len(one.paragraphs) for one in clusters}
    short = [read[name] for name in read if name.startswith("pepS")]
    assert all(counts == [5, 10, 15, 20, 20] for counts in short)
    assert all(max(counts) <= sizes[name] for name, counts in read.items())
    # The long documents have thousands of words each: some are left out, some never fit, all are counted.
    assert dropped > 0
    assert statuses.keys() == {"ok", "overlong"}
    assert statuses["ok"] > 5 * len(short)


@pytest.mark.data
async def test_rounds_on_real_questions(toys: SimpleNamespace) -> None:
    """Gold questions as proposals; half of the answers are the gold ones, the others are not."""
    from methods.spell_rounds import Fate, given, play

    folder = data_folder()
    replies = {
        MATH: "Therefore, the answer is {}.",
        GENERAL: "The correct answer is {}.",
        CHOICE: "The answer is {}.",
    }
    for name in ("short_paragraphs", "financial_paragraphs"):
        world = real_world(name, qa=str(folder / "qa_dev.jsonl"), heldout_share=0)
        clusters, questions = everything(world), {one.id: one for one in world.gold(world.heldout)}

        def write(call: Any, questions: Any = questions) -> str:
            question = questions[call.uid]
            if question.task is CHOICE:
                wrong = LETTERS[LETTERS.index(question.answer) - 1]
            else:
                wrong = "-987654321" if question.task is MATH else "nobody"
            answer = question.answer if call.index % 2 else wrong
            return replies[question.task].format(answer)

        config = toys.config(proposals="gold", max_input_tokens=1 << 19)
        cast = await toys.cast(toys.Policy(write))
        rounds = [given(clusters[one.question_id], one, one.id) for one in questions.values()]
        for round_ in await play(cast, config, rounds, 0):
            assert round_.fate is Fate.GOOD, round_.proposal
            assert round_.rewards == [0.0, 1.0, 0.0, 1.0], round_.proposal
