from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from actors.policy import cache, forward, transformers_sampler
from actors.policy.cache import check_cache
from actors.policy.loading import Loaded, load
from actors.policy.rows import EncodedPrompt
from actors.policy.transformers_sampler import TransformersSampler
from protocols.errors import BadInput, Corrupt
from protocols.messages import Completion, FinishReason, SamplingParams
from protocols.policy import PolicyConfig, SamplerConfig

Watch = Callable[[Any], AbstractContextManager[list[dict[str, Any]]]]
RNG = np.random.default_rng(5)
RAGGED = [RNG.integers(1, 180, length).astype(np.int32) for length in (3, 19, 7, 11, 8)]
STOPS = list(range(40))


def sample(
    loaded: Loaded,
    prompts: Sequence[NDArray[np.int32]],
    n: int = 1,
    *,
    seeds: Sequence[int] | None = None,
    limits: dict[str, int] | None = None,
    **params: Any,
) -> list[list[Completion]]:
    sampler = TransformersSampler(loaded, SamplerConfig.model_validate(limits or {}))
    seeds = range(len(prompts)) if seeds is None else seeds
    encoded = [EncodedPrompt(tokens, seed) for tokens, seed in zip(prompts, seeds, strict=True)]
    return sampler.sample(encoded, n, SamplingParams.model_validate({"max_tokens": 12} | params), version=4)


def token_lists(results: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.tokens.tolist() for completion in completions] for completions in results]


def sizes(calls: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(call["input_ids"].shape) for call in calls]


def generate(loaded: Loaded, prompt: NDArray[np.int32], count: int) -> list[int]:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.no_grad():
        output = loaded.model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


# What is drawn.


def test_greedy_tokens_are_those_of_generate(loaded: Loaded) -> None:
    results = token_lists(sample(loaded, RAGGED, max_tokens=20, temperature=0))
    assert results == [[generate(loaded, prompt, 20)] for prompt in RAGGED]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_score(loaded: Loaded, temperature: float) -> None:
    results = sample(loaded, RAGGED, n=3, temperature=temperature, top_p=0.9, stop_token_ids=STOPS)
    pairs = [(prompt, each) for prompt, group in zip(RAGGED, results, strict=True) for each in group]
    assert len({len(completion.tokens) for _, completion in pairs}) > 3, "rows should end at different times"
    sequences = [np.concatenate([prompt, completion.tokens.array]) for prompt, completion in pairs]
    scored = forward.score(loaded.model, sequences, temperature, budget=100)
    for (prompt, completion), logprobs in zip(pairs, scored, strict=True):
        np.testing.assert_allclose(completion.logprobs.array, logprobs[len(prompt) :], atol=1e-5)


def test_score_of_padded_rows_is_that_of_each_alone(loaded: Loaded) -> None:
    together = forward.score(loaded.model, RAGGED, 0.7, budget=1000)
    for prompt, logprobs in zip(RAGGED, together, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))
        with torch.no_grad():
            table = torch.log_softmax(loaded.model(ids[None]).logits[0] / 0.7, -1)
        np.testing.assert_allclose(logprobs[1:], table[:-1].gather(-1, ids[1:, None])[:, 0], atol=1e-5)
        assert logprobs[0] == 0


def test_score_of_single_tokens_is_zero(llama: Loaded) -> None:
    assert [list(row) for row in forward.score(llama.model, [RAGGED[0][:1]] * 2, 1.0, 100)] == [[0.0], [0.0]]


def test_pairs_of_tokens_come_with_their_exact_probability(llama: Loaded) -> None:
    count, params = 3000, {"temperature": 1.3, "top_k": 3, "top_p": 0.9}
    results = sample(llama, RAGGED[:1], n=count, max_tokens=2, **params)[0]
    expected = exact_pairs(llama, RAGGED[0], 1.3, 3, 0.9)
    seen = Counter(tuple(completion.tokens.tolist()) for completion in results)
    assert seen.keys() <= expected.keys()
    chi_square = sum((seen[pair] - count * p) ** 2 / (count * p) for pair, p in expected.items())
    # At most 8 degrees of freedom; beyond 32 once in ten thousand seeds.
    assert chi_square < 32 and len(expected) > 4


def exact_pairs(
    loaded: Loaded, prompt: NDArray[np.int32], temperature: float, top_k: int, top_p: float
) -> dict[tuple[int, int], float]:
    def step(tokens: list[int]) -> dict[int, float]:
        with torch.no_grad():
            probs, best = torch.softmax(loaded.model(torch.tensor([tokens])).logits[0, -1] / temperature, -1).topk(
                top_k
            )
        probs = probs / probs.sum()
        kept = probs * ((probs.cumsum(-1) - probs) < top_p)
        return {t: p for t, p in zip(best.tolist(), (kept / kept.sum()).tolist(), strict=True) if p}

    start = prompt.tolist()
    return {(a, b): p * q for a, p in step(start).items() for b, q in step([*start, a]).items()}


# What a sample depends on.


def test_the_same_call_gives_the_same_bits(llama: Loaded) -> None:
    first, second = (sample(llama, RAGGED, n=4, stop_token_ids=STOPS) for _ in range(2))
    assert first == second


def test_a_sample_depends_on_its_seed_and_index_alone(loaded: Loaded) -> None:
    seeds = [10, 11, 12, 13, 14]
    together = token_lists(sample(loaded, RAGGED, n=4, seeds=seeds, stop_token_ids=STOPS))
    order = [3, 0, 4, 2, 1]
    moved = token_lists(
        sample(loaded, [RAGGED[i] for i in order], n=4, seeds=[seeds[i] for i in order], stop_token_ids=STOPS)
    )
    assert moved == [together[i] for i in order]
    for prompt, seed, group in zip(RAGGED, seeds, together, strict=True):
        assert token_lists(sample(loaded, [prompt], n=4, seeds=[seed], stop_token_ids=STOPS)) == [group]
        assert token_lists(sample(loaded, [prompt], n=1, seeds=[seed], stop_token_ids=STOPS)) == [group[:1]]


def test_other_seeds_and_indices_give_other_samples(llama: Loaded) -> None:
    groups = token_lists(sample(llama, [RAGGED[0]] * 3, n=3, seeds=[1, 2, 1], temperature=2.0))
    assert groups[0] == groups[2]
    assert len({tuple(tokens) for group in groups for tokens in group}) == 6


@pytest.mark.parametrize("limits", [{"max_batch_rows": 3}, {"max_batch_tokens": 70}, {"max_batch_rows": 1}])
def test_limits_cut_the_batch_and_change_no_token(
    llama: Loaded, limits: dict[str, int], forward_calls: Watch
) -> None:
    whole = token_lists(sample(llama, RAGGED, n=5))
    with forward_calls(llama.model) as calls:
        assert token_lists(sample(llama, RAGGED, n=5, limits=limits)) == whole
    rows = max(size[0] for size in sizes(calls))
    assert rows <= limits.get("max_batch_rows", 70 // (3 + 12))


def test_a_prompt_over_the_cache_limit_goes_row_by_row(llama: Loaded, forward_calls: Watch) -> None:
    with forward_calls(llama.model) as calls:
        results = sample(llama, RAGGED[1:2], n=2, limits={"max_batch_tokens": 10})
    assert [len(completion.tokens) for completion in results[0]] == [12, 12]
    assert {size[0] for size in sizes(calls)} == {1}


@pytest.mark.parametrize(
    ("module", "name", "value"), [(cache, "GROWTH", 2), (transformers_sampler, "PREFILL_TOKENS", 8)]
)
def test_how_memory_is_taken_changes_no_token(
    loaded: Loaded, module: Any, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = token_lists(sample(loaded, RAGGED, n=2, stop_token_ids=STOPS))
    monkeypatch.setattr(module, name, value)
    assert token_lists(sample(loaded, RAGGED, n=2, stop_token_ids=STOPS)) == before


# What it costs.


def test_a_prompt_is_encoded_once_for_all_its_samples(llama: Loaded, forward_calls: Watch) -> None:
    with forward_calls(llama.model) as calls:
        sample(llama, RAGGED[1:2], n=6, max_tokens=4)
    assert sizes(calls) == [(1, 19), (6, 1), (6, 1), (6, 1)]


def test_equal_prompts_are_encoded_once(llama: Loaded, forward_calls: Watch) -> None:
    with forward_calls(llama.model) as calls:
        sample(llama, [RAGGED[0], RAGGED[3], RAGGED[0].copy(), RAGGED[3]], n=2, max_tokens=2)
    assert sizes(calls) == [(2, 11), (8, 1)]


def test_rows_of_one_length_need_no_mask(llama: Loaded, forward_calls: Watch) -> None:
    with forward_calls(llama.model) as calls:
        sample(llama, [RAGGED[0], RAGGED[0][::-1].copy()], n=2, max_tokens=3)
    assert not any("attention_mask" in call for call in calls)


def test_finished_rows_leave_the_batch(llama: Loaded, forward_calls: Watch) -> None:
    with forward_calls(llama.model) as calls:
        results = sample(llama, RAGGED, n=8, max_tokens=30, temperature=2.0, stop_token_ids=STOPS)
    lengths = [len(completion.tokens) for group in results for completion in group]
    decoded = [rows for rows, _ in sizes(calls)[1:]]
    alive = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert len(decoded) == len(alive) and decoded[-1] < 8 < decoded[0]
    assert all(
        rows == left or (left < rows and rows - left < rows / 8) for rows, left in zip(decoded, alive, strict=True)
    )


def test_tokens_are_counted_without_padding(llama: Loaded) -> None:
    sampler = TransformersSampler(llama, SamplerConfig())
    params = SamplingParams(max_tokens=9, stop_token_ids=STOPS)
    results = sampler.sample([EncodedPrompt(RAGGED[0], 0), EncodedPrompt(RAGGED[1], 1)], 4, params, 0)
    assert sampler.decoded_tokens == sum(len(completion.tokens) for group in results for completion in group)


# How a sample ends.


def test_length_ends_at_max_tokens_or_the_context(loaded: Loaded) -> None:
    assert loaded.context_length == 64
    prompts = [np.resize(RAGGED[1], length) for length in (60, 63, 10)]
    results = [group[0] for group in sample(loaded, prompts, max_tokens=20, temperature=0)]
    assert [len(completion.tokens) for completion in results] == [4, 1, 20]
    assert {completion.finish_reason for completion in results} == {FinishReason.LENGTH}
    assert results[2].tokens.tolist() == generate(loaded, prompts[2], 20)


def test_a_finished_row_may_wait_at_the_end_of_the_context(loaded: Loaded) -> None:
    """One row of many is full at once; it stays in the batch until enough others are done."""
    prompts = [np.resize(RAGGED[1], 63), *[RAGGED[0]] * 19]
    results = [group[0] for group in sample(loaded, prompts, max_tokens=25, temperature=0)]
    assert [len(completion.tokens) for completion in results] == [1, *[25] * 19]
    assert results[1].tokens.tolist() == generate(loaded, RAGGED[0], 25)


def test_stop_tokens_end_a_sample_and_stay_in_it(llama: Loaded) -> None:
    full = sample(llama, RAGGED[:1], max_tokens=12)[0][0]
    stop = full.tokens.tolist()[5]
    cut = sample(llama, RAGGED[:1], max_tokens=12, stop_token_ids=[stop])[0][0]
    end = full.tokens.tolist().index(stop) + 1
    assert cut.tokens.tolist() == full.tokens.tolist()[:end]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.logprobs.tolist() == pytest.approx(full.logprobs.tolist()[:end])
    assert cut.text == llama.tokenizer.decode(cut.tokens.array, skip_special_tokens=True)


def test_the_models_own_end_token_stops(model_dirs: dict[str, Path]) -> None:
    loaded = load(PolicyConfig(model=str(model_dirs["llama"]), device="cpu"))
    assert loaded.eos_token_ids == [loaded.tokenizer.eos_token_id]
    end = sample(loaded, RAGGED[:1])[0][0].tokens.tolist()[3]
    loaded.eos_token_ids = [end]
    completion = sample(loaded, RAGGED[:1])[0][0]
    assert completion.finish_reason is FinishReason.STOP and completion.tokens.tolist()[-1] == end


def test_a_stop_text_ends_the_text_before_it_and_keeps_its_tokens(llama: Loaded) -> None:
    full = sample(llama, RAGGED[:1], max_tokens=12)[0][0]
    pieces = [llama.tokenizer.decode([token]) for token in full.tokens.tolist()]
    # Ends in the middle of the fifth token and begins in the middle of the fourth.
    stop = pieces[3][1:] + pieces[4][:2]
    cut = sample(llama, RAGGED[:1], max_tokens=12, stop=["no such text", stop])[0][0]
    assert cut.finish_reason is FinishReason.STOP_TEXT
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.tokens.tolist() == full.tokens.tolist()[:5]


def test_a_stop_text_that_never_comes_changes_nothing(llama: Loaded) -> None:
    assert sample(llama, RAGGED, stop=["no such text"]) == sample(llama, RAGGED)


def test_every_token_carries_the_weight_version(llama: Loaded) -> None:
    for group in sample(llama, RAGGED[:2], n=2):
        for completion in group:
            assert completion.versions.tolist() == [4] * len(completion.tokens)


def test_tokens_are_told_as_they_come(llama: Loaded) -> None:
    told: dict[tuple[int, int], list[int]] = {}
    finished = []

    def on_token(row: transformers_sampler.Row, text: str) -> None:
        told.setdefault((row.prompt, row.sample), []).append(row.tokens[-1])
        assert text == llama.tokenizer.decode(row.tokens[-1:], skip_special_tokens=True)
        if row.finish is not None:
            finished.append((row.prompt, row.sample))

    prompts = [EncodedPrompt(tokens, 3) for tokens in RAGGED]
    params = SamplingParams(max_tokens=9, stop_token_ids=STOPS)
    results = TransformersSampler(llama, SamplerConfig()).sample(prompts, 2, params, 0, on_token=on_token)
    assert told == {(p, i): each.tokens.tolist() for p, group in enumerate(results) for i, each in enumerate(group)}
    assert sorted(finished) == sorted(told)


def test_cancelling_ends_all_batches_at_the_next_token(llama: Loaded, forward_calls: Watch) -> None:
    prompts = [EncodedPrompt(tokens, 0) for tokens in RAGGED]
    with forward_calls(llama.model) as calls:
        results = TransformersSampler(llama, SamplerConfig(max_batch_rows=2)).sample(
            prompts, 1, SamplingParams(max_tokens=30), 0, cancelled=lambda: len(calls) >= 3
        )
    assert len(calls) == 3
    completions = [group[0] for group in results]
    assert {completion.finish_reason for completion in completions} == {FinishReason.ABORTED}
    assert sorted(len(completion.tokens) for completion in completions) == [0, 0, 0, 3, 3]


# What cannot be sampled.


def test_logits_that_are_not_numbers_are_an_error(model_dirs: dict[str, Path]) -> None:
    loaded = load(PolicyConfig(model=str(model_dirs["llama"]), device="cpu"))
    with torch.no_grad():
        next(loaded.model.parameters()).fill_(torch.nan)
    with pytest.raises(Corrupt, match="version 4"):
        sample(loaded, RAGGED[:1])


RECURRENT = {
    "mamba": {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2},
    "lfm2": {
        **{"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    },
}


@pytest.mark.parametrize("kind", sorted(RECURRENT))
def test_models_that_remember_more_than_keys_and_values_are_refused(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**RECURRENT[kind])).eval()
    with pytest.raises(BadInput, match=f"model: .*'{kind}'"):
        check_cache(model)


def test_attention_models_are_not_refused(loaded: Loaded) -> None:
    check_cache(loaded.model)
