import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methods.lookahead_config import Config, DataConfig
from methods.lookahead_data import one_in, read_answered, read_queries, rows_of, simulated, split
from methods.worlds.skills import EXPERT, OTHERS, SECOND, SkillsConfig, SkillsWorld
from protocols.errors import BadInput

ROW = {"id": "1", "instruction": "what?", "models": ["a", "b"], "responses": ["x", "y"], "scores": [1, 0]}


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_models_are_joined_by_name(tmp_path: Path) -> None:
    turned = ROW | {"id": "2", "models": ["b", "a"], "responses": ["by", "ax"], "scores": [0.5, 0.25]}
    alone = ROW | {"id": "3", "models": ["b"], "responses": ["by"], "scores": [1]}
    file = written(tmp_path / "data.jsonl", ROW, turned, alone)
    answered = read_answered(DataConfig(collected=[file]))
    assert answered.models == ["a", "b"]
    assert answered.answers == [["x", "y"], ["ax", "by"]]
    assert answered.scores == [[1, 0], [0.25, 0.5]]
    assert answered.notes == ["1 queries left out: no answer of a"]
    smaller = read_answered(DataConfig(collected=[file], models=["b"]))
    assert smaller.scores == [[0], [0.5], [1]]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert read_answered(DataConfig(collected=[str(file)])).queries[0].id == "1"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scores": [1]}, "field scores: expected a list with one entry per model"),
        ({"responses": "xy"}, "field responses: expected a list"),
        ({"scores": [1, float("nan")]}, "field scores: got nan of 'b', expected a finite number"),
        ({"scores": [1, True]}, "field scores: got True of 'b'"),
        ({"scores": [1, None]}, "field scores: got None of 'b'"),
        ({"models": ["a", "a"]}, "field models: expected each name once"),
        ({"models": ["a", 1]}, "expected texts"),
        ({"id": 7}, "field id: got 7, expected text"),
        ({"id": ""}, "field id: got '', expected a name"),
        ({"instruction": None}, "field instruction: got None, expected text"),
        ({"id": "0"}, "field id: '0' occurs twice"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], error: str) -> None:
    file = written(tmp_path / "data.jsonl", ROW | {"id": "0"}, ROW | change)
    with pytest.raises(BadInput, match="line 2: ") as raised:
        read_answered(DataConfig(collected=[file]))
    assert error in raised.value.message


def test_missing_fields_and_models_are_named(tmp_path: Path) -> None:
    bare = {key: value for key, value in ROW.items() if key != "instruction"}
    with pytest.raises(BadInput, match="line 1: field instruction: required, but missing"):
        read_answered(DataConfig(collected=[written(tmp_path / "bare.jsonl", bare)]))
    file = written(tmp_path / "data.jsonl", ROW)
    with pytest.raises(BadInput, match=r"data\.models, data\.prices: got 'c', expected one of a, b"):
        read_answered(DataConfig(collected=[file], models=["c"]))
    with pytest.raises(BadInput, match="hold no query"):
        read_answered(DataConfig(collected=[written(tmp_path / "none.jsonl")]))
    with pytest.raises(BadInput, match="'1' occurs twice"):
        read_queries([written(tmp_path / "two.jsonl", ROW, ROW)])


def many(tmp_path: Path, count: int) -> DataConfig:
    rng = np.random.default_rng(0)
    rows = [
        ROW | {"id": f"q{i}", "source": "st"[i % 2], "scores": rng.integers(-6, 7, size=2).tolist()}
        for i in range(count)
    ]
    return DataConfig(collected=[written(tmp_path / "many.jsonl", *rows)])


def test_scores_are_brought_to_one_scale_within_each_source(tmp_path: Path) -> None:
    file = written(
        tmp_path / "data.jsonl",
        *(ROW | {"id": str(i), "source": source, "scores": scores} for i, (source, scores) in enumerate(
            [("x", [-6, 6]), ("x", [0, 3]), ("y", [0.25, 0.5]), ("z", [2, 2])])),
    )  # fmt: skip
    rows = rows_of(read_answered(DataConfig(collected=[file])))
    assert [row.scores for row in rows] == [[0, 1], [0.5, 0.75], [0, 1], [0, 0]]


def test_scores_on_worked_numbers(tmp_path: Path) -> None:
    """Section 5.5: all candidates of a source together."""
    five = {"models": list("abcde"), "responses": list("vwxyz"), "scores": [0.2, 0.9, 0.75, 0.1, 0.6]}
    (row,) = rows_of(read_answered(DataConfig(collected=[written(tmp_path / "data.jsonl", ROW | five)])))
    np.testing.assert_allclose(row.scores, [0.125, 1, 0.8125, 0, 0.625])


def test_the_split_does_not_depend_on_other_rows(tmp_path: Path) -> None:
    config = many(tmp_path, 400)
    answered = read_answered(config)
    whole = split(answered, config)
    for part in (answered.queries, answered.answers, answered.scores):
        del part[200:]
    half = split(answered, config)
    for name in ("train", "validation", "test"):
        ids, fewer = ([row.uid for row in getattr(one, name)] for one in (whole, half))
        assert fewer == [uid for uid in ids if int(uid[1:]) < 200]
    assert all(one_in("v", row.uid, 5) for row in whole.test)
    assert 50 < len(whole.test) < 110


def test_ties_and_empty_answers_do_not_train(tmp_path: Path) -> None:
    config = many(tmp_path, 400)
    answered = read_answered(config)
    answered.scores[:100] = [[1.0, 1.0]] * 100
    answered.answers[100:150] = [["x", " "]] * 50
    found = split(answered, config)
    assert all(int(row.uid[1:]) >= 150 for row in found.train)
    assert any(int(row.uid[1:]) < 150 for row in found.test)
    assert len(found.notes) == 2 and "an answer is empty" in found.notes[0] and "all score the same" in found.notes[1]
    kept = split(answered, config.model_copy(update={"drop_ties": False}))
    assert any(int(row.uid[1:]) < 100 for row in kept.train)
    few = split(answered, config.model_copy(update={"train_queries": 20}))
    assert len(few.train) == 20 and {row.uid for row in few.train} < {row.uid for row in found.train}


def test_too_little_data_is_said(tmp_path: Path) -> None:
    config = many(tmp_path, 2)
    with pytest.raises(BadInput, match="of 2 queries none are left for"):
        split(read_answered(config), config)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, r"expected one of data\.collected, data\.queries \(with pool\) and world"),
        ({"world": "skills", "data": {"collected": ["x"]}}, "expected one of"),
        ({"data": {"queries": ["x"]}}, "pool: got 0 models, expected at least two"),
        ({"world": "skills", "pool": {"a": {}, "b": {}}}, r"pool: it answers data\.queries"),
        ({"world": "skills", "router": {"candidates": [{"name": "a"}]}}, r"router\.candidates"),
        ({"world": "skills", "data": {"models": ["a"]}}, r"they are of data\.collected"),
        ({"data": {"queries": ["x"]}, "pool": {"org/m": {}, "b": {}}}, r"pool: got the name 'org/m'"),
        ({"data": {"queries": ["x"]}, "pool": {"auto": {}, "b": {}}}, r"pool: got the name 'auto'"),
        ({"data": {"test_one_in": 4}}, "expected one to be odd"),
        ({"world": "skills", "price_weights": [-1]}, "greater than or equal to 0"),
        ({"world": "skills", "stage": "evaluate"}, r"router\.trained: expected the folder"),
        ({"world": "skills", "router": {"trainer": None}}, r"router\.trainer: expected one"),
        (
            {"data": {"queries": ["x"]}, "pool": {"a": {"policy": {"trainer": {}}}, "b": {}}},
            "the pool does not learn",
        ),
    ],
)
def test_configurations_that_contradict_themselves(given: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Config.model_validate(given)


def test_steps_belong_to_the_stage_and_the_kind() -> None:
    assert Config(world="skills", steps=30).steps == 30
    assert Config.model_validate({"world": "skills", "router": {"kind": "knn"}}).steps == 1
    assert Config(world="skills", stage="collect").steps == 0


# The world of hidden skills.


def test_the_world_is_what_it_says() -> None:
    config = SkillsConfig(queries=4000, test_queries=4000, noise=0.0)
    world, data = SkillsWorld(config, 3), simulated(config, 3, 0)
    assert (world.success_ST == EXPERT).sum(1).tolist() == [1] * 6
    assert set(np.unique(world.success_ST)) <= {EXPERT, SECOND, OTHERS}
    by_answers: dict[tuple[str, ...], list[list[float]]] = {}
    for row in data.train:
        by_answers.setdefault(tuple(row.answers), []).append(row.scores)
    # Without noise answers tell the skill, and flips of a coin come up as often as they should.
    assert len(by_answers) == 6
    rates = sorted(np.mean(flips, axis=0).round(1).tolist() for flips in by_answers.values())
    assert np.abs(np.array(rates) - np.array(sorted(world.success_ST.tolist()))).max() < 0.12
    assert {tuple(row.scores) for row in data.test} == {tuple(row) for row in world.success_ST.tolist()}


def test_shuffled_answers_tell_nothing_and_change_nothing_else() -> None:
    plain, shuffled = (
        simulated(SkillsConfig(queries=500, noise=0.0, shuffle_answers=shuffle), 0, 0) for shuffle in (False, True)
    )
    assert [(r.prompt, r.scores) for r in plain.train] == [(r.prompt, r.scores) for r in shuffled.train]
    for t in range(4):
        before, after = ([row.answers[t] for row in one.train] for one in (plain, shuffled))
        assert sorted(before) == sorted(after) and before != after
    assert len({tuple(row.answers) for row in shuffled.train}) > 50


# Real answers.


@pytest.mark.data
@pytest.mark.skipif("REPERTORY_DATA" not in os.environ, reason="REPERTORY_DATA is unset")
def test_the_public_models_are_as_their_page_says() -> None:
    folder = Path(os.environ["REPERTORY_DATA"]) / "lookahead"
    expected = {
        "arena_hard": (256, [-0.422, -1.422, -0.973, -1.730, -0.789]),
        "gsm8k": (665, [0.874, 0.890, 0.908, 0.817, 0.866]),
        "math": (2521, [0.516, 0.630, 0.444, 0.446, 0.616]),
        "self_oss": (2606, [0.360, 0.546, 0.493, 0.497, 0.577]),
    }
    for source, (count, means) in expected.items():
        answered = read_answered(DataConfig(collected=[str(folder / f"{source}.jsonl.gz")]))
        assert len(answered.queries) == count
        np.testing.assert_allclose(np.mean(answered.scores, axis=0), means, atol=5e-4)
