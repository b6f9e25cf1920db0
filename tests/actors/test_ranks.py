import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actors.policy.microbatch import by_prompt
from actors.policy.ranks import shares

# A row is so many tokens of one of three prompts, and more of its own.
shapes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=20)
Shapes = list[tuple[int, int, int]]


def rows_of(shapes: Shapes) -> tuple[list[np.ndarray], list[int]]:
    rows = [np.r_[[kind] * prompt, [9] * rest].astype(np.int32) for kind, prompt, rest in shapes]
    return rows, [prompt for _, prompt, _ in shapes]


@given(shapes, st.integers(1, 200), st.integers(1, 5))
def test_every_row_is_in_one_micro_batch_of_one_rank(shapes: Shapes, budget: int, world: int) -> None:
    rows, prompts = rows_of(shapes)
    cut = shares(rows, prompts, budget, world)
    assert sorted(i for rank in cut for group in rank for i in group.rows) == list(range(len(rows)))


@given(shapes, st.integers(1, 200), st.integers(1, 5))
def test_ranks_have_equally_many_micro_batches_and_the_first_one_has_most(
    shapes: Shapes, budget: int, world: int
) -> None:
    numbers = [len(rank) for rank in shares(*rows_of(shapes), budget, world)]
    assert len(numbers) == world
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] - numbers[-1] <= 1
    assert numbers[-1] >= 1 or len(shapes) < world


@given(shapes, st.integers(1, 200))
def test_one_rank_has_what_the_budget_cuts(shapes: Shapes, budget: int) -> None:
    rows, prompts = rows_of(shapes)
    assert shares(rows, prompts, budget, 1) == [by_prompt(rows, prompts, budget)]
