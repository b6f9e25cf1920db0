import json
import math
from pathlib import Path

import pytest

from cluster.report_samples import Samples, choose_samples, spread


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sample(step: int, uid: str, role: str = "responder", **fields: object) -> dict[str, object]:
    return {"step": step, "role": role, "uid": uid, "input": "What?", "output": "2,111", **fields}


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


def test_spread_keeps_the_ends() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(3), 4) == [0, 1, 2]
    assert spread(range(10), 1) == [0]
