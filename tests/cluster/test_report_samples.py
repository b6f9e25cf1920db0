import json
import math
from pathlib import Path
from typing import Any

import pytest

from cluster.report_samples import LONGEST_TEXT, Samples, choose_samples, spread, token_values


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sample(step: int, uid: str, role: str = "responder", **fields: object) -> dict[str, object]:
    return {"step": step, "role": role, "uid": uid, "input": "What?", "output": "2,111", **fields}


def written(path: Path, *rows: dict[str, object]) -> list[dict[str, Any]]:
    """The rows that the page of a run with these samples holds."""
    lines(path / "s.jsonl", list(rows))
    shown: list[dict[str, Any]] = json.loads(choose_samples(path / "s.jsonl").json, parse_constant=pytest.fail)
    return shown


def test_few_samples_are_all_shown(tmp_path: Path) -> None:
    lines(tmp_path / "s.jsonl", [sample(step, "u") for step in range(5)])
    samples = choose_samples(tmp_path / "s.jsonl", most=5)
    assert [row["step"] for row in samples.rows] == [0, 1, 2, 3, 4]
    assert choose_samples(tmp_path / "none.jsonl") == Samples()


def test_of_many_steps_first_last_and_evenly_spaced_ones_are_shown(tmp_path: Path) -> None:
    rows = [sample(step, f"{step}-{q}") for step in range(1, 101) for q in range(10)]
    lines(tmp_path / "s.jsonl", rows)
    samples = choose_samples(tmp_path / "s.jsonl", most=100)
    assert list(dict.fromkeys(row["step"] for row in samples.rows)) == [
        1,
        12,
        23,
        34,
        45,
        56,
        67,
        78,
        89,
        100,
    ]
    assert (len(samples.rows), samples.total, samples.steps, samples.total_steps) == (100, 1000, 10, 100)


def test_of_a_large_step_questions_are_shown_with_all_their_roles(tmp_path: Path) -> None:
    roles = ["questioner"] + 8 * ["responder"] + 64 * ["verifier"]
    lines(tmp_path / "s.jsonl", [sample(1, f"q{q}", role) for q in range(50) for role in roles])
    rows = choose_samples(tmp_path / "s.jsonl", most=20).rows
    shown = {uid: sorted(str(row["role"]) for row in rows if row["uid"] == uid) for uid in {r["uid"] for r in rows}}
    assert len(shown) == 4
    assert all(len(set(roles)) == 3 for roles in shown.values())
    numbers = sorted(int(str(uid)[1:]) for uid in shown)
    assert numbers[0] < 10
    assert numbers[-1] > 30


def test_the_size_of_the_page_is_bounded(tmp_path: Path) -> None:
    text = "a" * 5_000 + "数" * 10_000 + "z" * 5_000
    lines(tmp_path / "s.jsonl", [sample(1, f"q{i}", input=text) for i in range(50)])
    samples = choose_samples(tmp_path / "s.jsonl", most_bytes=300_000)
    assert len(samples.rows) == 50
    assert len(samples.json.encode()) <= 300_000
    first = str(samples.rows[0]["input"])
    assert (first[0], first[-1]) == ("a", "z")
    assert f"{20_000 - samples.longest_text * 2 // 3 - samples.longest_text // 3:,} characters left out" in first
    assert len(choose_samples(tmp_path / "s.jsonl", most_bytes=20_000).rows) < 50


def test_values_that_json_does_not_know_become_texts(tmp_path: Path) -> None:
    lines(tmp_path / "s.jsonl", [sample(1, "u", advantage=math.nan, options={"A": 1}, evidence=[1, 2])])
    row = json.loads(choose_samples(tmp_path / "s.jsonl").json, parse_constant=pytest.fail)[0]
    assert (row["advantage"], row["options"], row["evidence"]) == ("nan", '{"A": 1}', "[1, 2]")


def test_lines_that_cannot_be_parsed_are_counted(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"step": 1}\n[1]\n{"step": 1, "ou\n{"output": ' + "[" * 100_000 + "\n")
    samples = choose_samples(tmp_path / "s.jsonl")
    assert (samples.rows, samples.unreadable) == ([{"step": 1}], 3)


def test_tokens_with_values_are_let_through_with_their_mean_and_spread(tmp_path: Path) -> None:
    reply: dict[str, Any] = {"tokens": ["2", ",", "111\n"], "values": [1, None, -4.0], "marks": [False, None, True]}
    row = written(tmp_path, sample(1, "u", **reply, marks_name="first wrong token"))[0]
    assert row == sample(1, "u", **reply, marks_name="first wrong token", middle=-1.5, scale=2.5)


def test_a_row_may_say_what_is_the_middle_and_what_the_end_of_the_scale(tmp_path: Path) -> None:
    reply: dict[str, Any] = {"tokens": ["a", "b"], "values": [0.25, 0.75]}
    given: list[dict[str, Any]] = [{"middle": 0.5, "scale": 2}, {"middle": 0.0}, {"scale": 4.0}]
    wrong: list[dict[str, Any]] = [
        {"middle": "0", "scale": -1},
        {"middle": math.nan, "scale": math.inf},
        {"middle": True, "scale": 0},
    ]
    rows = written(tmp_path, *(sample(1, "u", **reply, **fields) for fields in given + wrong))
    found = [(row["middle"], row["scale"]) for row in rows]
    assert found == [(0.5, 2.0), (0.0, 0.75), (0.5, 4.0)] + 3 * [(0.5, 0.25)]


def test_equal_values_are_at_the_middle() -> None:
    # The mean of three times 0.7 in floating point is not 0.7.
    for value in (0.1, 0.7, 1 / 3):
        reply = token_values({"tokens": ["a"] * 3, "values": [value] * 3})
        assert reply is not None
        assert (reply.middle, reply.scale) == (reply.values[0], 0.0)


@pytest.mark.parametrize(
    ("tokens", "values"),
    [
        (["a", "b"], [1.0]),
        (["a"], 1.0),
        (1, [1.0]),
        ("ab", [1.0, 2.0]),
        (["a", "b"], {"a": 1.0, "b": 2.0}),
        (["a", 7], [1.0, 2.0]),
        (["a", None], [1.0, 2.0]),
        (["a", "b"], [1.0, math.nan]),
        (["a", "b"], [1.0, -math.inf]),
        (["a", "b"], [1.0, 1e200]),
        (["a", "b"], [1.0, 10**400]),
        (["a", "b"], [1.0, True]),
        (["a", "b"], [1.0, "2"]),
        (["a", "b"], [1.0, [2.0]]),
        (["a", "b"], [None, None]),
        ([], []),
        (["a" * 2 * LONGEST_TEXT], [1.0]),
    ],
)
def test_lists_that_do_not_fit_together_are_shown_as_texts(tmp_path: Path, tokens: object, values: object) -> None:
    row = written(tmp_path, sample(1, "u", tokens=tokens, values=values, marks=[True], middle=0.5))[0]
    assert not any(isinstance(value, list) for value in row.values())
    assert (row["output"], row["middle"]) == ("2,111", 0.5)


@pytest.mark.parametrize("marks", [[True], [True, 1], [True, "x"], "xy", 7, {"a": True}, [math.nan, True]])
def test_marks_that_do_not_fit_leave_the_colours(tmp_path: Path, marks: object) -> None:
    row = written(tmp_path, sample(1, "u", tokens=["a", "b"], values=[1, 2], marks=marks))[0]
    assert row["tokens"] == ["a", "b"]
    assert not isinstance(row["marks"], list)


def test_a_reply_without_its_text_is_made_of_its_tokens(tmp_path: Path) -> None:
    reply: dict[str, object] = {"step": 1, "tokens": ["2", ",111"], "values": [1, 2]}
    rows = written(tmp_path, reply, {**reply, "output": None}, {**reply, "output": "two"}, {**reply, "values": 1})
    assert [row.get("output") for row in rows] == ["2,111", "2,111", "two", None]


def test_a_long_reply_in_tokens_loses_its_middle(tmp_path: Path) -> None:
    count = 100_000
    values = [0.0] * (count // 2) + [1.0] * (count // 2)
    reply: dict[str, Any] = {"tokens": ["abc"] * (count - 1) + ["end"], "values": values, "marks": [True] * count}
    row = written(tmp_path, sample(1, "u", **reply))[0]
    tokens, shown, marks = row["tokens"], row["values"], row["marks"]
    assert len(tokens) == len(shown) == len(marks) == 4_000
    assert (tokens[0], tokens[-1]) == ("abc", "end")
    gap = tokens.index("\n[… 96,001 tokens left out …]\n")
    assert (gap, shown[gap], marks[gap]) == (2_666, None, None)
    assert (shown.index(1.0), row["middle"], row["scale"]) == (gap + 1, 0.5, 0.5)  # of the whole reply


def test_giant_tokens_are_left_out(tmp_path: Path) -> None:
    tokens = ["a", "b" * 50_000, "c", "d"]
    row = written(tmp_path, sample(1, "u", tokens=tokens, values=[1, 2, 3, 4]))[0]
    assert row["tokens"] == ["a", "\n[… 1 tokens left out …]\n", "c", "d"]
    assert row["values"] == [1.0, None, 3.0, 4.0]


def test_the_size_of_the_page_is_bounded_with_tokens_too(tmp_path: Path) -> None:
    reply: dict[str, Any] = {"tokens": ["数"] * 3_000, "values": [i / 7 for i in range(3_000)]}
    lines(tmp_path / "s.jsonl", [sample(1, f"q{i}", **reply) for i in range(50)])
    samples = choose_samples(tmp_path / "s.jsonl", most_bytes=300_000)
    assert len(samples.rows) == 50
    assert len(samples.json.encode()) <= 300_000
    kept = samples.rows[0]["tokens"]
    assert isinstance(kept, list)
    assert 100 < len(kept) < 3_000
    assert len(choose_samples(tmp_path / "s.jsonl", most_bytes=20_000).rows) < 50


def test_spread_keeps_the_ends() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(3), 4) == [0, 1, 2]
    assert spread(range(10), 1) == [0]
