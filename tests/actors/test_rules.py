import json
import os
import string
from collections import defaultdict
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.numbers import number_text
from actors.rules import (
    covers,
    is_supported,
    misquoted,
    normalize,
    parse_answer,
    reference_sentence,
    rule_score,
)
from protocols.questions import LETTERS, Task

GENERAL, MATH, CHOICE = Task.GENERAL, Task.MATH, Task.CHOICE
PIECES = [
    "answer is", "The answer is", "the correct answer is:", "boxed{", "\\boxed{", "}", "X", "A", "(B)", "12",
    "-3.5%", "million", "Paris", "not", ".", ",", "\n", "<think>", "</think>", "$", "**", "[answer]", "=",
    "/",
]  # fmt: skip
REPLIES = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map(" ".join)
WORDS = st.lists(
    st.sampled_from(["paris", "in", "1889", "the", "not", "U.S.A.", "3.5", "-5", "co-op"]), max_size=6
).map(" ".join)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("The correct answer is Paris.", "Paris"),
        ("THE ANSWER IS Paris", "Paris"),
        ("so the answer is: Paris", "Paris"),
        ("Answer is Paris", "Paris"),
        ("The answer is Rome. So the correct answer is Paris.", "Paris"),
        ("The correct answer is Rome. Wait, the answer is Paris.", "Paris"),
        ('The correct answer is "Paris".', "Paris"),
        ("**The correct answer is:** Paris", "Paris"),
        ("The correct answer is:\n\n**Paris**\nas I said", "Paris"),
        ("The correct answer is Paris.\nIt is in France.", "Paris"),
        ("The correct answer is U.S.A.", "U.S.A"),
        ("The correct answer is __init__.", "__init__"),
        ("<think>The answer is Rome.</think>The answer is Paris.", "Paris"),
        ("<think>a</think>b</think>The answer is Paris.", "Paris"),
        ("the correct answer is V0 .", "V0"),
        ("The correct answer is X1.", "X1"),
        ("<think>The answer is Paris.", None),
        ("The answer is Paris. <think>", None),
        ("The answer isn't Paris", None),
        ("Paris", None),
        ("", None),
        ("The correct answer is", None),
        ("The correct answer is X.", None),
        ('The correct answer is X." where X is the concise answer.', None),
        ("The correct answer is ...", None),
        ("The correct answer is [answer].", None),
        ("The correct answer is <your answer>.", None),
        ("The correct answer is Paris. The correct answer is [X].", None),
    ],
)
def test_free_answers(reply: str, answer: str | None) -> None:
    assert parse_answer(GENERAL, reply) == answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("answer is: 12", "12"),
        ("Therefore, the answer is 12.", "12"),
        ("THE ANSWER IS 12", "12"),
        ("The answer is 1,234.5.", "1,234.5"),
        ("The answer is $1,234 million.", "$1,234 million"),
        ("The answer is (5.93%).", "(5.93%)"),
        ("The answer is −5.", "-5"),
        ("The answer is 12.5 per cent of sales in 2019.", "12.5 per cent"),
        ("The answer is 3. No, the answer is 4.", "4"),
        ("The answer is 3. I hope the answer is clear.", "3"),
        ("The answer is 100 - 20 = 80.", "80"),
        ("The answer is **12** million.", "12 million"),
        ("The answer is\n$$\n12\n$$", "12"),
        ("The answer is \\(12\\).", "12"),
        ("\\boxed{3} and then \\boxed{\\frac{1}{2}}, so the answer is 7", "1/2"),
        ("$\\boxed{12\\%}$", "12%"),
        ("\\boxed{\\text{unknown}}. The answer is 3.", "3"),
        ("\\boxed{12", None),
        ("The answer is X.", None),
        ("The answer is COVID19.", None),
        ("The answer is 9**9**9.", None),
        ("The answer is " + "9" * 10_000, None),
        ("The answer is unclear.\n12", None),
        ("12", None),
        ("<think>The answer is 12.", None),
    ],
)
def test_numeric_answers(reply: str, answer: str | None) -> None:
    assert parse_answer(MATH, reply) == answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("The correct answer is B.", "B"),
        ("the answer is: B", "B"),
        ("ANSWER IS (B)", "B"),
        ("The correct answer is B) 3.5", "B"),
        ("The correct answer is **B**.", "B"),
        ("The correct answer is option B, since A is not.", "B"),
        ('The correct answer is "B".', "B"),
        ("The answer is A. No, the correct answer is B.", "B"),
        ("The correct answer is A. The answer is B", "B"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("The answer is A: \\boxed{B}", "B"),
        ("<think>The answer is A.</think>The answer is B", "B"),
        ("The answer is Because", None),
        ("The answer is b", None),
        ("The answer is E", None),
        ("The answer is X.", None),
        ("The answer is C.S. Lewis", None),
        ("The answer is C++", None),
        ("The answer is D-Day", None),
        ("The answer is not B", None),
        ("B", None),
        ("<think>The answer is B", None),
    ],
)
def test_letters(reply: str, answer: str | None) -> None:
    assert parse_answer(CHOICE, reply) == answer


@pytest.mark.parametrize(
    "unit",
    [
        "answer is ",
        "answer ",
        "\\boxed{",
        "boxed {",
        "answer is the ",
        "{",
        "}",
        " ",
        "*",
        "-",
        ".",
        "1,",
        "(",
    ],
)
@pytest.mark.parametrize("head", ["", "The answer is ", "\\boxed{"])
@pytest.mark.parametrize("task", Task)
def test_repetition_ends(task: Task, head: str, unit: str) -> None:
    parse_answer(task, head + unit * 20_000)


@given(st.sampled_from(Task), st.one_of(st.text(), REPLIES), WORDS)
def test_never_raises(task: Task, reply: str, reference: str) -> None:
    answer = parse_answer(task, reply)
    assert answer is None or answer
    for mode in ("tokens", "characters"):
        assert rule_score(task, answer, reference, mode) in (0.0, 1.0)
        assert rule_score(task, reply, reply, mode) in (0.0, 1.0)
    is_supported(task, reply, [reference, reply])
    normalize(reply)


@given(st.sampled_from(Task), st.one_of(st.text(), REPLIES))
def test_references_read_back(task: Task, text: str) -> None:
    answer = parse_answer(task, reference_sentence(task, text))
    if answer is not None:
        assert parse_answer(task, reference_sentence(task, answer)) == answer


@given(st.text(alphabet=string.ascii_letters + string.digits + " ,;-'/%", min_size=1))
def test_plain_references_keep_their_words(text: str) -> None:
    assume("answer" not in text.lower() and text.strip() != "X")
    answer = parse_answer(GENERAL, reference_sentence(GENERAL, text))
    assert normalize(answer or "") == normalize(text)


@given(st.decimals(-(10**9), 10**9, places=3), st.sampled_from(["{}", "{:,}", "${}", "{}%", "{} million"]))
def test_numeric_references_keep_their_number(value: Any, form: str) -> None:
    text = form.format(value)
    answer = parse_answer(MATH, reference_sentence(MATH, text))
    assert answer == number_text(text)
    assert rule_score(MATH, answer, text) == 1.0


@pytest.mark.parametrize("letter", LETTERS)
def test_letter_references(letter: str) -> None:
    assert parse_answer(CHOICE, reference_sentence(CHOICE, letter)) == letter


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        (GENERAL, "The correct answer is Paris.", "Paris"),
        (GENERAL, "Well: the answer is Rome.\nThe answer is: Paris", "Paris"),
        (MATH, "Therefore, the answer is 12.", "12"),
        (CHOICE, "The correct answer is B) 3.5", "B"),
    ],
)
def test_references_that_contain_the_sentence(task: Task, text: str, answer: str) -> None:
    assert parse_answer(task, reference_sentence(task, text)) == answer


def test_normalize() -> None:
    assert normalize("  The U.S.A.,  a “Great” An-swer! ") == "usa great answer"
    assert normalize("the A an") == ""
    assert normalize("there another") == "there another"


@given(st.text())
def test_normalize_is_a_fixed_point(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("answer", "reference", "tokens", "characters"),
    [
        ("U.S.A.", "USA", True, True),
        ("New York", "new-york", False, False),
        ("the", "the", False, False),
        ("Paris", "", False, False),
        ("Paris", "...", False, False),
        ("", "Paris", False, False),
        ("unparisian", "Paris", False, True),
        ("12", "1", False, True),
        ("not Paris", "Paris", False, True),
        ("not in Paris", "Paris", False, True),
        ("It isn't the Paris", "Paris", False, True),
        ("neither Paris nor Rome", "Rome", False, True),
        ("not Rome but Paris", "Paris", True, True),
        ("not only Paris", "Paris", True, True),
        ("not Paris, I mean Paris", "Paris", True, True),
        ("not Paris", "not Paris", True, True),
        ("No. 5", "5", True, True),
        ("no change", "change", False, True),
        ("It is the city of Paris, in France", "a city of Paris", True, True),
        ("Paris", "the city of Paris", False, False),
        ("Paris, the city", "city Paris", False, False),
        ("35", "3.5", False, True),
        ("3.5 percent", "3.5", True, True),
        ("5", "-5", False, True),
        ("-5", "5", False, True),
        ("$1,234.", "1234", True, True),
        ("2019-12-31", "2019-12-31", True, True),
        ("Paris" + " or" * 20, "Paris", True, True),
        ("Paris" + " or" * 21, "Paris", False, True),
    ],
)
def test_covers(answer: str, reference: str, tokens: bool, characters: bool) -> None:
    assert covers(answer, reference) is tokens
    assert covers(answer, reference, "characters") is characters


@given(WORDS, WORDS, WORDS)
def test_answers_cover_their_parts(before: str, reference: str, after: str) -> None:
    assert covers(reference, reference) == bool(normalize(reference))
    assume("not" not in before.split())
    whole = f"{before} {reference} {after}"
    assert covers(whole, reference) == bool(normalize(reference))
    assert covers(whole, reference, "characters") == bool(normalize(reference))


@pytest.mark.parametrize(
    ("task", "answer", "reference", "score"),
    [
        (MATH, "100", "100.15", 1.0),
        (MATH, "100", "100.16", 0.0),
        (MATH, "-5", "5", 0.0),
        (MATH, "X", "X", 0.0),
        (MATH, None, "12", 0.0),
        (CHOICE, "B", "B", 1.0),
        (CHOICE, "B", "C", 0.0),
        (CHOICE, "red", "red", 0.0),
        (CHOICE, None, "B", 0.0),
        (GENERAL, "in Paris", "Paris", 1.0),
        (GENERAL, "unparisian", "Paris", 0.0),
        (GENERAL, None, "Paris", 0.0),
    ],
)
def test_rule_score(task: Task, answer: str | None, reference: str, score: float) -> None:
    assert rule_score(task, answer, reference) == score


def test_rule_score_with_the_cover_of_the_reference_code() -> None:
    assert rule_score(GENERAL, "unparisian", "Paris", "characters") == 1.0


REPORT = [
    "The Company’s revenue rose 14% to $15.5 billion, driven by cloud services. | 2018 | 2019",
    "Revenue | 601,256 | 510,762 | 403,110\nLoss | (2,235) | (1,100)\nOn 2019-03-01 and on 31 March 2019.",
]


@pytest.mark.parametrize(
    ("task", "answer", "supported"),
    [
        (GENERAL, "the company's revenue", True),
        (GENERAL, "driven by Cloud Services", True),
        (GENERAL, "cloud services and revenue", True),
        (GENERAL, "cloud services and cars", False),
        (GENERAL, "cloud", True),
        (GENERAL, "clou", False),
        (GENERAL, "services cloud", False),
        (GENERAL, "$15.5 billion", True),
        (GENERAL, "90,494", True),
        (GENERAL, "90,495", False),
        (GENERAL, "30 days", True),
        (GENERAL, "yes", True),
        (GENERAL, "Both of them were higher.", True),
        (GENERAL, "higher costs", False),
        (GENERAL, "", False),
        (GENERAL, "the", False),
        (CHOICE, "cloud services", True),
        (CHOICE, "cars", False),
        (CHOICE, "None of the above", True),
        (MATH, "601256", True),
        (MATH, "-90494", True),
        (MATH, "90,494 thousand", True),
        (MATH, "601.256 million", True),
        (MATH, "17.72%", True),
        (MATH, "17.7", True),
        (MATH, "17.73", False),
        (MATH, "556009", True),
        (MATH, "505042.67", True),
        (MATH, "1", True),
        (MATH, "30", True),
        (MATH, "777777", False),
        (MATH, "yes", False),
    ],
)
def test_support(task: Task, answer: str, supported: bool) -> None:
    assert is_supported(task, answer, REPORT) is supported


def test_support_bears_absurd_units() -> None:
    assert not is_supported(MATH, "777777" + " million" * 20, REPORT)
    assert not is_supported(MATH, "777777" + "%" * 190, REPORT)


def test_nothing_supports_nothing() -> None:
    assert not is_supported(GENERAL, "Paris", [])
    assert not is_supported(MATH, "12", [])


@pytest.mark.parametrize(
    ("question", "wrong"),
    [
        ('Which word follows "the quick brown"?', []),
        ("Who said “The quick, BROWN fox”?", []),
        ('Which word follows "the brown quick"?', ["the brown quick"]),
        ('Is "quick brown dog" or "jumps over it" said?', ["quick brown dog"]),
        ('What does "new normal" mean?', []),
        ('What is 5" long, and 6" wide?', []),
        ("No quotation here?", []),
        ('Left "open at the end', []),
    ],
)
def test_quotations_that_no_document_has(question: str, wrong: list[str]) -> None:
    found = misquoted(question, ["A quick brown fox jumps", "over it. The quick brown fox jumps over it."])
    assert found == wrong


@given(st.lists(WORDS, max_size=3), WORDS, WORDS, WORDS)
def test_whole_words_of_a_document_are_supported(others: list[str], before: str, words: str, after: str) -> None:
    paragraphs = [*others, f"{before} | {words} | {after}"]
    assert is_supported(GENERAL, words, paragraphs) == bool(normalize(words))


def read_rows(name: str) -> list[dict[str, Any]]:
    folder = os.environ.get("REPERTORY_DATA")
    if not folder:
        pytest.skip("REPERTORY_DATA is not set")
    lines = (Path(folder) / "spell" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_texts() -> dict[str, str]:
    rows = read_rows("financial_paragraphs.jsonl") + read_rows("short_paragraphs.jsonl")
    return {row["id"]: row["text"] for row in rows}


def score(task: Task, answer: str, reference: str) -> float:
    return rule_score(task, parse_answer(task, reference_sentence(task, answer)), reference)


def plain_value(text: str) -> float:
    value = float(text.strip("()").rstrip("%").replace("$", "").replace(",", ""))
    return -value if text.startswith("(") else value


def coincide(a: str, b: str) -> bool:
    x, y = plain_value(a), plain_value(b)
    years = all(text.isdigit() and 1900 <= int(text) < 2100 for text in (a, b))
    percents = a.endswith("%") != b.endswith("%") and (abs(x / 100 - y) <= 1e-9 or abs(x - y / 100) <= 1e-9)
    return x == y if years else percents or abs(x - y) <= 0.0015 * abs(y)


@pytest.mark.data
def test_gold_numbers() -> None:
    by_document = defaultdict(list)
    for row in read_rows("qa_dev.jsonl"):
        if row["task"] == MATH:
            by_document[tuple(row["evidence_ids"])].append(row["answer"])
            assert score(MATH, row["answer"], row["answer"]) == 1.0, row["id"]
    pairs = [pair for answers in by_document.values() for pair in permutations(answers, 2)]
    wrong = [(a, b) for a, b in pairs if score(MATH, a, b) != float(coincide(a, b))]
    assert len(pairs) > 500
    assert wrong == []


@pytest.mark.data
def test_gold_texts_and_letters() -> None:
    rows = [row for row in read_rows("qa_dev.jsonl") if row["task"] != MATH]
    assert rows
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        task = Task(row["task"])
        assert score(task, row["answer"], row["answer"]) == 1.0, row["id"]
        if task == other["task"] and normalize(row["answer"]) not in normalize(other["answer"]):
            assert score(task, other["answer"], row["answer"]) == 0.0, row["id"]


@pytest.mark.data
def test_gold_answers_are_supported() -> None:
    texts, supported = read_texts(), defaultdict(list)
    for row in read_rows("qa_dev.jsonl"):
        task, answer = Task(row["task"]), row.get("options", {}).get(row["answer"], row["answer"])
        evidence = [texts[name] for name in row["evidence_ids"]]
        supported[task].append(is_supported(task, answer, evidence))
    assert all(supported[GENERAL] + supported[CHOICE])
    assert sum(supported[MATH]) / len(supported[MATH]) > 0.95
