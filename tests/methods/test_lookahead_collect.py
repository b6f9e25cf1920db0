"""Collecting from a pool of scripted policies: once each, resumed, and shared with larger pools."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster
from methods import lookahead_collect
from methods.lookahead_collect import collect, read_kept
from methods.lookahead_config import Config
from methods.lookahead_data import Answered, Query
from protocols.errors import BadInput, Corrupt, Unavailable
from protocols.messages import FinishReason
from protocols.policy import PolicyConfig, PolicyService
from tests.methods.conftest import ScriptedPolicy, Written, serve

QUERIES = [Query(id=f"q{i}", instruction=f"say word{i}", reference=f"word{i}") for i in range(10)]
Collect = Callable[..., Awaitable[Answered]]


class Pool:
    """Policies by name: `right` says what is wanted, others say their name and when they were asked."""

    def __init__(self) -> None:
        self.policies: dict[str, ScriptedPolicy] = {}

    def policy(self, name: str) -> ScriptedPolicy:
        def write(call: Any) -> Any:
            if name == "fails" and call.text.endswith("7"):
                raise Unavailable("it is down")
            if name == "long":
                return Written("word", [5], FinishReason.LENGTH)
            return call.text.split()[-1] if name == "right" else f"{name} {call.rng.random():.6f}"

        return self.policies.setdefault(name, ScriptedPolicy(write))

    def asked(self, name: str) -> list[str]:
        """Ids of the queries that a policy was asked, in order."""
        return [call.uid for call in self.policies[name].calls] if name in self.policies else []


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def collected(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Collect:
    async def policy(self: Cluster, config: PolicyConfig, *, name: str) -> PolicyService:
        handle = await serve(PolicyService, pool.policy(name))
        self._started[name] = []
        return handle  # type: ignore[no-any-return]

    monkeypatch.setattr(Cluster, "policy", policy)

    async def collected(*names: str, queries: list[Query] = QUERIES, **given: Any) -> Answered:
        base = {"runs_dir": str(tmp_path), "data": {"queries": ["x"], "batch": 4}, "reward": {"match": "exact"}}
        config = Config.model_validate({**base, "pool": {name: {} for name in names}, **given})
        async with Cluster(config, method="lookahead", run="one") as cluster:
            return await collect(cluster, config, queries, config.pool)

    return collected


def files(tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    found = sorted((tmp_path / "collections").glob("*/*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in found}


async def test_each_model_answers_and_is_scored(collected: Collect, pool: Pool, tmp_path: Path) -> None:
    answered = await collected("right", "other", "long")
    assert answered.models == ["right", "other", "long"]
    assert answered.scores == [[1.0, 0.0, 0.0]] * 10
    assert [row[0] for row in answered.answers] == [f"word{i}" for i in range(10)]
    assert answered.notes == ["long: 10 answers ended at sampling.max_tokens"]
    assert {name: len(rows) for name, rows in files(tmp_path).items()} == {"right": 10, "other": 10, "long": 10}
    assert [len(request.prompts) for request in pool.policies["other"].requests] == [4, 4, 2]


async def test_nobody_is_asked_twice(collected: Collect, pool: Pool) -> None:
    first = await collected("right", "other")
    again = await collected("right", "other")
    assert again == first
    assert len(pool.asked("right")) == 10


async def test_a_larger_pool_asks_the_new_model_alone(collected: Collect, pool: Pool) -> None:
    first = await collected("right", "other")
    larger = await collected("right", "other", "new")
    assert [row[:2] for row in larger.answers] == first.answers
    assert (len(pool.asked("right")), len(pool.asked("new"))) == (10, 10)
    smaller = await collected("new", "right")
    assert smaller.scores == [[row[2], row[0]] for row in larger.scores]
    assert len(pool.asked("new")) == 10


async def test_what_was_answered_before_a_failure_is_kept(collected: Collect, pool: Pool, tmp_path: Path) -> None:
    whole = await collected("other", "right", runs_dir=str(tmp_path / "whole"))
    del pool.policies["other"], pool.policies["right"]
    with pytest.raises(Unavailable, match="it is down"):
        await collected("fails", "right")
    assert len(files(tmp_path)["fails"]) == 4
    pool.policies["fails"].write = lambda call: "better"
    answered = await collected("fails", "right")
    assert [row[0] == "better" for row in answered.answers] == [False] * 4 + [True] * 6
    assert [row["id"] for row in files(tmp_path)["right"]] == [query.id for query in QUERIES]
    # Answers do not depend on what was asked together, or when.
    file = next((tmp_path / "whole" / "collections").glob("*/other.jsonl"))
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:3]))
    assert await collected("other", "right", runs_dir=str(tmp_path / "whole")) == whole


async def test_a_line_that_was_cut_off_is_asked_again(collected: Collect, pool: Pool, tmp_path: Path) -> None:
    first = await collected("right", "other")
    file = next((tmp_path / "collections").glob("*/other.jsonl"))
    file.write_bytes(file.read_bytes()[:-15])
    assert await collected("right", "other") == first
    assert pool.asked("other")[10:] == ["q9"]


async def test_any_character_is_kept(collected: Collect, pool: Pool) -> None:
    """Line and paragraph separators of Unicode end no line of a file."""
    said = "one\u2028two\u2029three\x85four"
    for _ in range(2):
        pool.policy("other").write = lambda call: said
        answered = await collected("right", "other")
        assert [row[1] for row in answered.answers] == [said] * 10
    assert len(pool.asked("other")) == 10


async def test_training_alone_asks_nobody(collected: Collect, pool: Pool) -> None:
    await collected("right", "other")
    with pytest.raises(BadInput, match=r"answers are missing \(10 of new\) in .*; run stage=collect first"):
        await collected("right", "other", "new", stage="train")
    assert "new" not in pool.policies
    assert (await collected("right", "other", stage="train")).models == ["right", "other"]


async def test_two_runs_do_not_write_the_same_file(collected: Collect, tmp_path: Path) -> None:
    await collected("right", "other", queries=QUERIES)
    file = next((tmp_path / "collections").glob("*/right.jsonl"))
    file.write_text("")
    with (
        lookahead_collect.held(file),
        pytest.raises(BadInput, match="is being written by another process"),
    ):
        await collected("right", "other")
    assert (await collected("right", "other")).scores[0] == [1.0, 0.0]


async def test_answers_that_were_made_in_another_way_are_not_mixed(collected: Collect, tmp_path: Path) -> None:
    kept = {"queries": ["x"], "batch": 4, "collection": str(tmp_path / "kept")}
    await collected("right", "other", data=kept)
    with pytest.raises(BadInput, match=r"right\.jsonl was made with another sampling; expected"):
        await collected("right", "other", data=kept, sampling={"temperature": 0.1})
    # By itself it would be kept elsewhere.
    await collected("right", "other", sampling={"temperature": 0.1})
    await collected("right", "other", sampling={"temperature": 0.2})
    assert len(list((tmp_path / "collections").iterdir())) == 2


async def test_rules_need_references(collected: Collect, pool: Pool) -> None:
    bare = [query.model_copy(update={"reference": ""}) for query in QUERIES]
    with pytest.raises(BadInput, match="'q0' has no reference"):
        await collected("right", "other", queries=bare)
    assert pool.policies == {}


def test_a_damaged_collection_is_named(tmp_path: Path) -> None:
    how = {"a": 1}
    (tmp_path / "m.json").write_text(json.dumps(how))
    (tmp_path / "m.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(Corrupt, match=r"m\.jsonl line 1 is not an answer"):
        read_kept(tmp_path, "m", how)
    assert lookahead_collect.read_kept(tmp_path, "other", how) == {}
