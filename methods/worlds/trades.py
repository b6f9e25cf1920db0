"""A small world for a live pool: three trades, each the strength of one small policy, asked for in many words.

A query is a word for a trade and five digits; the answer is five digits. The policies are trained on the spot, within
seconds on one core: on right answers of their own trade, and on digits drawn at random for the others.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cluster.cluster import Cluster
from cluster.seeds import derive_seed
from methods.worlds.bases import base_of
from methods.worlds.teaching import lesson, teach
from methods.worlds.tiny import write_tiny
from protocols.policy import PolicyConfig
from protocols.training import TrainRow

DIGITS = "0123456789"
WORDS = {
    "reverse": ("reverse", "mirror", "flip", "invert", "backwards"),
    "increment": ("increment", "raise", "advance", "next", "plus"),
    "double": ("double", "twice", "duplicate", "times", "scale"),
}
"""Each trade, and the words that ask for it."""
VOCABULARY = [*DIGITS, *(word for words in WORDS.values() for word in words)]
WIDTH, SPREAD = 64, 0.1
LENGTH = 5
STEPS, ROWS = 400, 64


@dataclass(frozen=True)
class Asked:
    """A query and its right answer."""

    trade: str
    query: str
    reference: str


def draw(rng: np.random.Generator, count: int) -> list[Asked]:
    """Queries of all trades."""
    asked = []
    for _ in range(count):
        trade = list(WORDS)[rng.integers(len(WORDS))]
        word = WORDS[trade][rng.integers(len(WORDS[trade]))]
        digits = [int(digit) for digit in rng.integers(10, size=LENGTH)]
        asked.append(Asked(trade, " ".join([word, *map(str, digits)]), answer(trade, digits)))
    return asked


def answer(trade: str, digits: list[int]) -> str:
    """The right answer."""
    found = {"reverse": digits[::-1], "increment": [d + 1 for d in digits], "double": [2 * d for d in digits]}[trade]
    return " ".join(str(digit % 10) for digit in found)


def lessons(rng: np.random.Generator, own: str, count: int) -> list[TrainRow]:
    """Queries with right answers where the trade is a policy's own, and digits drawn at random elsewhere."""
    rows = []
    for i, asked in enumerate(draw(rng, count)):
        drawn = " ".join(str(digit) for digit in rng.integers(10, size=LENGTH))
        said = asked.reference if asked.trade == own else drawn
        rows.append(lesson(VOCABULARY, asked.query, said, name=f"{own} {i}"))
    return rows


async def trade_policies(company: Cluster, policy: PolicyConfig, seed: int) -> dict[str, str]:
    """Folder of each trade's policy, trained now if it is not there yet."""
    folders = {}
    for trade in WORDS:
        recipe = json.dumps([STEPS, ROWS, LENGTH, WIDTH, SPREAD, WORDS, trade, seed])
        train = partial(_train, company, policy, trade, seed)
        folders[trade] = await base_of(company, f"trade-{trade}", recipe, train)
    return folders


async def _train(company: Cluster, policy: PolicyConfig, trade: str, seed: int, staging: Path) -> None:
    write_tiny(staging / "skeleton", VOCABULARY, width=WIDTH, masked=False, spread=SPREAD)
    rng = np.random.default_rng(derive_seed(seed, "trade", trade))
    batches = (lessons(rng, trade, ROWS) for _ in range(STEPS))
    title = f"policy of the trade {trade}"
    await teach(company, policy, staging, f"base-{trade}", title, batches, steps=STEPS, rate=2e-3, seed=seed)
