from collections.abc import Callable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actors.policy.microbatch import MicroBatch, by_pair, by_prompt
from actors.policy.ranks import shares

# A row is so many tokens of one of three prompts, and more of its own.
shapes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=20)
Shapes = list[tuple[int, int, int]]
Cut = Callable[[int], list[MicroBatch]]


def prompts_of(shapes: Shapes) -> Cut:
    rows = [np.r_[[kind] * prompt, [9] * rest].astype(np.int32) for kind, prompt, rest in shapes]
    return lambda budget: by_prompt(rows, [prompt for _, prompt, _ in shapes], budget)


def pairs_of(shapes: Shapes) -> Cut:
    """Two rows of each shape, of different lengths."""
    rows = [np.ones(size, np.int32) for _, prompt, rest in shapes for size in (prompt + rest, rest)]
    return lambda budget: by_pair(rows, [f"pair {i // 2}" for i in range(len(rows))], budget)


def rows_in(share: list[MicroBatch]) -> list[int]:
    return [i for group in share for i in group.rows]


@given(shapes, st.integers(1, 200), st.integers(1, 5))
def test_every_row_is_in_one_micro_batch_of_one_rank(shapes: Shapes, budget: int, world: int) -> None:
    for cut, count in ((prompts_of(shapes), len(shapes)), (pairs_of(shapes), 2 * len(shapes))):
        found = [i for share in shares(cut, budget, world) for i in rows_in(share)]
        assert sorted(found) == list(range(count))


@given(shapes, st.integers(1, 200), st.integers(1, 5))
def test_ranks_have_equally_many_micro_batches_and_the_first_one_has_most(
    shapes: Shapes, budget: int, world: int
) -> None:
    for cut in (prompts_of(shapes), pairs_of(shapes)):
        numbers = [len(rank) for rank in shares(cut, budget, world)]
        assert len(numbers) == world
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] - numbers[-1] <= 1
        assert numbers[-1] >= 1 or len(shapes) < world


@given(shapes, st.integers(1, 200))
def test_one_rank_has_what_the_budget_cuts(shapes: Shapes, budget: int) -> None:
    for cut in (prompts_of(shapes), pairs_of(shapes)):
        assert shares(cut, budget, 1) == [cut(budget)]


@given(shapes, st.integers(1, 200), st.integers(2, 5))
def test_a_pair_is_on_one_rank(shapes: Shapes, budget: int, world: int) -> None:
    for share in shares(pairs_of(shapes), budget, world):
        found = sorted(rows_in(share))
        assert [i + 1 for i in found[::2]] == found[1::2] and not any(i % 2 for i in found[::2])
