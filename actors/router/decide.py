"""From scores to a choice, with prices, floors, absences, and the option to abstain."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protocols.errors import BadInput
from protocols.router import Candidate, RouteOptions


def choose(scores_T: NDArray[np.float64], pool: Sequence[Candidate], options: RouteOptions) -> int | None:
    """Place of the candidate that should answer, or None to abstain. Raises BadInput if all are excluded."""
    left = eligible(pool, options)
    if scores_T[left].max() < options.abstain_below:
        return None
    prices_T = prices_of(pool, options)
    if options.quality_floor is not None:
        good = [i for i in left if scores_T[i] >= options.quality_floor]
        if good:
            return cheapest(good, scores_T, prices_T)
    if options.within:
        # Sums of floats: a score that is exactly so far below counts.
        near = [i for i in left if scores_T[i] >= scores_T[left].max() - options.within - 1e-12]
        return cheapest(near, scores_T, prices_T)
    worth_T = scores_T - options.price_weight * prices_T
    return max(left, key=lambda i: (worth_T[i], -i))


def cheapest(places: Sequence[int], scores_T: NDArray[np.float64], prices_T: NDArray[np.float64]) -> int:
    """The cheapest of some candidates; of equal prices the one with the best score, then the first."""
    return min(places, key=lambda i: (prices_T[i], -scores_T[i], i))


def eligible(pool: Sequence[Candidate], options: RouteOptions) -> list[int]:
    """Places of the candidates that may be chosen. Raises BadInput for names that are not in the pool."""
    names = [one.name for one in pool]
    for field, given in (("exclude", options.exclude), ("prices", list(options.prices))):
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise BadInput(f"options.{field}: got {unknown[0]!r}, expected one of {', '.join(names)}")
    left = [i for i, name in enumerate(names) if name not in options.exclude]
    if not left:
        raise BadInput("options.exclude: expected at least one candidate to be left")
    return left


def prices_of(pool: Sequence[Candidate], options: RouteOptions) -> NDArray[np.float64]:
    """The price of each candidate, float64[T]."""
    return np.array([options.prices.get(one.name, one.price) for one in pool])
