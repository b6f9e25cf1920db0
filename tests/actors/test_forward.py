from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from actors.policy.forward import LEAST_SHARED, NEAR_END, SHARING, common, hosts_of, logits_of, longest_shared, score
from actors.policy.loading import Loaded

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MORE: dict[str, dict[str, Any]] = {
    "glm": {"partial_rotary_factor": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
}


def a_model(kind: str, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL | MORE.get(kind, {}) | options)).eval()


def rows_of_one_prompt() -> tuple[list[np.ndarray], np.ndarray]:
    """Rows with 9 tokens in common, and which of their tokens are wanted."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 50, 9)
    rows = [np.r_[prompt, rng.integers(1, 50, length)].astype(np.int32) for length in (4, 1, 7, 4)]
    wanted = np.zeros((4, 16), np.bool_)
    for i, row in enumerate(rows):
        wanted[i, 9 : len(row)] = True
    wanted[:, 11] = False
    return rows, wanted


@pytest.mark.parametrize("kind", sorted(SHARING))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_prompt_changes_no_logits(kind: str, attention: str) -> None:
    model = a_model(kind)
    model.set_attn_implementation(attention)
    rows, wanted = rows_of_one_prompt()
    logits, targets, positions = logits_of(model, rows, wanted)
    shared_logits, shared_targets, shared_positions = logits_of(model, rows, wanted, 9)
    assert positions.tolist() == shared_positions.tolist() == [9, 10, 12, 13, 14, 15]
    assert torch.equal(targets, shared_targets)
    there = torch.from_numpy(np.asarray([[p < len(row) for p in positions] for row in rows]))
    assert there.sum() == 3 + 1 + 6 + 3
    assert logits[there].std() > 0.5
    torch.testing.assert_close(shared_logits[there], logits[there], atol=2e-5, rtol=0)


def test_a_shared_prompt_and_all_that_follows_is_one_row(llama: Loaded, forward_calls: Any) -> None:
    rows, wanted = rows_of_one_prompt()
    with forward_calls(llama.model) as calls:
        logits_of(llama.model, rows, wanted, 9)
    assert [tuple(call["input_ids"].shape) for call in calls] == [(1, 9 + 4 + 1 + 7 + 4)]


@pytest.mark.parametrize(
    ("kind", "options", "longest"),
    [
        ("llama", {}, None),
        ("gpt2", {}, None),
        ("mistral", {"sliding_window": 7}, 7),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, 5),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 32}, None),
        ("gemma2", {"sliding_window": 6}, 6),
        ("gpt_neo", {}, 0),
        ("mamba", {}, 0),
    ],
)
def test_rows_longer_than_a_window_do_not_share(kind: str, options: dict[str, Any], longest: int | None) -> None:
    found = longest_shared(CONFIG_MAPPING[kind](**options))
    assert found == longest if longest is not None else found > 1 << 30


def test_answers_to_one_prompt_are_one_row() -> None:
    prompt = list(range(1, 20))
    rows = [[*prompt, 3], [*prompt, 4], [*prompt, 5, 6, 7], [*prompt, 5, 9], prompt, [2], [*prompt, 3], [8, 9]]
    found = hosts_of([np.asarray(row, np.int32) for row in rows])
    assert found == [2, 2, 2, 2, 2, 5, 2, 7]
    far = [*prompt, *range(NEAR_END + 1)]
    assert hosts_of([np.asarray(row, np.int32) for row in (far, [*prompt, 49])]) == [0, 1]


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(8, 64))
def test_rows_score_together_as_alone(rows: list[list[int]], budget: int) -> None:
    model = a_model("llama")
    tokens = [np.asarray(row, np.int32) for row in rows]
    for together, row in zip(score(model, tokens, 0.7, budget), tokens, strict=True):
        (alone,) = score(model, [row], 0.7, budget)
        np.testing.assert_allclose(together, alone, atol=2e-5)
        assert together[0] == 0


@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=12),
    st.sampled_from([0, LEAST_SHARED - 1, LEAST_SHARED, 30]),
    st.integers(1, 12),
    st.sampled_from([64, 2048]),
)
def test_last_tokens_are_scored_as_with_all_others(rows: list[list[int]], start: int, last: int, budget: int) -> None:
    model = a_model("llama")
    tokens = [np.asarray([*range(4, 4 + start), *row], np.int32) for row in rows]
    whole = score(model, tokens, 0.7, budget)
    for ends, every in zip(score(model, tokens, 0.7, budget, last), whole, strict=True):
        wanted = np.arange(len(every)) >= max(1, len(every) - last)
        np.testing.assert_allclose(ends, np.where(wanted, every, 0), atol=2e-5)


@pytest.mark.parametrize("kind", sorted(SHARING))
def test_what_prompts_begin_with_goes_through_the_model_once(kind: str, forward_calls: Any) -> None:
    model = a_model(kind)
    template = np.arange(1, 1 + 2 * LEAST_SHARED)
    questions = [np.r_[template, 40 + i, np.full(i, 2)] for i in range(4)]
    rows = [np.r_[question, answer].astype(np.int32) for question in questions for answer in (7, 8, 9)]
    with forward_calls(model) as calls:
        found = score(model, rows, 1.0, 2048, 1)
    assert [tuple(call["input_ids"].shape) for call in calls] == [(1, len(template)), (4, 1 + 3 + 1)]
    for ends, every in zip(found, score(model, rows, 1.0, 2048), strict=True):
        np.testing.assert_allclose(ends[-1], every[-1], atol=2e-5)
        assert not ends[:-1].any() and ends[-1] < 0


def test_rows_have_leading_tokens_in_common() -> None:
    rows = [np.asarray(row, np.int32) for row in ([1, 2, 3, 4], [1, 2, 9, 4, 5], [1, 2])]
    assert [common(rows), common(rows[:2]), common(rows[:1]), common([rows[0], rows[1][2:]])] == [2, 2, 4, 0]
