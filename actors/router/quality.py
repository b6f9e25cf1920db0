"""How good routes are where the scores of all candidates are known (specification section 1)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actors.router.targets import targets_of
from protocols.router import Reliability, RouteQuality, RouteRow

RESAMPLES = 1000
BINS = 10

Scores = NDArray[np.float64]


def normalised(router: float, random: float, oracle: float) -> float:
    """mu_n = 100 (router - random) / (oracle - random); NaN if the oracle wins nothing."""
    return 100 * (router - random) / (oracle - random) if oracle > random else float("nan")


def qualities(
    rows: Sequence[RouteRow], choices: Sequence[int | None], prices_T: Scores, seed: int
) -> tuple[list[RouteQuality], RouteQuality]:
    """Quality per group, by name, and the mean over groups, with bootstrap intervals over queries."""
    scores_BT = np.array([row.scores for row in rows])
    got_B = np.array([s.mean() if c is None else s[c] for s, c in zip(scores_BT, choices, strict=True)])
    groups, draws, rng = [], [], np.random.default_rng(seed)
    for name in sorted({row.group for row in rows}):
        own = np.array([row.group == name for row in rows])
        picked = [choice for choice, there in zip(choices, own, strict=True) if there]
        drawn = _resampled(got_B[own], scores_BT[own], rng)
        draws.append(drawn)
        groups.append(_quality(name, got_B[own], scores_BT[own], picked, prices_T, drawn))
    means = {
        name: float(np.mean([getattr(one, name) for one in groups]))
        for name in ("router", "random", "oracle", "price", "abstained")
    }
    # A group where nothing can be won says nothing.
    known = [one.normalised for one in groups if one.normalised == one.normalised]
    together = np.array([d for d, one in zip(draws, groups, strict=True) if one.normalised == one.normalised])
    low, high = _interval(together.mean(0)) if len(together) else (float("nan"),) * 2
    mean = RouteQuality(
        group="",
        queries=len(rows),
        normalised=float(np.mean(known)) if known else float("nan"),
        low=low,
        high=high,
        shares=np.mean([one.shares for one in groups], axis=0).tolist(),
        **means,
    )
    return groups, mean


def _quality(
    name: str, got_B: Scores, scores_BT: Scores, choices: Sequence[int | None], prices_T: Scores, drawn: Scores
) -> RouteQuality:
    router, random, oracle = got_B.mean(), scores_BT.mean(), scores_BT.max(1).mean()
    low, high = _interval(drawn)
    chosen = [choice for choice in choices if choice is not None]
    return RouteQuality(
        group=name,
        queries=len(got_B),
        router=router,
        random=random,
        oracle=oracle,
        normalised=normalised(router, random, oracle),
        low=low,
        high=high,
        price=float(prices_T[chosen].mean()) if chosen else 0.0,
        abstained=1 - len(chosen) / len(choices),
        shares=(np.bincount(chosen, minlength=scores_BT.shape[1]) / len(choices)).tolist(),
    )


def _resampled(got_B: Scores, scores_BT: Scores, rng: np.random.Generator) -> Scores:
    """mu_n of resampled queries, float64[R]."""
    drawn_RB = rng.integers(len(got_B), size=(RESAMPLES, len(got_B)))
    routers_R, randoms_R, oracles_R = (
        values_B[drawn_RB].mean(1) for values_B in (got_B, scores_BT.mean(1), scores_BT.max(1))
    )
    spans_R = oracles_R - randoms_R
    return np.where(spans_R > 0, 100 * (routers_R - randoms_R) / np.where(spans_R > 0, spans_R, 1), np.nan)


def _interval(draws_R: Scores) -> tuple[float, float]:
    if np.isnan(draws_R).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(draws_R, (0.025, 0.975))
    return float(low), float(high)


def reliability(scores_BT: Scores, truth_BT: Scores, target: float) -> tuple[list[Reliability], float]:
    """Scores in ten bins against the share of right candidates there, and the expected calibration error."""
    right_BT = targets_of(truth_BT, target)
    place_BT = np.clip((scores_BT * BINS).astype(int), 0, BINS - 1)
    found, error = [], 0.0
    for k in range(BINS):
        own = place_BT == k
        if not own.any():
            continue
        score, right = float(scores_BT[own].mean()), float(right_BT[own].mean())
        found.append(Reliability(low=k / BINS, high=(k + 1) / BINS, count=int(own.sum()), score=score, right=right))
        error += own.mean() * abs(score - right)
    return found, float(error)
