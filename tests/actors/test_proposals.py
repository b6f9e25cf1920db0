import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.numbers import parse_number
from actors.proposals import ParsedProposal, parse_proposal
from actors.rules import parse_answer, reference_sentence
from protocols.questions import LETTERS, ProposalStatus, Task

GENERAL, MATH, CHOICE = Task.GENERAL, Task.MATH, Task.CHOICE
OK, BAD_FORMAT, BAD_ANSWER = ProposalStatus.OK, ProposalStatus.BAD_FORMAT, ProposalStatus.BAD_ANSWER
OPTIONS = {"A": "red", "B": "3.5", "C": "blue", "D": "A mix"}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def fenced(written: object) -> str:
    block = written if isinstance(written, str) else json.dumps(written)
    return f"First, the derivation.\n```json\n{block}\n```\n"


def proposed(task: Task, answer: object, options: object = None) -> ParsedProposal:
    written = {"question": "Which one?", "answer": answer}
    return parse_proposal(task, fenced(written if options is None else {**written, "options": options}))


def test_a_clean_proposal() -> None:
    parsed = proposed(GENERAL, "Paris")
    assert parsed == ParsedProposal(OK, question="Which one?", answer="Paris")
    with pytest.raises(FrozenInstanceError):
        parsed.answer = "Rome"  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        fenced('{"question": "Who?", "answer": "x, y,}",}'),
        fenced('{"question": "Who?", "answer": "x, y,}" , \n }'),
        fenced('{"question": "Who?",\n "answer": "x, y,}", "hops": [1, 2,], "why": {"a": 1,},}'),
        '{"question": "Who?", "answer": "x, y,}"}',
        '  {"question": "Who?", "answer": "x, y,}"}\n',
        '```\n{"question": "Who?", "answer": "x, y,}"}\n```',
        '```JSON {"question": "Who?", "answer": "x, y,}"} ```',
        '```json\n{"question": "Who?", "answer": "x, y,}"}',
        fenced('{"question": "No?", "answer": "no"}') + fenced('{"question": "Who?", "answer": "x, y,}"}'),
        fenced('{"question": "Who?", "answer": "x, y,}"}') + fenced("not json") + fenced("[1]"),
        "<think>```json {}```</think>" + fenced('{"question": "Who?", "answer": "x, y,}"}'),
        fenced('{"question": "W\\u0000h\\ud800o?", "answer": "x, \x07y,}"}'),
        fenced('{"question": "Who?", "answer": ["x, y,}"]}'),
        fenced('{"question": "Who?", "answer": "The answer is Y. No: the correct answer is: x, y,}."}'),
        fenced('{"question": "Who?", "answer": "x,\n y,}"}'),
    ],
)
def test_tolerated_forms(text: str) -> None:
    assert parse_proposal(GENERAL, text) == ParsedProposal(OK, question="Who?", answer="x, y,}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "nothing was written"),
        (" \n\t\0\0", "nothing was written"),
        ("The question is who.", "no JSON object"),
        (fenced("[1, 2]"), "no JSON object"),
        (fenced('"text"'), "no JSON object"),
        (fenced('{"question": "Who?" "answer": 1}'), "no JSON object"),
        ("{" * 100_000, "no JSON object"),
        ('{"a":' * 100_000, "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ('{"a": "' + '\\"' * 100_000, "no JSON object"),
        ('{"a": ' + "9" * 10_000 + "}", "no JSON object"),
        ("```" * 10_000, "no JSON object"),
        (fenced({}), "question: got None; expected a text or a number"),
        (fenced({"question": "Who?"}), "answer: got None; expected a text or a number"),
        (fenced({"question": ["Who?", "When?"], "answer": "a"}), "question: got ['Who?', 'When?']"),
        (fenced({"question": "...", "answer": "a"}), "question: got '...'; expected a question in words"),
        (fenced({"question": 7, "answer": "a"}), "question: got '7'; expected a question in words"),
        (fenced({"question": "", "answer": "a"}), "question: got ''; expected a text that is not empty"),
        (fenced({"question": "Who?", "answer": " "}), "answer: got ''; expected a text that is not empty"),
        (fenced({"question": "Who?", "answer": "..."}), "answer: got '...'; expected an answer"),
        (fenced({"question": "Who?", "answer": "X"}), "answer: got 'X'; expected an answer"),
        (fenced({"question": "Who?", "answer": True}), "answer: got True"),
        (fenced({"question": "Who?", "answer": ["a", "b"]}), "answer: got ['a', 'b']"),
        (fenced({"question": "Who?", "answer": {"a": 1}}), "answer: got {'a': 1}"),
        (fenced({"question": "Who?", "answer": {"a": "b" * 1000}}), "answer: got {'a': 'bbb"),
    ],
)
def test_bad_format(text: str, reason: str) -> None:
    parsed = parse_proposal(GENERAL, text)
    assert parsed.status is BAD_FORMAT
    assert parsed.reason.startswith(reason)
    assert len(parsed.reason) < 160


@pytest.mark.parametrize("text", ["<think>", "<think>so", "</think><think>" + fenced({})])
def test_unfinished_thoughts(text: str) -> None:
    assert parse_proposal(GENERAL, text).status is ProposalStatus.TRUNCATED


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        (12, "12"),
        (-0.25, "-0.25"),
        (1e-7, "1e-07"),
        ("12", "12"),
        ("$1,234 million", "$1,234 million"),
        ("(5.93%)", "(5.93%)"),
        ("3/4", "3/4"),
        ([12], "12"),
        ("Therefore, the answer is: 12.", "12"),
        ("\\boxed{12\\%}", "12%"),
    ],
)
def test_numeric_answers(written: object, answer: str) -> None:
    parsed = proposed(MATH, written)
    assert (parsed.status, parsed.answer) == (OK, answer)


@pytest.mark.parametrize(
    "written",
    [
        0,
        0.0,
        "0",
        "-0.00",
        "$0",
        "5-5",
        999999999,
        "999,999,999",
        "",
        "many",
        "1/0",
        "9**9**9",
        "5 or 6",
        "1e999",
    ],
)
def test_unusable_numbers(written: object) -> None:
    assert proposed(MATH, written).status is BAD_ANSWER


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999999999"])
def test_numbers_that_json_should_not_have(number: str) -> None:
    assert parse_proposal(MATH, fenced(f'{{"question": "How?", "answer": {number}}}')).status is BAD_ANSWER


@pytest.mark.parametrize("written", [None, True, [], [1, 2], {"value": 1}])
def test_numbers_of_another_type(written: object) -> None:
    assert proposed(MATH, written).status is BAD_FORMAT


@pytest.mark.parametrize(
    ("written", "letter"),
    [
        ("B", "B"),
        ("B) 3.5", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        (["B"], "B"),
        ("**B**", "B"),
        ("Option B", "B"),
        ("The correct answer is B.", "B"),
        ("3.5", "B"),
        (3.5, "B"),
        ("A mix", "D"),
    ],
)
def test_letters(written: object, letter: str) -> None:
    parsed = proposed(CHOICE, written, OPTIONS)
    assert (parsed.status, parsed.answer, parsed.options) == (OK, letter, list(OPTIONS.values()))


@pytest.mark.parametrize("written", ["E", "b", "", "Because", "BC", "X", 2, None])
def test_bad_letters(written: object) -> None:
    assert proposed(CHOICE, written, OPTIONS).status is BAD_FORMAT


@pytest.mark.parametrize(
    "options",
    [
        ["red", "3.5", "blue", "A mix"],
        ["A) red", "B) 3.5", "C) blue", "D) A mix"],
        {"(A)": "(A) red", "B.": "(B) 3.5", "c": "(C) blue", "D": "(D) A mix"},
        {"A": "red", "B": 3.5, "C": ["blue"], "D": "A mix", "E": "more"},
    ],
)
def test_forms_of_options(options: object) -> None:
    parsed = proposed(CHOICE, "B", options)
    assert (parsed.status, parsed.options) == (OK, list(OPTIONS.values()))


@pytest.mark.parametrize(
    "options",
    [
        "A B C D",
        [],
        ["red", "blue", "green"],
        ["red", "blue", "green", "pink", "black"],
        {"A": "red", "B": "blue", "C": "green"},
        {**OPTIONS, "C": "Red "},
        {**OPTIONS, "C": ""},
        {**OPTIONS, "C": None},
        {**OPTIONS, "C": {"text": "blue"}},
    ],
)
def test_bad_options(options: object) -> None:
    assert proposed(CHOICE, "A", options).status is BAD_FORMAT


def test_options_may_differ_in_a_sign_alone() -> None:
    assert proposed(CHOICE, "A", ["5", "-5", "0.5", "C++"]).status is OK


def test_options_are_required() -> None:
    assert proposed(CHOICE, "A").reason == "options: got None; expected an object with A, B, C and D"


@given(st.sampled_from(Task), st.text())
def test_never_raises(task: Task, text: str) -> None:
    for written in (text, fenced(text), "{" + text):
        assert isinstance(parse_proposal(task, written), ParsedProposal)


@given(st.sampled_from(Task), JSON, JSON, JSON)
def test_never_raises_on_json(task: Task, question: object, answer: object, options: object) -> None:
    written = {"question": question, "answer": answer, "options": options}
    parsed = parse_proposal(task, fenced(written))
    assert (parsed.status is OK) == (parsed.reason == "")


@given(st.text(min_size=1), st.text(min_size=1), st.booleans())
def test_what_is_accepted_reads_back(question: str, answer: str, comma: bool) -> None:
    block = json.dumps({"question": question, "answer": answer}, ensure_ascii=comma)
    parsed = parse_proposal(GENERAL, fenced(block[:-1] + ", }" if comma else block))
    if parsed.status is OK:
        assert parse_answer(GENERAL, reference_sentence(GENERAL, parsed.answer)) == parsed.answer
        parsed.question.encode()
        parsed.answer.encode()


@given(st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(-(10**12), 10**12))
def test_numbers_read_back(value: float) -> None:
    parsed = proposed(MATH, value)
    if parsed.status is OK:
        number = parse_number(parsed.answer)
        assert number is not None
        assert float(number.value) == value
        assert parse_answer(MATH, reference_sentence(MATH, parsed.answer)) == parsed.answer
    else:
        assert value in (0, 999999999)


@given(st.permutations(["red", "green", "blue", "black"]), st.sampled_from(LETTERS))
def test_options_keep_their_order(options: list[str], letter: str) -> None:
    named = dict(reversed(list(zip(LETTERS, options, strict=True))))
    parsed = proposed(CHOICE, letter, named)
    assert (parsed.options, parsed.answer) == (options, letter)
