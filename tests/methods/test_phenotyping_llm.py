"""The reduce by a policy: what it reads, in which chunks, and that nothing is lost or asked twice."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import main
from methods import phenotyping_answers
from methods.phenotyping_answers import AnswerStore, Asker, Said, make_asker, softmax
from methods.phenotyping_decide import Case, Origin, Reading
from methods.phenotyping_definition import Definition
from methods.phenotyping_evidence import EvidenceConfig, evidence_of
from methods.phenotyping_llm import Tree, Verdict, cut, packed, read_verdicts, summed, verdict_of, verdicts_of
from methods.phenotyping_prompts import FINDINGS, PromptConfig
from methods.phenotyping_scan import Finding, Scanned
from protocols.policy import ScoreRequest, ScoreResponse
from tests.methods.phenotyping_toys import VELTO, Run, comparable, note, reader, runner, ward

BY = ("reduce.by=llm", "steps=3")
DEFINITION = Definition(phenotype_id="v", version="1", name="VX", description="The patient has VX.", terms=["VX"])
SHARES = {"yes": softmax([-0.1, -3.0, -3.0]), "no": softmax([-3.0, -0.1, -3.0])}


def lines_of(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.startswith("- ")]


def judge(toys: Any, context: int = 1 << 20) -> Any:
    """Reads snippets as the reader does; of verdicts it says yes where more than half of the lines do."""

    class Judge(type(reader(toys))):  # type: ignore[misc]
        def answer(self, text: str) -> str:
            if FINDINGS not in text:
                return str(super().answer(text))
            lines = lines_of(text)
            return "yes" if sum(": yes" in line for line in lines) * 2 > len(lines) else "no"

        async def score(self, request: ScoreRequest) -> ScoreResponse:
            assert max(map(len, request.sequences)) <= self.context
            return await super().score(request)  # type: ignore[no-any-return]

        @property
        def read(self) -> list[str]:
            return [text for text in self.texts if FINDINGS in text]

    policy = Judge(lambda call: "", context=context)
    policy.seen, policy.texts = [], []
    return policy


@pytest.fixture
def run(tmp_path: Path, toys: Any) -> Run:
    return runner(tmp_path, lambda: judge(toys))


async def test_the_policy_reads_the_verdicts_oldest_first(run: Run) -> None:
    notes = [
        note("p", 9, "No evidence of veltosis at today's visit in the clinic."),
        note("p", 2, "She has veltosis\n and takes her medicine every day."),
        note("p", 5, "There is possible veltosis, to be confirmed by biopsy."),
        note("q", 0, "She has  veltosis and takes her medicine every week."),
        note("r", 0, "Nothing of note."),
        note("s", 1, "She denies veltosis, says the nurse of the ward."),
        note("s", 1, "All the same she has veltosis, says the doctor."),
        {**note("s", 1, "And he has veltosis too, says nobody in the ward."), "date": ""},
    ]
    done = await run("reads", notes, *BY)
    assert len(done.policy.read) == 2
    (mine,) = [text for text in done.policy.read if "possible" in text]
    yes, no = SHARES["yes"][0], SHARES["no"][0]
    assert lines_of(mine) == [
        f"- 7 days before the last note: yes, p {yes:.2f} <<<She has veltosis and takes her medicine every day.>>>",
        f"- 4 days before the last note: uncertain, p {no:.2f} <<<There is possible veltosis, to be confirmed by"
        " biopsy.>>>",
        f"- 0 days before the last note: no, p {no:.2f} <<<No evidence of veltosis at today's visit in the"
        " clinic.>>>",
    ]
    p = done.decisions["p", "velto"]
    assert (p["decision"], p["score"], p["reducer"]) == ("no", round(no, 6), "llm")
    assert (p["n_sent"], p["n_read"], p["asked"]) == (3, 1, 4)
    # One snippet stands for itself, and where there is none nobody is asked.
    q, r = done.decisions["q", "velto"], done.decisions["r", "velto"]
    assert (q["decision"], q["score"], q["n_read"], q["asked"]) == ("yes", round(yes, 6), 0, 1)
    assert (r["decision"], r["score"], r["n_read"], r["asked"]) == ("no_evidence", 0, 0, 0)
    s = done.decisions["s", "velto"]
    (other,) = [text for text in done.policy.read if "nobody" in text]
    assert [line.split(":")[0] for line in lines_of(other)] == ["- undated"] + ["- 0 days before the last note"] * 2
    assert (s["decision"], s["score"]) == ("yes", round(yes, 6))
    tokens = sum(len(one.array) - 1 for request in done.policy.scored for one in request.sequences[::3])
    assert sum(one["tokens"] for one in done.decisions.values()) == tokens
    row = {name: sum(one[name] for one in done.rows[1:]) for name in ("questions", "asked", "tokens")}
    assert row == {"questions": 9, "asked": 9, "tokens": tokens}


async def test_what_was_written_is_read_with_status_and_quote(tmp_path: Path, toys: Any) -> None:
    def write(text: str) -> str:
        if "denies" in text.rpartition("<<<")[2]:
            return "?"
        return '{"answer": "yes", "status": "history", "quote": "had\\nveltosis"}'

    def make() -> Any:
        policy = judge(toys)
        policy.write = lambda call: write(call.text)
        return policy

    notes = [
        note("p", 0, "The patient had veltosis as a child, it is told."),
        note("p", 3, "The patient denies that there was any veltosis."),
    ]
    done = await runner(tmp_path, make)("sampled", notes, *BY, "answer=sample")
    (text,) = done.policy.read
    assert lines_of(text) == [
        "- 3 days before the last note: yes, history <<<had veltosis>>>",
        "- 0 days before the last note: uncertain, p 0.50 <<<The patient denies that there was any veltosis.>>>",
    ]
    assert "Answer with one of: yes, no, uncertain." in text and "JSON" not in text
    assert done.decisions["p", "velto"]["score"] == round(SHARES["no"][0], 6)
    assert len(done.policy.calls) == 3 and done.decisions["p", "velto"]["asked"] == 3


def case_of(texts: Sequence[tuple[str, str, str]]) -> Case:
    """Of notes with an id, a date and a text."""
    notes = [
        Scanned(
            patient_id="p", note_id=name, date=day, digest=f"{name}{text}",
            findings=[Finding(set="v", start=0, end=len(text), text=text, matches=[(0, 2)])],
        )
        for name, day, text in texts
    ]  # fmt: skip
    evidence = evidence_of(notes, DEFINITION, EvidenceConfig(jaccard=2))
    questions = [phenotyping_answers.Question(group.finding.text, []) for group in evidence.groups]
    return Case("p", DEFINITION, len(notes), set(), evidence, questions)


def said_of(case: Case) -> dict[str, Said]:
    return {
        one.key: Said(SHARES["no" if "not" in one.key else "yes"], 5, 0, "r/1", "no" if "not" in one.key else "yes")
        for one in case.questions
    }


@given(st.permutations(range(6)))
def test_the_order_of_equal_dates_does_not_matter(order: Sequence[int]) -> None:
    days = ["2020-01-01", "2020-01-01", "2020-01-01", "2020-03-01", "", ""]
    texts = [f"VX is there in text {'abcdef'[i]} of all the patient's" for i in range(6)]
    # Ids decide the order of notes of one day elsewhere.
    case = case_of([(f"n{order[i]}", days[i], texts[i]) for i in range(6)])
    lines = [one.line for one in verdicts_of(case, said_of(case), PromptConfig())]
    yes = f"yes, p {SHARES['yes'][0]:.2f}"
    ages = ["undated", "undated", *["60 days before the last note"] * 3, "0 days before the last note"]
    assert lines == [f"- {age}: {yes} <<<{texts[i]}>>>" for age, i in zip(ages, (4, 5, 0, 1, 2, 3), strict=True)]


def test_a_snippet_that_was_too_long_has_no_verdict() -> None:
    case = case_of([("a", "", "VX is there in all of the texts"), ("b", "", "VX is not there in any of the texts")])
    said = said_of(case) | {case.questions[0].key: Said(None, 900)}
    assert [one.text for one in verdicts_of(case, said, PromptConfig())] == [case.questions[1].key]
    group = case.evidence.groups[0]
    assert verdict_of(group, Said(SHARES["yes"], 1, 0, "", "yes", "history", (0, 2)), PromptConfig()).text == "VX"


def test_a_chunk_becomes_one_verdict() -> None:
    one, two = Verdict((40, 40), 1, "yes, p 0.90", "a"), Verdict((9, 3), 4, "no, p 0.10")
    yes = Said(SHARES["yes"], 1, 0, "", "yes")
    assert summed([one, two], yes, PromptConfig()) == Verdict((40, 3), 5, f"yes, p {SHARES['yes'][0]:.2f}")
    assert summed([one, two], yes, PromptConfig()).line.startswith("- 40 to 3 days before the last note, 5 texts tog")
    assert summed([Verdict(None, 1, "no")] * 2, yes, PromptConfig()).line.startswith("- undated, 2 texts together: y")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 40))
def test_chunks_are_consecutive_and_as_long_as_they_can_be(costs: list[int], room: int) -> None:
    verdicts = [Verdict(None, 1, f"{i}") for i in range(len(costs))]
    chunks = packed(verdicts, costs, room)
    assert [one for chunk in chunks for one in chunk] == verdicts and all(chunks)
    sizes = [sum(costs[int(one.says)] for one in chunk) for chunk in chunks]
    assert all(size <= room or len(chunk) == 1 for size, chunk in zip(sizes, chunks, strict=True))
    firsts = [costs[int(chunk[0].says)] for chunk in chunks]
    assert all(size + first > room for size, first in zip(sizes, firsts[1:], strict=False))


async def asker_of(policy: Any) -> Asker:
    return await make_asker(policy, PromptConfig(variant="plain"), policy.context, 3, 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=2, max_size=24),
    spare=st.integers(0, 120),
    dense=st.booleans(),
)
async def test_every_verdict_is_in_one_prompt_of_each_level_and_each_prompt_fits(
    sizes: list[int], spare: int, dense: bool, tmp_path: Path, toys: Any
) -> None:
    head = len("\n".join(map(str, reading([]))).split())
    policy = judge(toys, context=head + 1 + spare)
    if dense:
        # Tokens of the whole are not the sum of its lines'.
        words = policy.ids
        policy.ids = lambda text: words(text + " x" * (len(text.split("\n")) // 3))
    kinds = ["VX is there and is treated,", "VX is not there, it is told,", "VX is not to be found here,"]
    texts = [f"{kinds[i % 3]} {i} " + "w " * size for i, size in enumerate(sizes)]
    case = case_of([(f"n{i}", f"2020-01-{i + 1:02d}", text) for i, text in enumerate(texts)])
    said = said_of(case)
    asker = await asker_of(policy)
    tree = Tree(DEFINITION, ["x"], verdicts_of(case, said, asker.prompt), {})
    (chunks,) = (await cut(asker, {0: tree})).values()
    base = tmp_path / "answers.sqlite"
    base.unlink(missing_ok=True)
    store = AnswerStore(base)
    origin = Origin("m", asker.prompt, "r")
    rule = DEFINITION.reduce.model_copy(update={"by": "llm"})
    found = (await read_verdicts(asker, [case], said, store, "r/1", rule, origin, lambda *_: None))[0]
    store.close()
    # The scripted policy refuses sequences that are longer than its context.
    assert len(policy.read) == len(found.asked)
    if not chunks:
        bare = [tree.question([replace(one, text="")], asker.prompt).messages[0].content for one in tree.verdicts]
        assert max(len(policy.ids(text)) for text in bare) > asker.room
        assert found == Reading(None, {})
        return
    flat = [one for chunk in chunks for one in chunk]
    assert [one.days for one in flat] == [one.days for one in tree.verdicts]
    assert all(one == other or not one.text for one, other in zip(flat, tree.verdicts, strict=True))
    # A level is read before the next one.
    first = [line for text in policy.read[: len(chunks)] for line in lines_of(text)]
    assert sorted(first) == sorted(one.line for one in flat)
    if len(chunks) == 1:
        yes = sum(": yes" in one.line for one in flat) * 2 > len(flat)
        assert found.probs == pytest.approx(SHARES["yes" if yes else "no"], abs=1e-6)
        assert len(found.asked) == 1
    elif found.probs is not None:
        # The last level stands for all.
        last = lines_of(policy.read[-1])
        counts = [int((re.search(r"(\d+) texts together", line) or [0, 1])[1]) for line in last]
        assert sum(counts) == len(texts)


def reading(verdicts: Sequence[Verdict]) -> list[str]:
    from methods.phenotyping_llm import reading_of

    return [one.content for one in reading_of(verdicts, DEFINITION, PromptConfig(variant="plain"))]


LONG = [note("p", i, f"Seen in week {i} with veltosis, stable on treatment {i}.") for i in range(12)]


def short(toys: Any, room: int) -> Any:
    return judge(toys, context=room)


PLAIN = "prompt.variant=plain"


@pytest.mark.parametrize(
    ("room", "lines"),
    [
        (1 << 20, [12]),
        (140, [3, 3, 3, 3, 4]),
        (120, [2, 2, 2, 2, 2, 2, 3, 3, 2]),
        (110, [1] * 12 + [3, 3, 3, 3, 2, 2, 2]),
    ],
)
async def test_long_charts_are_read_in_levels(tmp_path: Path, toys: Any, room: int, lines: list[int]) -> None:
    done = await runner(tmp_path, lambda: short(toys, room))("long", LONG, *BY, PLAIN)
    one = done.decisions["p", "velto"]
    assert (one["decision"], one["n_sent"], one["n_read"]) == ("yes", 12, len(done.policy.read))
    assert one["asked"] == 12 + one["n_read"]
    weeks = [week for text in done.policy.read for week in re.findall(r"Seen in week (\d+)", text)]
    assert sorted(map(int, weeks)) == list(range(12))
    assert [len(lines_of(text)) for text in done.policy.read] == lines
    if len(lines) > 1:
        counts = re.findall(r"(\d+) texts together: yes, p 0.90\n", done.policy.read[-1])
        assert sum(map(int, counts)) == 12


async def test_no_room_for_two_verdicts_is_failed(tmp_path: Path, toys: Any) -> None:
    head = len("\n".join(reading([])).replace("VX", "veltosis").split())
    policy = short(toys, head + 14)
    notes = [note("p", i, f"Seen {i} with veltosis there.") for i in range(4)]
    done = await runner(tmp_path, lambda: policy)("tiny", notes, *BY, PLAIN)
    one = done.decisions["p", "velto"]
    assert [cited["answer"] for cited in one["evidence"]] == ["yes"] * 4
    assert (one["decision"], one["score"], one["n_sent"]) == ("failed", 0, 4)
    assert one["asked"] == 4 + one["n_read"] and "4 yes" not in str(done.rows)


def kill_at(call: int, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    class Killed(BaseException):
        pass

    kept, calls = phenotyping_answers.answered, 0

    async def dies(*words: Any) -> dict[str, Said]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return await kept(*words)

    monkeypatch.setattr(phenotyping_answers, "answered", dies)
    return Killed


@pytest.mark.parametrize("call", range(3, 13, 3))
async def test_a_run_that_is_killed_reads_nothing_again(
    tmp_path: Path, toys: Any, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner(tmp_path, lambda: short(toys, 120))
    words = (*BY, PLAIN, "calls_at_once=1")
    notes = [*LONG, *ward(6, seed=3)]
    whole = await run("whole", notes, *words)
    assert any("together" in text for text in whole.policy.read)
    asked = [one.model_dump_json() for one in whole.policy.scored]
    with monkeypatch.context() as patch:
        killed = kill_at(call, patch)
        with pytest.raises(killed):
            await run("part", tmp_path / "whole-notes.jsonl", *words)
    done = await run("part", tmp_path / "whole-notes.jsonl", *words)
    before, after = run.policies[-2].scored, done.policy.scored  # type: ignore[attr-defined]
    assert len(before) == call - 1
    assert [one.model_dump_json() for one in [*before, *after]] == asked
    same = [(folder / "decisions.jsonl").read_text() for folder in (whole.folder, done.folder)]
    assert same[0].replace('"run":"whole"', '"run":"part"') == same[1]
    assert done.rows == whole.rows


async def test_a_second_run_reads_nothing(run: Run, tmp_path: Path) -> None:
    shared = f"answers={tmp_path / 'shared.sqlite'}"
    first = await run("first", ward(), *BY, shared)
    again = await run("again", ward(), *BY, shared, "questions_per_call=7", "steps=2")
    assert first.policy.read and not again.policy.scored
    assert comparable(again.decisions) == comparable(first.decisions)
    assert {one["asked"] for one in again.decisions.values()} == {0}


def test_a_policy_that_reads_snippets_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.yaml").write_text(VELTO + "reduce: {by: llm}\n")
    (tmp_path / "n.jsonl").write_text("")
    words = [f"notes=[{tmp_path / 'n.jsonl'}]", f"definitions=[{tmp_path / 'd.yaml'}]", "prompt.variant=bare"]
    assert main(["phenotyping", *words, f"runs_dir={tmp_path / 'runs'}", "wandb=disabled"]) == 2
    assert "velto: reduce.by: got llm, expected a formula" in capsys.readouterr().err
