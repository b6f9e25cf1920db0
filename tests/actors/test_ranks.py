from hypothesis import given
from hypothesis import strategies as st

from actors.policy.microbatch import by_length
from actors.policy.ranks import shares

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(lengths, st.integers(1, 200), st.integers(1, 5))
def test_every_row_is_in_one_micro_batch_of_one_rank(lengths: list[int], budget: int, world: int) -> None:
    cut = shares(lengths, budget, world)
    assert sorted(i for rank in cut for group in rank for i in group) == list(range(len(lengths)))
    for group in (group for rank in cut for group in rank):
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= budget


@given(lengths, st.integers(1, 200), st.integers(1, 5))
def test_ranks_have_equally_many_micro_batches_and_the_first_one_has_most(
    lengths: list[int], budget: int, world: int
) -> None:
    numbers = [len(rank) for rank in shares(lengths, budget, world)]
    assert len(numbers) == world
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] - numbers[-1] <= 1
    assert numbers[-1] >= 1 or len(lengths) < world


@given(lengths, st.integers(1, 200))
def test_one_rank_has_what_the_budget_cuts(lengths: list[int], budget: int) -> None:
    assert shares(lengths, budget, 1) == [by_length(lengths, budget)]
