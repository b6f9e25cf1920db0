"""From what was answered about a patient's snippets to one score and one decision (specification 2.6, our design)."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from protocols.service import Message

Reducer = Literal["max", "count", "mean", "noisy_or", "log_odds", "recency", "llm"]
Decision = Literal["yes", "no", "uncertain", "no_evidence", "failed"]
LEAST = 1e-6
"""Probabilities are kept this far from 0 and 1 before their odds are taken."""


class ReduceConfig(Message):
    """How a patient's snippets become a decision."""

    by: Reducer = "max"
    """`max`: the highest score of a snippet. `count`: 1 where at least `count` snippets reach `threshold`. `mean`.
    `noisy_or`: 1 - prod(1 - lambda p). `log_odds`: sigmoid(logit(prior) + eta sum(logit(p) - logit(prior))).
    `recency`: the highest of the last `recent` dated ones. `llm`: the policy reads the verdicts, oldest first, and
    answers once."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """From this score on the decision is yes; of `count` and `llm`, a snippet's or the policy's."""
    band: tuple[float, float] | None = None
    """Scores within it, ends included, are uncertain; null: none is."""
    count: int = Field(default=2, ge=1)
    """Of count: k."""
    strength: float = Field(default=0.8, gt=0, le=1)
    """Of noisy_or: lambda."""
    prior: float = Field(default=0.1, gt=0, lt=1)
    """Of log_odds: pi, the share of patients who have the disease."""
    eta: float = Field(default=0.5, gt=0)
    """Of log_odds: how much each snippet counts; less than 1, for snippets of one patient repeat each other."""
    recent: int = Field(default=3, ge=1)
    """Of recency: m."""

    @field_validator("band")
    @classmethod
    def _in_order(cls, given: tuple[float, float] | None) -> tuple[float, float] | None:
        if given is not None and not 0 <= given[0] <= given[1] <= 1:
            raise ValueError("expected 0 <= low <= high <= 1")
        return given


def patient_score(scores: Sequence[float], config: ReduceConfig, dates: Sequence[str] = ()) -> float:
    """One patient's score in [0, 1] from those of the snippets; 0 where there are none.

    `dates`: of each snippet, sortable, empty where unknown; only recency reads them. Not for `llm`, which asks.
    """
    if not scores:
        return 0.0
    match config.by:
        case "max":
            return max(scores)
        case "count":
            return float(sum(p >= config.threshold for p in scores) >= config.count)
        case "mean":
            return math.fsum(scores) / len(scores)
        case "noisy_or":
            return 1.0 - math.prod(sorted(1.0 - config.strength * p for p in scores))
        case "log_odds":
            return log_odds(scores, config.prior, config.eta)
        case "recency":
            return max(last(scores, dates, config.recent))
    raise ValueError(f"{config.by} is not a formula")


def log_odds(scores: Sequence[float], prior: float, eta: float) -> float:
    """sigmoid(logit(prior) + eta * sum(logit(p) - logit(prior)))."""
    base = logit(prior)
    total = base + eta * math.fsum(logit(p) - base for p in scores)
    return 1.0 / (1.0 + math.exp(-total)) if total >= 0 else math.exp(total) / (1.0 + math.exp(total))


def logit(p: float) -> float:
    """log(p / (1 - p)), of p kept within [LEAST, 1 - LEAST]."""
    kept = min(max(p, LEAST), 1.0 - LEAST)
    return math.log(kept / (1.0 - kept))


def last(scores: Sequence[float], dates: Sequence[str], count: int) -> list[float]:
    """The scores of the latest `count` dates, of equal dates all; undated ones only if none has a date."""
    dated = sorted({date for date in dates if date}, reverse=True)
    if not dated:
        return list(scores)
    places = sorted((date for date in dates if date), reverse=True)
    earliest = places[min(count, len(places)) - 1]
    return [score for score, date in zip(scores, dates, strict=True) if date and date >= earliest]


def decide(score: float, groups: int, config: ReduceConfig) -> Decision:
    """What the score of a patient with so many snippets means."""
    if not groups:
        return "no_evidence"
    if config.band is not None and config.band[0] <= score <= config.band[1]:
        return "uncertain"
    return "yes" if score >= config.threshold else "no"
