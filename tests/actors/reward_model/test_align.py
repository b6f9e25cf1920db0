import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.reward_model.align import Spans, sums_over, values_at


def spans_of(*words: str) -> list[tuple[int, int]]:
    ends = np.cumsum([len(word) for word in words]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """A text of that length in tokens, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    ends = [*places, length]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def test_values_of_worked_cuts() -> None:
    policy = spans_of("12", "34", "5", "67", "")
    reward = spans_of("1", "23", "4567", "")
    values = np.array([10.0, 20, 30, 40])
    # "1" ends in "12", "23" in "34", none in "5", which "4567" covers; that ends in "67", and the end is the end.
    np.testing.assert_array_equal(values_at(policy, reward, values), [10, 20, 30, 30, 40])


def test_the_last_of_several_ends_counts() -> None:
    np.testing.assert_array_equal(
        values_at(spans_of("abc", "d"), spans_of("a", "b", "c", "d"), np.arange(4.0)), [2, 3]
    )


def test_sums_of_worked_cuts() -> None:
    policy = spans_of("12", "34", "5", "67", "")
    reward = spans_of("1", "23", "4567", "")
    np.testing.assert_allclose(sums_over(policy, reward, np.array([1.0, 2, 4, 8])), [2, 2, 1, 2, 8])


def test_an_end_token_that_the_other_tokenizer_has_not() -> None:
    np.testing.assert_allclose(sums_over(spans_of("ab"), spans_of("a", "b", ""), np.array([1.0, 2, 4])), [7])
    np.testing.assert_allclose(values_at(spans_of("ab", ""), spans_of("a", "b"), np.array([1.0, 2])), [2, 2])


@given(st.integers(1, 12).flatmap(lambda length: st.tuples(cuts(length), cuts(length))))
def test_sums_are_kept(both: tuple[Spans, Spans]) -> None:
    spans, scored = both
    scores = np.random.default_rng(len(scored)).normal(size=len(scored))
    assert sums_over(spans, scored, scores).sum() == pytest.approx(scores.sum())


@given(st.integers(1, 12).flatmap(cuts))
def test_the_same_tokens_keep_their_scores(spans: Spans) -> None:
    scores = np.arange(len(spans), dtype=float)
    values = values_at(spans, spans, scores)
    # Of several empty tokens at one place the last is taken: nothing tells them apart.
    distinct = [i for i, (start, end) in enumerate(spans) if start < end or end not in {e for _, e in spans[i + 1 :]}]
    np.testing.assert_array_equal(values[distinct], scores[distinct])


@given(st.integers(1, 12).flatmap(lambda length: st.tuples(cuts(length), cuts(length))))
def test_a_value_never_comes_from_before_the_token_begins(both: tuple[Spans, Spans]) -> None:
    spans, scored = both
    chosen = values_at(spans, scored, np.arange(len(scored), dtype=float)).astype(int)
    for (start, end), j in zip(spans, chosen, strict=True):
        assert scored[j][1] > start or scored[j][1] == end
    of_text = [j for (start, end), j in zip(spans, chosen, strict=True) if start < end]
    assert of_text == sorted(of_text)


def test_nothing_to_take_from_or_to_give_to() -> None:
    with pytest.raises(ValueError, match="at least one scored token"):
        values_at([(0, 1)], [], np.zeros(0))
    with pytest.raises(ValueError, match="at least one token"):
        sums_over([], [(0, 1)], np.zeros(1))
    assert values_at([], [(0, 1)], np.zeros(1)).shape == (0,)
