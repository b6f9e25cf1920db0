"""What is counted before anything is asked: dry runs, and budgets that end a run in time."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from methods import phenotyping, phenotyping_answers
from protocols.service import Message
from tests.methods.phenotyping_toys import Run, note, reader, runner, ward


class Killed(BaseException):
    pass


@pytest.fixture
def run(tmp_path: Path, toys: Any) -> Run:
    return runner(tmp_path, lambda: reader(toys))


def summary_of(done: SimpleNamespace) -> str:
    return "\n".join(json.loads((done.folder / "summary.json").read_text())["notes"])


def totals(done: SimpleNamespace) -> dict[str, float]:
    names = ("patients", "snippets", "different", "questions", "asked", "tokens")
    return {name: sum(row[name] for row in done.rows[1:]) for name in names}


@pytest.mark.parametrize("words", [(), ("answer=sample",), ("prompt.variant=reasoning",)])
async def test_a_dry_run_counts_what_a_run_takes_and_asks_nothing(
    tmp_path: Path, toys: Any, words: tuple[str, ...]
) -> None:
    notes = [*ward(10), *(note(f"c{i}", 0, "He has veltosis, as was known before to all.") for i in range(9))]
    dry = await runner(tmp_path, lambda: reader(toys))("dry", notes, "dry_run=true", *words)
    assert not (dry.policy.scored or dry.policy.requests) and not dry.decisions
    left = {"decisions", "decisions.jsonl", "note_nlp.csv", "cohort.csv", "fhir", "review.html"}
    assert not left & {file.name for file in dry.folder.iterdir()}

    def make() -> Any:
        policy = reader(toys)
        quote = '{"answer": "no", "status": "negated", "quote": "osis"}'
        policy.write = lambda call: quote if words == ("answer=sample",) else "It is so."
        return policy

    real = await runner(tmp_path, make)("real", notes, *words)
    assert totals(dry) == totals(real)
    # Copies in buckets of their own are counted once.
    assert totals(dry)["questions"] > totals(dry)["asked"] > 10
    prompts = real.policy.requests or real.policy.scored
    sizes = [len(p.tokens) for r in prompts for p in r.prompts] if real.policy.requests else []
    sizes = sizes or [len(tokens) - 1 for r in prompts for tokens in r.sequences[::3]]
    told = totals(dry)
    assert sum(sizes) == told["tokens"]
    assert max(row["longest"] for row in dry.rows[1:]) == max(sizes)
    text = summary_of(dry)
    assert f"{int(told['questions'])} questions, {len(sizes)} of them to be asked: {sum(sizes):,} tokens of" in text
    assert f"The longest prompt has {max(sizes)} tokens; 0 exceed the 1,048," in text
    assert f"{int(told['snippets'])} snippets" in text and f"{int(told['snippets'])} snippets" in summary_of(real)
    written = {(): 0, ("answer=sample",): 128, ("prompt.variant=reasoning",): 64}[words]
    assert re.findall(r"Up to ([\d,]+) tokens are written", text) == [f"{len(sizes) * written:,}"] * bool(written)


async def test_what_is_kept_and_what_is_too_long_is_told(tmp_path: Path, toys: Any) -> None:
    shared = f"answers={tmp_path / 'shared.sqlite'}"
    notes = [
        note("p", 0, "She has veltosis and takes her medicine."),
        note("q", 0, "She denies veltosis of any kind."),
    ]
    await runner(tmp_path, lambda: reader(toys))("first", notes[:1], shared)
    full = await runner(tmp_path, lambda: reader(toys))("full", notes, shared, "dry_run=true")
    assert (totals(full)["questions"], totals(full)["asked"]) == (2, 1)
    tokens = int(totals(full)["tokens"])
    for room, many in ((tokens, 0), (tokens - 1, 1)):
        words = (shared, "dry_run=true", "budget_tokens=1")
        done = await runner(tmp_path, lambda room=room: reader(toys, room + 1))(f"room{room}", notes, *words)
        assert f"; {many} exceed the {room} that the policy can read" in summary_of(done)
        assert len(done.rows) == 4


@pytest.mark.parametrize("bucket", [1, 2, 3])
async def test_a_dry_run_that_is_killed_counts_the_same(
    run: Run, bucket: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notes = [*ward(10), *(note(f"c{i}", 0, "He has veltosis, as was known before to all.") for i in range(9))]
    whole = await run("whole", notes, "dry_run=true")
    kept, calls = phenotyping.note_down, 0

    def dies(*words: Any) -> None:
        nonlocal calls
        calls += 1
        kept(*words)
        if calls == bucket:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(phenotyping, "note_down", dies)
        with pytest.raises(Killed):
            await run("part", tmp_path / "whole-notes.jsonl", "dry_run=true")
    done = await run("part", tmp_path / "whole-notes.jsonl", "dry_run=true")
    assert done.rows == whole.rows and summary_of(done) == summary_of(whole)


def needs(done: SimpleNamespace) -> list[int]:
    return [int(row["tokens"]) for row in done.rows[1:]]


async def test_the_budget_ends_the_run_before_it_is_exceeded(run: Run) -> None:
    notes = ward(12)
    one, two, three = needs(await run("free", notes))
    assert min(one, two, three) > 0
    for budget, buckets in (
        *((one - 1, 0), (one, 1), (one + two - 1, 1), (one + two, 2)),
        *((one + two + three - 1, 2), (one + two + three, 3)),
    ):
        done = await run(f"budget{budget}", notes, f"budget_tokens={budget}")
        assert [row["tokens"] for row in done.rows[1:]] == [one, two, three][:buckets] + [0] * (buckets < 3)
        read = sum(len(tokens) - 1 for r in done.policy.scored for tokens in r.sequences[::3])
        assert read == sum([one, two, three][:buckets]) <= budget
        assert len(list((done.folder / "decisions").glob("*"))) == buckets if buckets else not done.decisions
        assert ("Not all patients" in summary_of(done)) == (buckets < 3)


async def test_a_budget_is_kept_by_a_run_that_was_killed(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notes = ward(12)
    one, two, _ = needs(await run("whole", notes))
    whole = await run("bounded", tmp_path / "whole-notes.jsonl", f"budget_tokens={one + two}")
    kept, calls = phenotyping_answers.answered, 0

    async def dies(*words: Any) -> Message:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return await kept(*words)  # type: ignore[return-value]

    with monkeypatch.context() as patch:
        patch.setattr(phenotyping_answers, "answered", dies)
        with pytest.raises(Killed):
            await run("part", tmp_path / "whole-notes.jsonl", f"budget_tokens={one + two}", "calls_at_once=1")
    done = await run("part", tmp_path / "whole-notes.jsonl", f"budget_tokens={one + two}", "calls_at_once=1")
    assert done.rows == whole.rows
    assert len(run.policies[-2].scored) == 3  # type: ignore[attr-defined]


async def test_without_a_budget_nothing_is_counted_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(phenotyping, "cost_of", never)
    assert (await run("free", ward(3))).decisions
    with pytest.raises(AssertionError):
        await run("bounded", ward(3), "budget_tokens=9")


def test_the_plan_counts_the_retriever_and_a_policy_that_is_given() -> None:
    given = phenotyping.Config(notes=["n.jsonl"], definitions=["d.yaml"])
    assert phenotyping.policies(given) == {"retriever": given.retriever, "policy": given.policy}
    assert list(phenotyping.policies(phenotyping.Config(world="wards"))) == ["retriever"]
