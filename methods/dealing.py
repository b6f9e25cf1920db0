"""Rows dealt out to steps, epoch by epoch."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from cluster.seeds import derive_seed

Row = TypeVar("Row")


def dealt(items: Sequence[Row], turn: int, count: int, seed: int) -> list[Row]:
    """The items of a turn: `count` at a time, all of them once per epoch, in an order of its own."""
    chosen: list[Row] = []
    place = turn * count
    while len(chosen) < count:
        epoch, start = divmod(place + len(chosen), len(items))
        order = np.random.default_rng(derive_seed(seed, epoch)).permutation(len(items))
        chosen += [items[int(i)] for i in order[start : start + count - len(chosen)]]
    return chosen
