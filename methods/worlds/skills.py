"""A world whose truth is known: hidden skills of queries, experts among candidates, answers that reveal the skill.

A query is eight digits; its skill is a random table's entry for two of them. Each skill has one expert among the
candidates, some have a second-best. An answer is a code word of (candidate, skill) with noise, the score one flip of
a coin. So answers tell skills apart at once, where scores alone need many queries (specification section 5.1).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from protocols.service import Message

DIGITS, CODES = "0123456789", "abcdefghijklmnop"
WORDS = [*DIGITS, *CODES]
EXPERT, SECOND, OTHERS = 0.9, 0.5, 0.15


class SkillsConfig(Message):
    """The world's size."""

    queries: int = Field(default=500, ge=1)
    """Training queries."""
    test_queries: int = Field(default=2000, ge=1)
    """Test queries, with true success rates for scores."""
    validation_queries: int = Field(default=0, ge=0)
    """Queries to select the best router by, with flips of a coin for scores; 0: the last router is taken."""
    digits: int = Field(default=8, ge=2)
    """Length of a query."""
    skills: int = Field(default=6, ge=2)
    """Number of skills."""
    candidates: int = Field(default=4, ge=2)
    """Size of the pool."""
    answer_tokens: int = Field(default=4, ge=1)
    """Length of an answer."""
    noise: float = Field(default=0.1, ge=0, le=1)
    """Share of an answer's tokens that is replaced at random."""
    shuffle_answers: bool = False
    """Control: each candidate's answers go to other queries, so that they tell nothing (section 5.2)."""


@dataclass(frozen=True)
class Exam:
    """B queries with what the pool made of them."""

    queries: list[str]
    answers: list[list[str]]
    """Of each query, one per candidate."""
    scores_BT: NDArray[np.float64]


class SkillsWorld:
    """Tables, experts and code words of one seed."""

    def __init__(self, config: SkillsConfig, seed: int) -> None:
        self.config = config
        rng = np.random.default_rng(seed)
        self.places = rng.choice(config.digits, size=2, replace=False)
        self.table = rng.integers(config.skills, size=(10, 10))
        self.success_ST = np.full((config.skills, config.candidates), OTHERS)
        for skill in range(config.skills):
            first, second = rng.permutation(config.candidates)[:2]
            self.success_ST[skill, first] = EXPERT
            if rng.random() < 0.5:
                self.success_ST[skill, second] = SECOND
        self.codes_TSM = rng.integers(len(CODES), size=(config.candidates, config.skills, config.answer_tokens))

    @property
    def candidates(self) -> list[str]:
        """Names of the pool."""
        return [f"model-{i}" for i in range(self.config.candidates)]

    def draw(self, rng: np.random.Generator, count: int, *, true_scores: bool = False) -> Exam:
        """Queries with answers, and one flip of a coin per candidate, or the success rates themselves."""
        config = self.config
        digits_BK = rng.integers(10, size=(count, config.digits))
        skill_B = self.table[digits_BK[:, self.places[0]], digits_BK[:, self.places[1]]]
        success_BT = self.success_ST[skill_B]
        codes_BTM = self.codes_TSM[:, skill_B].transpose(1, 0, 2)
        noisy = rng.random(codes_BTM.shape) < config.noise
        codes_BTM = np.where(noisy, rng.integers(len(CODES), size=codes_BTM.shape), codes_BTM)
        flips_BT = (rng.random(success_BT.shape) < success_BT).astype(np.float64)
        if config.shuffle_answers:
            codes_BTM = np.stack([codes_BTM[rng.permutation(count), t] for t in range(config.candidates)], axis=1)
        return Exam(
            queries=[" ".join(map(str, row)) for row in digits_BK],
            answers=[[" ".join(CODES[c] for c in word) for word in row] for row in codes_BTM],
            scores_BT=success_BT if true_scores else flips_BT,
        )
