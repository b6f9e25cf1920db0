from hypothesis import example, given
from hypothesis import strategies as st

from cluster.seeds import derive_seed

SEEDS = st.integers(0, 2**63 - 1)
# A name with a slash would read like two names.
NAMES = st.lists(st.integers(0, 10**6) | st.text(st.characters(exclude_characters="/"), max_size=8), max_size=4)


@given(SEEDS, NAMES)
@example(0, ["\ud800"])  # A JSON escape can name half a character.
def test_a_seed_fits_every_generator_and_stays_the_same(root: int, names: list[int | str]) -> None:
    seed = derive_seed(root, *names)
    assert 0 <= seed < 2**63
    assert derive_seed(root, *names) == seed


@given(SEEDS, NAMES, SEEDS, NAMES)
def test_another_root_or_name_gives_another_seed(
    root: int, names: list[int | str], other_root: int, other_names: list[int | str]
) -> None:
    same = root == other_root and [str(name) for name in names] == [str(name) for name in other_names]
    assert (derive_seed(root, *names) == derive_seed(other_root, *other_names)) == same


def test_seeds_are_those_of_every_earlier_release() -> None:
    """A changed value would change every run that is continued."""
    assert derive_seed(0) == 3456079177858693020
    assert derive_seed(7, "step", 12, "batch") == 2671619130109668842
