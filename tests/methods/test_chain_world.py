"""The lookup chain: truth, the teacher's errors, exact credit, the tokenizer, and the base model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from methods.worlds.chain import (
    DIGITS,
    END,
    LONGEST,
    SEPARATOR,
    WILDCARD,
    ChainConfig,
    ChainWorld,
    vocabulary,
    write_skeleton,
)
from methods.worlds.chain_base import base_steps, chain_base, token_weights, train_rows
from protocols.errors import BadInput
from protocols.policy import PolicyConfig

WORLD = ChainWorld(ChainConfig(length=6, decisive=3), seed=4)
PROMPTS = st.text(DIGITS, min_size=6, max_size=6).map(lambda digits: digits + SEPARATOR)
REPLIES = st.text(DIGITS, min_size=6, max_size=6) | st.text(DIGITS + "=x", max_size=9)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def wildcard_match(reply: str, reference: str) -> bool:
    return len(reply) == len(reference) and all(b in (WILDCARD, a) for a, b in zip(reply, reference, strict=True))


def right_reply(world: ChainWorld, prompt: str) -> str:
    return world.reference(prompt).replace(WILDCARD, "0")


def spoilt(reply: str, at: int) -> str:
    return reply[:at] + str((int(reply[at]) + 1) % 10) + reply[at + 1 :]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"length": 3}, "decisive: got 4, expected 1 to length=3"),
        ({"decisive": 13}, "decisive: got 13, expected 1 to length=12"),
        ({"hard_error": (0.7, 0.5)}, r"hard_error: got \(0.7, 0.5\), expected 0 <= lowest <= highest <= 1"),
        ({"easy_error": (0.1, 1.5)}, "easy_error"),
        ({"length": LONGEST + 1}, "length"),
        ({"hard_digits": 11}, "hard_digits"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ChainConfig(**fields)


def test_a_world_follows_from_its_seed() -> None:
    world, same, other = (ChainWorld(ChainConfig(), seed) for seed in (0, 0, 1))
    for name in ("permutation", "positions", "errors"):
        assert getattr(world, name) == getattr(same, name)
        assert getattr(world, name) != getattr(other, name)
    assert world.permutation == [7, 8, 2, 0, 5, 6, 4, 9, 1, 3]
    assert world.positions == [2, 5, 8, 9]
    # Another length has other places, and all else in common.
    longer = ChainWorld(ChainConfig(length=64), 0)
    assert (longer.permutation, longer.errors) == (world.permutation, world.errors)


@given(st.integers(0, 10**9), st.integers(1, LONGEST), st.integers(0, 10), st.data())
def test_any_world(seed: int, length: int, hard: int, data: st.DataObject) -> None:
    decisive = data.draw(st.integers(1, length))
    world = ChainWorld(ChainConfig(length=length, decisive=decisive, hard_digits=hard), seed)
    assert sorted(world.permutation) == list(range(10))
    assert sorted(set(world.positions)) == world.positions and len(world.positions) == decisive
    assert world.positions[0] >= 0 and world.positions[-1] < length
    assert sum(0.5 <= error <= 0.75 for error in world.errors) == hard
    assert sum(0.03 <= error <= 0.05 for error in world.errors) == 10 - hard


def test_worlds_of_all_seeds_are_about_as_hard() -> None:
    accuracies = [ChainWorld(ChainConfig(), seed).teacher_accuracy for seed in range(200)]
    # (1 - (0.3 * 0.625 + 0.7 * 0.04)) ** 4
    assert np.mean(accuracies) == pytest.approx(0.379, abs=0.003)
    assert 0.34 < min(accuracies) < max(accuracies) < 0.42


def test_exact_values() -> None:
    world = ChainWorld(ChainConfig(length=5, decisive=2), 0)
    world.positions, world.permutation = [1, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    prompt = "40719=>"
    assert world.reference(prompt) == "?1?2?"
    assert world.is_right(prompt, "91923") and world.is_right(prompt, "01020")
    assert not world.is_right(prompt, "91933")
    assert not world.is_right(prompt, "9192") and not world.is_right(prompt, "919230")
    assert not world.is_right(prompt, "9192x") and not world.is_right(prompt, "=192=")
    assert [world.first_error(prompt, reply) for reply in ("91923", "91933", "90933", "9", "", "9192")] == [
        *(None, 3, 1, None, None, None)
    ]
    cases: list[tuple[str, int | None, list[float]]] = [
        ("91923", 6, [0, 1, 0, 1, 0, 0]),
        ("91933", 6, [0, 1, 0, -1, 0, 0]),
        ("90923", 6, [0, -1, 0, 0, 0, 0]),
        ("91923", None, [0, 1, 0, 1, 0]),
        # It ended early: what was written before is not to blame.
        ("91", 3, [0, 1, 0]),
        ("", 1, [0]),
        ("", 0, []),
        # It did not end.
        ("9192345", 7, [0, 1, 0, 1, 0, 0, 0]),
        # The separator is one token, and a wrong one.
        ("9=>923", 6, [0, -1, 0, 0, 0, 0]),
        ("=>1933", 6, [0, 1, 0, -1, 0, 0]),
        # Fewer tokens than text are not expected, but do no harm.
        ("91923", 2, [0, 1]),
        ("91933", 3, [0, 1, 0]),
    ]
    for reply, length, credit in cases:
        found = world.decisive_credit(prompt, reply, length)
        assert found.dtype == np.float64
        assert found.tolist() == credit, (reply, length)
    # What else loses the outcome is blamed by exact credit alone.
    others: dict[tuple[str, int | None], list[float]] = {
        ("91", 3): [0, 1, -1],
        ("", 1): [-1],
        ("9192", 5): [0, 1, 0, 1, -1],
        ("9192345", 7): [0, 1, 0, 1, 0, -1, 0],
        ("=>1933", 6): [-1, 0, 0, 0, 0, 0],
        ("91=>23", 6): [0, 1, -1, 0, 0, 0],
    }
    for (reply, length), credit in others.items():
        assert world.exact_credit(prompt, reply, length).tolist() == credit, (reply, length)
    for reply, length, credit in cases:
        if (reply, length) not in others:
            assert world.exact_credit(prompt, reply, length).tolist() == credit, (reply, length)


@given(PROMPTS, REPLIES)
def test_right_is_what_matches_the_reference(prompt: str, reply: str) -> None:
    digits = set(reply) <= set(DIGITS)
    assert WORLD.is_right(prompt, reply) == (digits and wildcard_match(reply, WORLD.reference(prompt)))


@given(PROMPTS, st.text(DIGITS, min_size=6, max_size=6))
def test_fillers_do_not_matter(prompt: str, fillers: str) -> None:
    right = "".join(f if r == WILDCARD else r for f, r in zip(fillers, WORLD.reference(prompt), strict=True))
    assert WORLD.is_right(prompt, right)
    for at in range(6):
        assert WORLD.is_right(prompt, spoilt(right, at)) == (at not in WORLD.positions)


@given(PROMPTS, REPLIES, st.integers(0, 12))
def test_credit_blames_the_first_error_alone(prompt: str, reply: str, length: int) -> None:
    decisive = WORLD.decisive_credit(prompt, reply, length)
    exact = WORLD.exact_credit(prompt, reply, length)
    for credit in (decisive, exact):
        assert len(credit) == length
        assert set(credit.tolist()) <= {-1, 0, 1}
        assert set(np.flatnonzero(credit == 1).tolist()) <= set(WORLD.positions)
        blamed = np.flatnonzero(credit == -1)
        assert len(blamed) <= 1
        if len(blamed):
            assert not credit[blamed[0] + 1 :].any()
    assert set(np.flatnonzero(decisive).tolist()) <= set(WORLD.positions)
    if (decisive == -1).any():
        assert np.flatnonzero(decisive == -1)[0] == WORLD.first_error(prompt, reply)
    if WORLD.is_right(prompt, reply) and length > 6:
        assert decisive.sum() == exact.sum() == len(WORLD.positions)


@given(PROMPTS, REPLIES)
def test_an_ended_reply_is_right_or_has_a_token_to_blame(prompt: str, reply: str) -> None:
    tokens = len(reply.replace("=>", "="))
    blamed = (WORLD.exact_credit(prompt, reply, tokens + 1) == -1).any()
    assert blamed != WORLD.is_right(prompt, reply)


@pytest.mark.parametrize("prompt", ["", "123", "1234567=>", "12345x=>", "123456=>=>", "１２３４５６=>"])
def test_no_prompt_of_this_world(prompt: str) -> None:
    with pytest.raises(BadInput, match=r"prompt: got .*, expected 6 digits and '=>'"):
        WORLD.reference(prompt)


def test_prompts_follow_from_the_generator() -> None:
    prompts = WORLD.prompts(rng(), 50)
    assert prompts == WORLD.prompts(rng(), 50)
    assert len(set(prompts)) > 45
    assert all(len(prompt) == 6 + len(SEPARATOR) and prompt.endswith(SEPARATOR) for prompt in prompts)


def test_the_teacher_errs_as_often_as_said() -> None:
    count = 20_000
    world = ChainWorld(ChainConfig(), 0)
    generator = rng()
    prompts_BK = world.draw(generator, count)
    replies_BK = world.answer(generator, prompts_BK)
    asked, said = prompts_BK[:, world.positions], replies_BK[:, world.positions]
    right = np.asarray(world.permutation)[asked]
    for digit, error in enumerate(world.errors):
        given = asked == digit
        wrong = (said != right)[given]
        assert abs(wrong.mean() - error) < 4 * math.sqrt(error * (1 - error) / len(wrong))
    # The wrong digits are all alike.
    shift = ((said - right) % 10)[said != right]
    assert np.abs(np.bincount(shift, minlength=10)[1:] / len(shift) - 1 / 9).max() < 4 * math.sqrt(
        8 / 81 / len(shift)
    )
    fillers = np.delete(replies_BK, world.positions, axis=1)
    assert np.abs(np.bincount(fillers.ravel()) / fillers.size - 0.1).max() < 4 * math.sqrt(0.09 / fillers.size)
    accuracy = float((said == right).all(axis=1).mean())
    expected = world.teacher_accuracy
    assert abs(accuracy - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_the_teachers_texts() -> None:
    generator = rng()
    prompts = WORLD.prompts(generator, 300)
    replies = [WORLD.teacher(generator, prompt) for prompt in prompts]
    assert {len(reply) for reply in replies} == {6}
    right = [WORLD.is_right(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    # Three decisive positions.
    assert np.mean(right) == pytest.approx(WORLD.teacher_accuracy, abs=4 * math.sqrt(0.25 / 300))


def test_a_perfect_teacher_is_right() -> None:
    world = ChainWorld(ChainConfig(length=6, hard_digits=0, easy_error=(0, 0)), 4)
    assert world.teacher_accuracy == 1
    for prompt in world.prompts(rng(), 20):
        assert world.is_right(prompt, world.teacher(rng(), prompt))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("chain")
    write_skeleton(directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["vocab_size"] == len(vocabulary()) and config["max_position_embeddings"] >= 2 * LONGEST + 2
    return AutoTokenizer.from_pretrained(directory)


def test_the_tokenizer_has_a_token_per_digit(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    encoded = tokenizer("4071" + SEPARATOR + "9" + END, return_offsets_mapping=True)
    assert encoded["input_ids"] == [4, 0, 7, 1, vocabulary().index(SEPARATOR), 9, tokenizer.eos_token_id]
    assert encoded["offset_mapping"][:6] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6), (6, 7)]
    turn = [{"role": "user", "content": "4071" + SEPARATOR}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert ids == encoded["input_ids"][:5]


@given(reply=st.text(DIGITS, max_size=20))
def test_replies_come_back(tokenizer: Any, reply: str) -> None:
    ids = tokenizer(reply + END)["input_ids"]
    assert len(ids) == len(reply) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == reply


def test_other_texts_are_unknown(tokenizer: Any) -> None:
    ids = tokenizer("1 x=\n2")["input_ids"]
    assert [ids[0], ids[-1]] == [1, 2]
    assert set(ids[1:-1]) == {tokenizer.unk_token_id}


def test_rows_of_the_base() -> None:
    weights = token_weights(WORLD)
    assert weights.array[:7].sum() == 0 and weights.array[-1] == 1
    world = ChainWorld(ChainConfig(length=12, decisive=4), 0)
    reply = token_weights(world).array[13:-1]
    assert reply[world.positions].tolist() == [1] * 4
    assert np.delete(reply, world.positions).tolist() == [0.5] * 8
    assert token_weights(ChainWorld(ChainConfig(length=4), 0)).array.tolist() == [0] * 5 + [1] * 5
    prompts_BK = WORLD.draw(rng(), 3)
    rows = train_rows(prompts_BK, 9 - prompts_BK, weights)
    separator, end = (vocabulary().index(token) for token in (SEPARATOR, END))
    digits = prompts_BK[1].tolist()
    assert rows[1].tokens.tolist() == [*digits, separator, *(9 - digit for digit in digits), end]
    assert len(rows) == 3 and len({row.row_id for row in rows}) == 3


def test_longer_chains_take_more_steps() -> None:
    assert base_steps(ChainConfig(length=8)) < base_steps(ChainConfig(length=64))
    assert base_steps(ChainConfig(base_steps=7)) == 7


@pytest.mark.slow
async def test_the_base_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ChainConfig(length=4, decisive=2, base_steps=150, base_rows=64)
    world = ChainWorld(config, 0)
    policy = PolicyConfig(threads=1, device="cpu")
    async with Cluster(MethodConfig(runs_dir=str(tmp_path)), method="qrm", run="one") as company:
        folder = Path(await chain_base(company, world, config, policy, 0))
        assert folder.parent == tmp_path / "bases"
        losses = [float(line.split("loss")[1].split()[0]) for line in capsys.readouterr().err.splitlines()[1:]]
        assert len(losses) == 3 and losses[-1] < losses[0] - 0.2
        written = (folder / "model.safetensors").stat().st_mtime_ns
        assert await chain_base(company, world, config, policy, 0) == str(folder)
        assert (folder / "model.safetensors").stat().st_mtime_ns == written
        assert list(folder.parent.iterdir()) == [folder]
        assert "loss" not in capsys.readouterr().err
        base = await company.policy(policy.model_copy(update={"model": str(folder), "trainer": None}))
        assert await right_share(base, world) > 0.1
        # Chance is 0.01, and even the teacher is right in 0.6.
        other = await chain_base(company, world, config.model_copy(update={"base_steps": 1}), policy, 0)
        assert other != str(folder)


async def right_share(policy: Any, world: ChainWorld) -> float:
    from protocols.messages import Prompt, SamplingParams
    from protocols.policy import SampleRequest

    prompts = world.prompts(rng(), 200)
    request = SampleRequest(
        prompts=[Prompt(text=prompt, seed=i) for i, prompt in enumerate(prompts)],
        params=SamplingParams(max_tokens=world.config.length + 1),
    )
    results = (await policy.sample(request)).results
    texts = [sampled.completions[0].text for sampled in results]
    return float(np.mean([world.is_right(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]))
