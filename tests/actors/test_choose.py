import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from actors.policy import choose
from actors.policy.choose import Uniforms, _invert, next_tokens
from protocols.messages import SamplingParams

GRID = 20_000
LARGEST = math.nextafter(1.0, 0.0)
WEIGHTS = arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1)).filter(lambda w: w.sum() > 0)
SHARES = st.floats(0, LARGEST)
# Far enough apart to differ after a softmax in float32.
LOGITS = arrays(np.float32, 9, elements=st.integers(-24, 24).map(lambda i: i / 4), unique=True)
SOME_LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.9, -3.0, 0.0, 1.0, -0.2, 0.4, -1.7])


def even_shares(count: int) -> torch.Tensor:
    """Numbers that fill [0, 1) evenly: drawing with them gives frequencies without chance."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def frequencies(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    tokens, _ = next_tokens(logits.expand(GRID, -1), even_shares(GRID), params)
    return torch.bincount(tokens, minlength=len(logits)).double() / GRID


def truncated(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The exact distribution, by a loop over tokens from the most likely down."""
    probs = torch.softmax(logits.double() / temperature, -1)
    best = probs.argsort(descending=True).tolist()[: top_k or None]
    mass = float(probs[best].sum()) if top_k else 1.0
    kept, reached = [], 0.0
    for token in best:
        if reached < top_p:
            kept.append(token)
            reached += float(probs[token]) / mass
    result = torch.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


@given(WEIGHTS, SHARES)
@example(np.array([0.1] * 10), LARGEST)
@example(np.array([0.0, 0.3, 0.0]), 0.0)
@example(np.array([0.0, 0.3, 0.0]), LARGEST)
@example(np.array([1.0, 5e-324]), LARGEST)
def test_inversion_finds_the_entry_that_holds_the_share(weights: np.ndarray, share: float) -> None:
    index = int(_invert(torch.from_numpy(weights)[None], torch.tensor([share], dtype=torch.float64)))
    cumulative = weights.cumsum()
    wanted = int(np.searchsorted(cumulative, share * cumulative[-1], side="right"))
    assert index == min(wanted, int(np.flatnonzero(np.diff(cumulative, prepend=0.0)).max()))
    assert weights[index] > 0


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1, 0, 1),
        (0.7, 0, 1),
        (1.5, 4, 1),
        (1, 0, 0.8),
        (0.7, 0, 0.95),
        (1, 5, 0.6),
        (2, 3, 0.99),
        (1, 50, 1),
        (1, 1, 1),
    ],
)
def test_tokens_come_with_their_exact_frequency(temperature: float, top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = truncated(SOME_LOGITS, temperature, top_k, top_p)
    assert frequencies(SOME_LOGITS, params).tolist() == pytest.approx(expected.tolist(), abs=1.01 / GRID)


@given(LOGITS, SHARES, st.integers(0, 9), st.floats(0.01, 1))
def test_no_token_outside_of_the_truncated_set(logits: np.ndarray, share: float, top_k: int, top_p: float) -> None:
    params = SamplingParams(top_k=top_k, top_p=top_p)
    tokens, _ = next_tokens(torch.from_numpy(logits)[None], torch.tensor([share], dtype=torch.float64), params)
    # One more token may be in where rounding decides whether top_p is reached.
    assert truncated(torch.from_numpy(logits), 1.0, top_k, min(1.0, top_p + 1e-6))[tokens] > 0


def test_logprobs_are_those_of_the_whole_distribution() -> None:
    logits = SOME_LOGITS.expand(7, -1)
    for params in (SamplingParams(temperature=0.7), SamplingParams(temperature=0.7, top_k=3, top_p=0.9)):
        tokens, logprobs = next_tokens(logits, even_shares(7), params)
        expected = torch.log_softmax(SOME_LOGITS / 0.7, -1)[tokens]
        assert logprobs.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_temperature_zero_takes_the_best_token() -> None:
    logits = torch.stack([SOME_LOGITS, SOME_LOGITS.flip(0)])
    tokens, logprobs = next_tokens(logits, torch.tensor([LARGEST, 0.1]), SamplingParams(temperature=0, top_p=0.5))
    assert tokens.tolist() == [0, 9]
    assert logprobs.tolist() == pytest.approx([torch.log_softmax(SOME_LOGITS, -1)[0].item()] * 2)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_sorting_fewer_tokens_first_changes_nothing(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, 64)[:, None]
    params = SamplingParams(top_p=top_p)
    whole = next_tokens(logits, even_shares(64), params)[0]
    monkeypatch.setattr(choose, "SORTED_FIRST", 4)
    assert next_tokens(logits, even_shares(64), params)[0].tolist() == whole.tolist()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_rows_do_not_touch_each_other(top_p: float) -> None:
    logits = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
    shares, params = even_shares(16), SamplingParams(top_p=top_p)
    together = next_tokens(logits, shares, params)[0].tolist()
    alone = [next_tokens(logits[i : i + 1], shares[i : i + 1], params)[0].item() for i in range(16)]
    assert together == alone


def test_logits_that_are_not_numbers_give_a_valid_token_and_no_logprob() -> None:
    for params in (
        SamplingParams(),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=2),
        SamplingParams(temperature=0),
    ):
        tokens, logprobs = next_tokens(torch.full((1, 5), math.nan), torch.tensor([0.5]), params)
        assert 0 <= int(tokens) < 5 and logprobs.isnan().all()


def drawn(seeds: list[tuple[int, int]], count: int) -> np.ndarray:
    uniforms = Uniforms(seeds)
    return np.stack([uniforms.next().copy() for _ in range(count)], axis=1)


def test_a_stream_depends_on_seed_and_index_alone() -> None:
    seeds = [(7, 0), (7, 1), (-1, 0), (2**64 - 2, 3)]
    together = drawn(seeds, 150)
    assert len({row.tobytes() for row in together}) == 4
    for seed, row in zip(seeds, together, strict=True):
        assert drawn([seed], 150)[0].tolist() == row.tolist()


@given(st.integers(1, 140), st.lists(st.booleans(), min_size=5, max_size=5))
def test_dropping_rows_leaves_the_streams_of_the_others(when: int, keep: list[bool]) -> None:
    seeds = [(3, i) for i in range(5)]
    whole, rows = drawn(seeds, 150), np.flatnonzero(keep)
    uniforms = Uniforms(seeds)
    for _ in range(when):
        uniforms.next()
    if not rows.size:
        return
    uniforms.select(rows)
    assert [uniforms.next().tolist() for _ in range(when, 150)] == whole[rows, when:].T.tolist()


def test_streams_fill_the_unit_interval_evenly() -> None:
    values = drawn([(11, i) for i in range(50)], 200).ravel()
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    # 19 degrees of freedom; beyond 50 once in ten thousand seeds.
    assert ((counts - 500) ** 2 / 500).sum() < 50
    assert values.min() >= 0 and values.max() < 1
