from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.policy.microbatch import attention_inputs, by_length, pad_left, pad_right

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
