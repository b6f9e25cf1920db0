"""Answers that are written: objects with quotes, those that cannot be used, and words before a score."""

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods import phenotyping_answers
from methods.phenotyping_answers import AnswerStore, Question, Said, ask, make_asker
from methods.phenotyping_decide import rule_of
from methods.phenotyping_definition import Definition
from methods.phenotyping_prompts import (
    CLOSE,
    MOST_WRITTEN,
    OPEN,
    PLACEHOLDER,
    STATUSES,
    WRONG_OBJECT,
    WRONG_QUOTE,
    PromptConfig,
    shown,
)
from methods.phenotyping_reduce import ReduceConfig, decide, patient_score
from methods.phenotyping_sample import (
    Written,
    find_quote,
    first_object,
    in_note,
    read_answer,
    schema_of,
)
from methods.phenotyping_scan import Finding
from protocols.errors import BadInput
from protocols.messages import ChatMessage
from tests.methods.phenotyping_toys import Run, comparable, note, reader, runner, says, ward

PLAIN = PromptConfig(answer="sample")


def told(answer: str, status: str, quote: str) -> str:
    return json.dumps({"answer": answer, "status": status, "quote": quote, "reason": "So it says."})


def snippet_of(text: str) -> str:
    return re.findall(r"<<<\n(.*?)\n>>>", text, re.DOTALL)[-1]


def honest(text: str) -> str:
    """Quotes the words around the disease."""
    snippet = snippet_of(text)
    found = re.search(r"\w+\s+(veltosis|kolosis|\[it\])|(veltosis|kolosis|\[it\])\s+\w+", snippet, re.I)
    answer = says(snippet)
    assert found
    return told(answer, {"yes": "present", "no": "negated", "uncertain": "possible"}[answer], found.group())


def scribe(toys: Any, write: Callable[[str], str], context: int = 1 << 20) -> Any:
    policy = reader(toys, context)
    policy.write = lambda call: write(call.text)
    return policy


@pytest.fixture
def run(tmp_path: Path, toys: Any) -> Run:
    return runner(tmp_path, lambda: scribe(toys, honest))


async def test_written_answers_quote_what_stands_in_the_notes(run: Run) -> None:
    notes = [
        note("ill", 0, "PLAN:\nShe has \n  veltosis and takes her medicine every day."),
        note("ill", 2, "No evidence of veltosis at today's visit in the clinic."),
        note("maybe", 0, "There is possible veltosis, to be confirmed by biopsy."),
        note("none", 0, "Nothing of note."),
    ]
    done = await run("written", notes, "answer=sample")
    texts = {str(one["note_id"]): str(one["text"]) for one in notes}
    ill = done.decisions["ill", "velto"]
    assert (ill["decision"], ill["score"], ill["asked"]) == ("yes", 1.0, 2)
    assert [(one["answer"], one["status"], one["p"]) for one in ill["evidence"]] == [
        ("yes", "present", 1.0),
        ("no", "negated", 0.0),
    ]
    quoted = [texts[one["note_id"]][slice(*one["evidence"])] for one in ill["evidence"]]
    assert quoted == ["has \n  veltosis", "of veltosis"]
    for one in ill["evidence"]:
        assert texts[one["note_id"]][one["start"] : one["end"]] == one["quote"]
    maybe = done.decisions["maybe", "velto"]
    assert (maybe["decision"], maybe["score"], maybe["evidence"][0]["status"]) == ("uncertain", 0.5, "possible")
    assert done.decisions["none", "velto"]["decision"] == "no_evidence"
    assert not done.policy.scored and len(done.policy.calls) == 3
    for request in done.policy.requests:
        assert (request.params.temperature, request.params.max_tokens) == (0.0, MOST_WRITTEN)
        assert request.params.structure is None
    words = [len(honest(call.text).split()) + 1 for call in done.policy.calls]
    assert sum(one["decoded"] for one in done.decisions.values()) == sum(words)
    prompts = [len(prompt.tokens) for request in done.policy.requests for prompt in request.prompts]
    assert sum(one["tokens"] for one in done.decisions.values()) == sum(prompts)


async def test_an_engine_that_can_is_held_to_the_form(run: Run) -> None:
    notes = [note("p", 0, "She has veltosis and takes her medicine.")]
    done = await run("held", notes, "answer=sample", "policy.sampler.engine=vllm")
    (request,) = done.policy.requests
    schema = json.loads(request.params.structure.json_schema)
    assert request.params.structure.json_schema == schema_of(PLAIN)
    assert schema["required"] == ["answer", "status", "quote", "reason"] and not schema["additionalProperties"]
    assert schema["properties"]["answer"] == {"enum": ["yes", "no", "uncertain"]}
    assert schema["properties"]["status"] == {"enum": list(STATUSES)}
    assert [schema["properties"][name]["maxLength"] for name in ("quote", "reason")] == [200, 80]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (told("yes", "present", "has  VX"), Written("yes", "present", (4, 10))),
        (told("Uncertain ", "possible", "."), Written("uncertain", "possible", (10, 11))),
        (f"Here: {told('no', 'family', 'She')} or {told('yes', 'present', 'She')}", Written("no", "family", (0, 3))),
        ("{not this} " + told("no", "other_sense", "VX."), Written("no", "other_sense", (8, 11))),
        ("", WRONG_OBJECT),
        ("yes", WRONG_OBJECT),
        ('{"answer": "yes", "status": "present", "quote": "She h', WRONG_OBJECT),
        ('["answer"]', WRONG_OBJECT),
        ('{"a":' * 2000, WRONG_OBJECT),
        ('{"answer": ' + "9" * 5000 + "}", WRONG_OBJECT),
        ("{}", "answer: expected one of yes, no, uncertain."),
        (told("maybe", "present", "She"), "answer: expected one of yes, no, uncertain."),
        ('{"answer": ["yes"]}', "answer: expected one of yes, no, uncertain."),
        (told("yes", "gone", "She"), f"status: expected one of {', '.join(STATUSES)}."),
        ('{"answer": "yes", "status": {}}', f"status: expected one of {', '.join(STATUSES)}."),
        (told("yes", "present", "she"), WRONG_QUOTE),
        (told("yes", "present", " \n"), WRONG_QUOTE),
        (told("yes", "present", "She has VX. And"), WRONG_QUOTE),
        (told("yes", "present", "\ud83d"), WRONG_QUOTE),
        ('{"answer": "yes", "status": "present"}', WRONG_QUOTE),
    ],
    ids=lambda value: str(value)[:40] or "nothing",
)
def test_reads_an_answer_or_says_what_is_wrong(text: str, found: Written | str) -> None:
    assert read_answer(text, "She has\nVX.", PLAIN) == found


def test_labels_of_another_language_are_read() -> None:
    german = PromptConfig(answer="sample", labels={"yes": "ja", "no": "nein", "uncertain": "unklar"})
    assert read_answer(told("Nein", "negated", "VX"), "kein VX", german) == Written("no", "negated", (5, 7))
    assert json.loads(schema_of(german))["properties"]["answer"] == {"enum": ["ja", "nein", "unklar"]}
    assert isinstance(read_answer(told("no", "negated", "VX"), "kein VX", german), str)


def test_the_first_object_of_a_text() -> None:
    assert first_object('x {"a": {"b": 1}} {"c": 2}') == {"a": {"b": 1}}
    assert first_object("{{}") == {} and first_object("}{") is None


LETTERS = st.text(alphabet=st.sampled_from("ab <>\n\t\u00a0\u2003é\U0001f600[it]"), max_size=40)


@given(LETTERS, st.data())
def test_quotes_are_found_where_they_stand(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    # Whatever white space the policy writes instead.
    blank = data.draw(st.sampled_from([" ", "\n", " \t "]))
    quote = blank.join(text[start:end].split())
    place = find_quote(blank + quote + blank, text)
    if not quote.strip():
        assert place is None
        return
    assert place is not None
    a, b = place
    assert text[a:b].split() == quote.split()
    assert (
        not text[a].isspace()
        and not text[b - 1].isspace()
        and a <= start + len(text[start:end]) - len(text[start:end].lstrip())
    )


@given(LETTERS, LETTERS)
def test_what_does_not_stand_there_is_not_found(quote: str, text: str) -> None:
    stands = bool(quote.split()) and " ".join(quote.split()) in " ".join(text.split())
    assert (find_quote(quote, text) is not None) == stands


@given(LETTERS, LETTERS, LETTERS, st.booleans(), st.integers(0, 1000), st.data())
def test_a_quote_of_what_is_shown_is_a_place_in_the_note(
    before: str, match: str, after: str, mask: bool, at: int, data: st.DataObject
) -> None:
    text = before + match + after
    matches = [(at + len(before), at + len(before) + len(match))]
    finding = Finding(set="x", start=at, end=at + len(text), text=text, matches=matches)
    seen = shown(finding, mask=mask)
    assert OPEN not in seen and CLOSE not in seen
    if not seen:
        return
    a = data.draw(st.integers(0, len(seen) - 1))
    b = data.draw(st.integers(a + 1, len(seen)))
    start, end = in_note(finding, (a, b), mask=mask)
    assert at <= start < end <= at + len(text)
    inside = Finding(
        set="x", start=start, end=end, text=text[start - at : end - at],
        matches=[one for one in matches if start <= one[0] and one[1] <= end],
    )  # fmt: skip
    # The part that stands there is shown as the words that were quoted; of a hidden word the whole stands for each
    # of its letters.
    assert seen[a:b] in shown(inside, mask=mask)
    if not mask or not match:
        assert seen[a:b] == shown(inside, mask=mask)
    if not mask and OPEN not in text and CLOSE not in text:
        assert text[start - at : end - at] == seen[a:b]


def test_marks_of_any_length_are_made_harmless() -> None:
    finding = Finding(set="x", start=7, end=19, text="<<<<<a>>>>b<<", matches=[(12, 13)])
    finding = finding.model_copy(update={"end": 7 + len(finding.text)})
    assert shown(finding, mask=False) == "<a>b<<"
    assert shown(finding, mask=True) == f"<{PLACEHOLDER}>b<<"
    assert in_note(finding, (0, 2), mask=False) == (7, 13)
    assert in_note(finding, (2, 3), mask=True) == (12, 13)


async def test_what_cannot_be_used_is_asked_for_once_more(tmp_path: Path, toys: Any) -> None:
    """Of four notes one is answered well at once, one after a revision, and two never."""

    def write(text: str) -> str:
        snippet = snippet_of(text)
        if "never" in snippet:
            return "I cannot say." if "cannot be used" in text else ""
        if "invents" in snippet and "cannot be used" not in text:
            return told("yes", "present", "words of its own")
        return honest(text)

    notes = [
        note("good", 0, "She has veltosis and takes her medicine."),
        note("second", 0, "The doctor invents veltosis in this one."),
        note("bad", 0, "He was never well with veltosis at all."),
        note("bad", 1, "He was never seen with veltosis before."),
        note("twice", 0, "He was never happy with kolosis at all."),
        note("twice", 1, "He was never asked about kolosis before."),
    ]
    run = runner(tmp_path, lambda: scribe(toys, write))
    done = await run("revised", notes, "answer=sample", "questions_per_call=64")
    got = {name: done.decisions[name, "velto"] for name in ("good", "second", "bad")}
    assert [(one["decision"], one["score"]) for one in got.values()] == [("yes", 1), ("yes", 1), ("uncertain", 0.5)]
    for one in got["bad"]["evidence"]:
        assert (one["answer"], one["p"], one["status"], one["evidence"]) == ("uncertain", 0.5, "", None)
    # Two uncertain answers are not two that say yes.
    assert done.decisions["twice", "kolo"]["decision"] == "no"
    asked = [call for call in done.policy.calls if "cannot be used" not in call.text]
    again = [call.text for call in done.policy.calls if "cannot be used" in call.text]
    assert (len(asked), len(again)) == (6, 5)
    assert sum(WRONG_QUOTE in text for text in again) == 1 and sum(WRONG_OBJECT in text for text in again) == 4
    (invented,) = [text for text in again if WRONG_QUOTE in text]
    assert invented.count("words of its own") == 1 and invented.index("words of its own") < invented.index(
        WRONG_QUOTE
    )
    # Both prompts count, and all that was written.
    calls = [call.text for call in done.policy.calls if "invents" in call.text]
    assert got["second"]["tokens"] == sum(len(text.split()) for text in calls)
    assert got["second"]["decoded"] == sum(len(write(text).split()) + 1 for text in calls)
    assert sum(one["asked"] for one in done.decisions.values()) == 6


async def test_no_room_to_ask_again_is_uncertain(toys: Any, tmp_path: Path) -> None:
    message = [ChatMessage(role="user", content=f"{OPEN}\nHe has VX.\n{CLOSE}")]
    size = len(message[0].content.split())
    for room, calls in ((size, 1), (size + 20, 1), (size + 40, 2)):
        policy = scribe(toys, lambda text: "no object " * 10, context=room + MOST_WRITTEN)
        asker = await make_asker(policy, PLAIN, policy.context, 2, 1)
        store = AnswerStore(tmp_path / f"{room}.sqlite")
        (said,) = (await ask(asker, [Question("k", message, "He has VX.")], store, "r/1", lambda *_: None)).values()
        store.close()
        assert len(policy.calls) == calls
        assert (said.answer, said.probs, said.quote) == ("uncertain", (0.5, 0, 0.5), None)
        assert said.decoded == 21 * calls
    policy = scribe(toys, honest, context=size + MOST_WRITTEN - 1)
    asker = await make_asker(policy, PLAIN, policy.context, 2, 1)
    store = AnswerStore(tmp_path / "short.sqlite")
    assert await ask(asker, [Question("k", message)], store, "r/1", lambda *_: None) == {
        "k": Said(None, size, 0, "r/1", "failed")
    }
    store.close()
    assert not policy.calls


def test_half_a_yes_is_uncertain() -> None:
    definition = Definition(phenotype_id="x", version="1", name="X", description="X.", terms=["x"])
    rule = rule_of(None, definition, PLAIN)
    assert [decide(score, 1, rule) for score in (0.0, 0.499, 0.5, 0.501, 1.0)] == [
        "no",
        "no",
        "uncertain",
        "yes",
        "yes",
    ]
    assert patient_score([0.5, 0.5, 1.0], rule.model_copy(update={"by": "count"})) == 0
    assert patient_score([1.0, 0.5, 1.0], rule.model_copy(update={"by": "count"})) == 1
    # Scores of labels, and thresholds of the user's own, are left alone.
    assert rule_of(None, definition, PromptConfig()) == definition.reduce
    own = ReduceConfig(threshold=0.4, band=(0.1, 0.2))
    assert rule_of(own, definition, PLAIN) == own
    assert rule_of(ReduceConfig(band=(0.3, 0.7)), definition, PLAIN).band == (0.3, 0.7)


@pytest.mark.parametrize("call", range(1, 9))
async def test_a_run_that_is_killed_goes_on_and_asks_nothing_again(
    tmp_path: Path, toys: Any, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def write(text: str) -> str:
        return honest(text) if "cannot be used" in text or "stable" not in text else "well"

    run = runner(tmp_path, lambda: scribe(toys, write))
    whole = await run("whole", ward(12, seed=3), "calls_at_once=1", "answer=sample")
    asked = list(whole.policy.requests)
    again = sum("cannot be used" in one.text for one in whole.policy.calls)
    assert again and again < len(asked)
    kept, calls = phenotyping_answers.answered, 0

    async def dies(*words: Any) -> dict[str, Said]:
        nonlocal calls
        calls += 1
        said = await kept(*words)
        if calls == call:
            # All was asked, nothing is kept: call and revision are one.
            raise Killed
        return said

    with monkeypatch.context() as patch:
        patch.setattr(phenotyping_answers, "answered", dies)
        with pytest.raises(Killed):
            await run("part", tmp_path / "whole-notes.jsonl", "calls_at_once=1", "answer=sample")
    done = await run("part", tmp_path / "whole-notes.jsonl", "calls_at_once=1", "answer=sample")
    before, after = run.policies[-2].requests, done.policy.requests  # type: ignore[attr-defined]
    # Request for request the same; those of the call that died alone are there twice.
    twice = len(before) + len(after) - len(asked)
    assert twice in (1, 2)
    assert [r.model_dump_json() for r in [*before[:-twice], *after]] == [r.model_dump_json() for r in asked]
    assert before[-twice:] == after[:twice]
    same = [(folder / "decisions.jsonl").read_text() for folder in (whole.folder, done.folder)]
    assert same[0].replace('"run":"whole"', '"run":"part"') == same[1]
    assert done.rows == whole.rows


async def test_kept_answers_are_not_asked_again_nor_counted(run: Run, tmp_path: Path) -> None:
    shared = f"answers={tmp_path / 'shared.sqlite'}"
    first = await run("first", ward(), "answer=sample", shared)
    again = await run("again", ward(), "answer=sample", shared, "questions_per_call=7")
    assert first.policy.requests and not again.policy.requests
    assert comparable(again.decisions) == comparable(first.decisions)
    assert {(one["asked"], one["tokens"], one["decoded"]) for one in again.decisions.values()} == {(0, 0, 0)}
    # One that is scored is another question.
    other = await run("scored", ward(), shared)
    assert other.policy.scored and not other.policy.requests
    held = (tmp_path / "shared.sqlite").read_bytes()
    assert b"sis" not in held and b"present" in held


async def test_copies_that_look_the_same_are_cited_where_they_stand(run: Run) -> None:
    """Hidden names of other lengths make one question, and each note's own place counts."""
    notes = [
        note("p", 0, "Known   for years, has had veltosis all along."),
        note("q", 0, "Known   for years, has had VELTOSIS <<<<  all along."),
        note("r", 0, "Known   for years, has had VELTOSIS <<<<<<  all along."),
    ]
    done = await run("masked", notes, "answer=sample", "prompt.mask=true")
    assert len(done.policy.calls) == 2
    for one in notes:
        (cited,) = done.decisions[one["patient_id"], "velto"]["evidence"]
        assert str(one["text"])[slice(*cited["evidence"])].lower() == "had veltosis"


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "old.sqlite") as base:
        base.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, yes REAL)")
    base.close()
    with pytest.raises(BadInput, match=r"answers: .*old.sqlite cannot be used: no such column: no"):
        AnswerStore(tmp_path / "old.sqlite")


def test_answers_are_kept_as_they_are(tmp_path: Path) -> None:
    answers = {
        "a": Said((0.5, 0, 0.5), 7, 9, "r/1", "uncertain"),
        "b": Said((1, 0, 0), 7, 9, "r/1", "yes", "history", (3, 8)),
        "c": Said(None, 700, 0, "r/2"),
        "d": Said((0.2, 0.7, 0.1), 7, 0, "r/2", "no"),
    }
    store = AnswerStore(tmp_path / "a.sqlite")
    store.add(answers)
    store.add({"a": Said((1, 0, 0), 1, 1, "other/1", "yes")})
    assert store.known(["d", "a", "b", "c", "e"]) == answers
    store.close()


def test_each_form_has_a_digest_and_prompt_of_its_own() -> None:
    assert PLAIN.digest != PromptConfig().digest
    for variant in ("bare", "reasoning"):
        with pytest.raises(ValueError, match=f"variant: got {variant}, expected plain, not_counting or examples"):
            PromptConfig(answer="sample", variant=variant)
    with pytest.raises(ValueError, match="labels: expected another text"):
        PromptConfig(labels={"yes": "Y", "no": "y", "uncertain": "?"})


async def test_examples_have_the_form_that_is_asked_for(run: Run) -> None:
    notes = [note("p", 0, "She has veltosis and takes her medicine.")]
    done = await run("examples", notes, "answer=sample", "prompt.variant=examples")
    (call,) = done.policy.calls
    texts = re.findall(r"<<<\n(.*?)\n>>>\nAnswer: (.*)", call.text)
    assert [read_answer(answer, text, PLAIN) for text, answer in texts] == [
        Written("no", "family", (0, len(texts[0][0]))),
        Written("yes", "present", (0, len(texts[1][0]))),
    ]
    assert "Answer with a JSON object and nothing else" in call.text and "Answer with one of" not in call.text


async def test_reasoning_is_written_first_and_counts_as_decoded(tmp_path: Path, toys: Any) -> None:
    def thinks(text: str) -> str:
        return f"It is said {len(text)} so."

    notes = ward(8)
    words = ("prompt.variant=reasoning", "prompt.reasoning_tokens=16")
    run = runner(tmp_path, lambda: scribe(toys, thinks))
    done = await run("thinks", notes, *words)
    assert {(r.params.temperature, r.params.max_tokens, *r.params.stop) for r in done.policy.requests} == {
        (0.0, 16, "\n")
    }
    assert len(done.policy.calls) == sum(one["asked"] for one in done.decisions.values()) > 4
    assert all("Think in one short sentence first" in call.text for call in done.policy.calls)
    # What was written stands between the prompt and the label that is scored, which is led to.
    sampled = [prompt.tokens.array.tolist() for r in done.policy.requests for prompt in r.prompts]
    scored = [tokens.array.tolist() for r in done.policy.scored for tokens in r.sequences]
    said = [done.policy.ids(thinks(call.text)) for call in done.policy.calls]
    assert [one[: len(ids)] for one, ids in zip(scored[::3], sampled, strict=True)] == sampled
    lead = done.policy.ids("\nAnswer: yes")
    rest = [one[len(ids) :] for one, ids in zip(scored[::3], sampled, strict=True)]
    assert rest == [[*thought, *lead] for thought in said]
    assert all(call.text.endswith("\nThought:") for call in done.policy.calls)
    for one in done.decisions.values():
        assert one["decoded"] == 6 * one["asked"]
    assert sum(one["tokens"] for one in done.decisions.values()) == sum(map(len, sampled))
    again = await run("again", notes, *words, "questions_per_call=5", "steps=2")
    assert comparable(again.decisions) == comparable(done.decisions)
