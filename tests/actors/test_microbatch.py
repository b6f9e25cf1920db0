from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.policy.microbatch import MicroBatch, attention_inputs, by_length, by_prompt, pad_left, pad_right

LENGTHS = st.lists(st.integers(0, 50), max_size=30)
ROWS = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=6)


@given(LENGTHS, st.integers(1, 200))
def test_groups_are_a_partition_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = by_length(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget


@given(LENGTHS, st.integers(1, 200))
def test_groups_run_from_long_to_short_and_keep_the_order_of_equals(lengths: list[int], budget: int) -> None:
    order = [i for group in by_length(lengths, budget) for i in group]
    assert all((-lengths[a], a) < (-lengths[b], b) for a, b in pairwise(order))


@given(LENGTHS, st.integers(1, 200))
def test_no_group_could_take_the_first_of_the_next(lengths: list[int], budget: int) -> None:
    assert all(lengths[a[0]] * (len(a) + 1) > budget for a, _ in pairwise(by_length(lengths, budget)))


def test_a_row_over_the_budget_goes_alone() -> None:
    assert by_length([3, 90, 4], budget=8) == [[1], [2, 0]]
    assert by_length([], budget=8) == []


# A row is so many tokens of one of two prompts, and more of its own.
SHAPES = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0, 1, 7, 30]), st.integers(1, 20)), max_size=20)


@given(SHAPES, st.integers(1, 200))
def test_micro_batches_of_a_prompt_share_it_and_save_half(shapes: list[tuple[int, int, int]], budget: int) -> None:
    rows = [np.r_[[kind] * prompt, [9] * rest].astype(np.int32) for kind, prompt, rest in shapes]
    groups = by_prompt(rows, [prompt for _, prompt, _ in shapes], budget)
    assert sorted(i for group in groups for i in group.rows) == list(range(len(rows)))
    for group in groups:
        lengths = [len(rows[i]) for i in group.rows]
        if group.shared:
            assert {rows[i][: group.shared].tobytes() for i in group.rows} == {
                rows[group.rows[0]][: group.shared].tobytes()
            }
            assert {shapes[i][1] for i in group.rows} == {group.shared}
            computed = sum(lengths) - group.shared * (len(lengths) - 1)
            assert computed <= budget and computed <= sum(lengths) / 2
        else:
            assert len(lengths) == 1 or len(lengths) * max(lengths) <= budget


def test_micro_batches_by_prompt() -> None:
    first, second = [1] * 10, [2] * 10
    rows = [
        np.asarray(row, np.int32) for row in ([*first, 5], [*second, 5], [*first, 6, 6], [3], [*second, 7], first)
    ]
    share = [10, 10, 10, 0, 10, 10]
    assert by_prompt(rows, share, 100) == [MicroBatch([0, 2, 5], 10), MicroBatch([1, 4, 3])]
    assert by_prompt(rows, share, 12) == [*map(MicroBatch, ([2], [0], [1], [4], [5], [3]))]
    assert by_prompt(rows[:3], share[:3], 13) == [*map(MicroBatch, ([2], [0], [1]))]
    assert by_prompt([], [], 8) == []


@given(ROWS)
def test_padding_keeps_rows_and_fills_the_rest(rows: list[list[int]]) -> None:
    arrays = [np.asarray(row, np.int32) for row in rows]
    width = max(map(len, rows))
    for stacked, filled_up in ((pad_right(arrays), slice(None)), (pad_left(arrays), slice(None, None, -1))):
        assert stacked.shape == (len(rows), width) and stacked.dtype == np.int32
        for row, padded in zip(rows, stacked, strict=True):
            assert padded[filled_up].tolist() == row[filled_up] + [0] * (width - len(row))


def test_padding_keeps_the_dtype_and_takes_any_fill() -> None:
    rows = [np.ones(1, np.float32), np.ones(3, np.float32)]
    assert np.isnan(pad_right(rows, np.nan)[0, 1:]).all()
    assert pad_left(rows, -1).tolist() == [[-1, -1, 1], [1, 1, 1]]
    assert pad_left(rows).dtype == np.float32


@pytest.mark.parametrize(("lengths", "mask"), [([3, 3], None), ([1, 3], [[1, 0, 0], [1, 1, 1]])])
def test_a_mask_only_where_rows_are_padded(lengths: list[int], mask: list[list[int]] | None) -> None:
    inputs = attention_inputs(lengths, torch.device("cpu"))
    assert {name: values.tolist() for name, values in inputs.items()} == ({"attention_mask": mask} if mask else {})
