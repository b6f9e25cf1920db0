"""A world whose truth is known, the sorting desk: six digits are to be written in ascending order.

Annotated prompts come with four answers, the right one damaged 0, 1, 2 and 4 times, so that their order is known
(SEFT specification, section 5.1). A policy that learns from all four answers writes as badly as they are on average;
how much better it gets, and how good a reviser's labels and texts are, is counted.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import Field

from cluster.cluster import Cluster
from cluster.seeds import derive_seed
from methods.chat_data import Candidate, Judged
from methods.worlds.bases import base_of
from methods.worlds.teaching import lesson, teach
from methods.worlds.tiny import write_tiny
from protocols.messages import ChatMessage
from protocols.policy import PolicyConfig
from protocols.service import Message

DIGITS = "0123456789"
ANSWER, REVISE = "[ANSWER]", "[REVISE]"
"""What stands between the parts of a reviser's question (presets/seft-sorting.yaml)."""
VOCABULARY = [*DIGITS, "[no]", "[minor]", "[major]", ANSWER, REVISE]
LENGTH = 6
DAMAGES = (0, 1, 2, 4)
SWAPS = 0.6
WIDTH, LAYERS, SPREAD = 64, 3, 0.1
STEPS, ROWS, LEARNING_RATE = 500, 64, 2e-3


class SortingConfig(Message):
    """The world's size."""

    annotated: int = Field(default=120, ge=4)
    """Prompts with four answers of known order."""
    prompts: int = Field(default=6000, ge=1)
    """Prompts without answers."""
    dev_prompts: int = Field(default=200, ge=1)
    """Prompts to tell the best round by, of known truth."""
    test_prompts: int = Field(default=1000, ge=1)
    """Prompts for the test."""


def draw(rng: np.random.Generator, count: int) -> list[str]:
    """Prompts, all different; more of them begin with the same ones."""
    numbers = rng.permutation(10**LENGTH)[:count]
    return [" ".join(f"{number:0{LENGTH}d}") for number in numbers]


def answer(prompt: str) -> str:
    """The right answer."""
    return " ".join(sorted(prompt.split()))


def quality(prompt: str, reply: str) -> float:
    """Share of the right answer's places at which the reply has the same."""
    right, found = answer(prompt).split(), reply.split()
    return sum(a == b for a, b in zip(right, found, strict=False)) / max(len(right), len(found))


def damage(rng: np.random.Generator, reply: str, times: int) -> str:
    """Swap two places, or write any digit at one, so many times."""
    digits = reply.split()
    for _ in range(times):
        if rng.random() < SWAPS:
            one, other = rng.choice(len(digits), size=2, replace=False)
            digits[one], digits[other] = digits[other], digits[one]
        else:
            digits[rng.integers(len(digits))] = DIGITS[rng.integers(len(DIGITS))]
    return " ".join(digits)


def annotated(rng: np.random.Generator, prompts: Sequence[str]) -> list[Judged]:
    """Prompts with four answers, their quality as the score."""
    items = []
    for prompt in prompts:
        replies = [damage(rng, answer(prompt), times) for times in DAMAGES]
        scored = [Candidate(text=reply, score=quality(prompt, reply)) for reply in replies]
        items.append(Judged(id=prompt, messages=[ChatMessage(role="user", content=prompt)], replies=scored))
    return items


async def sorting_base(company: Cluster, policy: PolicyConfig, items: Sequence[Judged], seed: int) -> str:
    """Folder of the policy that has learnt from all answers, good and bad, trained now if it is not there yet."""
    told = [item.model_dump(mode="json") for item in items]
    recipe = json.dumps([STEPS, ROWS, LEARNING_RATE, WIDTH, LAYERS, SPREAD, VOCABULARY, told, seed])
    return await base_of(company, "sorting", recipe, partial(_train, company, policy, items, seed))


async def _train(company: Cluster, policy: PolicyConfig, items: Sequence[Judged], seed: int, staging: Path) -> None:
    write_tiny(staging / "skeleton", VOCABULARY, width=WIDTH, masked=False, spread=SPREAD, layers=LAYERS)
    lessons = [(item.id, reply.text) for item in items for reply in item.replies]
    rng = np.random.default_rng(derive_seed(seed, "sorting"))
    batches = (
        [lesson(VOCABULARY, *lessons[i], name=f"{i}") for i in rng.integers(len(lessons), size=ROWS)]
        for _ in range(STEPS)
    )
    title = "policy that learns all answers"
    await teach(company, policy, staging, "base", title, batches, steps=STEPS, rate=LEARNING_RATE, seed=seed)
