"""Loss terms over rows: what they need of them, what they are divided by, and what they come to."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from actors.policy import preferences
from actors.policy.loss_functions import TokenBatch, token_loss
from actors.policy.microbatch import pad_right
from protocols.errors import BadInput
from protocols.losses import (
    DPOLoss,
    GatedLoss,
    GRPOLoss,
    ImplicitOutcomeLoss,
    LikelihoodLoss,
    LossBase,
    LossSpec,
    ORPOLoss,
    OutcomeLoss,
    PolicyLoss,
    QFunctionLoss,
    ReinforceLoss,
    StepsLoss,
    ValueLoss,
)
from protocols.model import Head
from protocols.tensor import PerToken
from protocols.training import ForwardBackwardRequest, TrainRow

OverPairs = DPOLoss | ORPOLoss | QFunctionLoss | OutcomeLoss | GatedLoss
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Term:
    """What one term comes to over some rows: the sum of its items' losses, and sums of their metrics.

    Items are tokens, rows or pairs; `items` says how many the metrics are of.
    """

    total: torch.Tensor
    items: int
    metrics: dict[str, float]


def needs(spec: LossSpec) -> list[str]:
    """The arrays that rows of the term must have."""
    wanted = {
        "advantages": isinstance(spec, GRPOLoss | ReinforceLoss),
        "reference_logprobs": isinstance(spec, DPOLoss | ImplicitOutcomeLoss)
        or (isinstance(spec, GRPOLoss | ReinforceLoss) and spec.kl_coef > 0),
        "targets": isinstance(spec, StepsLoss | ValueLoss),
        "old_scores": isinstance(spec, ValueLoss) and spec.clip > 0,
    }
    return [name for name, needed in wanted.items() if needed]


def wants_entropy_gradient(spec: LossSpec) -> bool:
    """Whether the entropy is part of the loss."""
    return isinstance(spec, GRPOLoss | ReinforceLoss) and spec.entropy_coef > 0


def check_rows(request: ForwardBackwardRequest, head: Head) -> None:
    """Raise BadInput when a row lacks what one of its terms needs, or a count makes no sense."""
    for name, spec in request.losses.items():
        if isinstance(spec, LikelihoodLoss) != (head == "vocabulary"):
            raise BadInput(f"losses[{name!r}]: {spec.type} does not go with a model that has a {head} head")
    for row in request.rows:
        for name in row.terms:
            spec = request.losses[name]
            for array in needs(spec):
                if getattr(row, array) is None:
                    raise BadInput(f"row {row.row_id!r}: the term {name!r} ({spec.type}) needs {array}")
    for name, spec in request.losses.items():
        if isinstance(spec, OverPairs):
            _check_pairs(request.rows, name)
        elif isinstance(spec, ImplicitOutcomeLoss):
            _check_outcomes(request.rows, name)
    own = own_counts(request)
    for name, count in request.counts.items():
        if name not in own or not (0 < count < math.inf or count == own[name] == 0):
            raise BadInput(f"counts[{name!r}]: got {count}, expected a number above 0 for a term of losses")
    if not any(weights.array.any() for row in request.rows for weights in row.terms.values()):
        raise BadInput("rows: no token has a weight in any term, there is nothing to learn")


def _check_outcomes(rows: Sequence[TrainRow], term: str) -> None:
    """Each row of the term is right or wrong as a whole."""
    for row in rows:
        if term in row.terms and len(_signs(row, term)) > 1:
            raise BadInput(
                f"row {row.row_id!r}: the term {term!r} is over outcomes; expected weights that are 1 on a right"
                " reply or -1 on a wrong one"
            )


def _signs(row: TrainRow, term: str) -> set[float]:
    return set(np.sign(row.terms[term].array).tolist()) - {0.0}


def _check_pairs(rows: Sequence[TrainRow], term: str) -> None:
    """Each row of the term is the better or the worse one of its pair."""
    signs: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if term in row.terms:
            own = _signs(row, term)
            if not row.pair or len(own) != 1:
                raise BadInput(
                    f"row {row.row_id!r}: the term {term!r} compares pairs; expected `pair`, and weights that are 1"
                    " on the better reply or -1 on the worse"
                )
            signs[row.pair] += own
    for pair, found in signs.items():
        if sorted(found) != [-1.0, 1.0]:
            raise BadInput(
                f"pair {pair!r}: expected one better and one worse row of the term {term!r},"
                f" got {found.count(1.0)} and {found.count(-1.0)}"
            )


def prompt_length(row: TrainRow) -> int:
    """Tokens before the first one with weight in any term; 0 if none has."""
    with_weight = np.flatnonzero(np.any([weights.array != 0 for weights in row.terms.values()], axis=0))
    return int(with_weight[0]) if len(with_weight) else 0


def term_counts(request: ForwardBackwardRequest) -> dict[str, float]:
    """What each term is divided by."""
    return own_counts(request) | request.counts


def own_counts(request: ForwardBackwardRequest) -> dict[str, float]:
    """The items of each term in this request alone: tokens with weight, rows with any, or pairs."""
    counts: dict[str, float] = dict.fromkeys(request.losses, 0.0)
    for row in request.rows:
        for name, weights in row.terms.items():
            present, spec = int(np.count_nonzero(weights.array)), request.losses[name]
            if isinstance(spec, OverPairs):
                counts[name] += 0.5
            elif _by_token(spec):
                counts[name] += present
            else:
                counts[name] += min(present, 1)
    return counts


def _by_token(spec: LossBase) -> bool:
    """Whether the term is one mean over all tokens."""
    return isinstance(spec, ValueLoss) or (isinstance(spec, PolicyLoss) and spec.normalize == "token")


def evaluate(spec: LossSpec, batch: TokenBatch, weights_BK: torch.Tensor, rows: Sequence[TrainRow]) -> Term:
    """One term over rows of which all pairs are whole."""
    if isinstance(spec, OverPairs):
        return _over_pairs(spec, batch, weights_BK, rows)
    if isinstance(spec, ImplicitOutcomeLoss):
        return _over_rows(batch, weights_BK)
    per_token = token_loss(spec, batch)
    present_BK = weights_BK != 0
    sums = {name: _sum(values_BK[present_BK]) for name, values_BK in per_token.metrics.items()}
    return Term(_reduced(spec, per_token.loss_BT, weights_BK), int(present_BK.sum()), sums)


def _reduced(
    spec: PolicyLoss | StepsLoss | ValueLoss, loss_BK: torch.Tensor, weights_BK: torch.Tensor
) -> torch.Tensor:
    """Weighted sum over tokens; of terms by sequence, the sum over rows of each row's weighted mean."""
    weighted_BK = torch.where(weights_BK != 0, loss_BK * weights_BK, 0.0)
    if _by_token(spec):
        return weighted_BK.sum()
    return (weighted_BK.sum(-1) / (weights_BK != 0).sum(-1).clamp(min=1)).sum()


def _over_pairs(spec: OverPairs, batch: TokenBatch, weights_BK: torch.Tensor, rows: Sequence[TrainRow]) -> Term:
    better, worse = _places(rows, weights_BK)
    if isinstance(spec, DPOLoss):
        scores_BK = batch.logprobs_BT - batch.reference_logprobs_BT
    else:
        scores_BK = batch.logprobs_BT if isinstance(spec, ORPOLoss) else batch.scores_BT
    mask_BK = weights_BK != 0
    one, other = (scores_BK[better], mask_BK[better]), (scores_BK[worse], mask_BK[worse])
    match spec:
        case DPOLoss():
            loss_P, reply_score = preferences.dpo(one, other, spec.beta), preferences.masked_sum
        case ORPOLoss():
            loss_P, reply_score = preferences.orpo(one, other, spec.ratio_coef), preferences.masked_mean
        case QFunctionLoss():
            loss_P = preferences.q_function(one, other, spec.beta, spec.gamma)
            reply_score = preferences.masked_mean
        case OutcomeLoss():
            loss_P, reply_score = preferences.outcome(one, other), preferences.last_score
        case GatedLoss():
            loss_P, reply_score = preferences.gated(one, other), preferences.gated_mean
    margin_P = (reply_score(one) - reply_score(other)).detach()
    metrics = {"margin": _sum(margin_P), "accuracy": _sum((margin_P > 0).float() + 0.5 * (margin_P == 0))}
    return Term(loss_P.sum(), len(better), metrics)


def _over_rows(batch: TokenBatch, weights_BK: torch.Tensor) -> Term:
    mask_BK = weights_BK != 0
    right_B = (weights_BK.sum(-1) > 0).float()
    present_B = mask_BK.any(-1)
    reply = (batch.logprobs_BT - batch.reference_logprobs_BT, mask_BK)
    loss_B = preferences.implicit_outcome(reply, right_B).where(present_B, 0.0)
    said_right_B = preferences.masked_sum(reply).detach() > 0
    accuracy = _sum((said_right_B == (right_B > 0))[present_B].float())
    return Term(loss_B.sum(), int(present_B.sum()), {"accuracy": accuracy})


def _places(rows: Sequence[TrainRow], weights_BK: torch.Tensor) -> tuple[list[int], list[int]]:
    """Indexes of the better and of the worse row of each pair."""
    sides: dict[str, dict[bool, int]] = defaultdict(dict)
    for i, total in enumerate(weights_BK.sum(-1).tolist()):
        if total:
            sides[rows[i].pair][total > 0] = i
    return [side[True] for side in sides.values()], [side[False] for side in sides.values()]


def _sum(values: torch.Tensor) -> float:
    return float(values.double().sum())


def token_batch(
    rows: Sequence[TrainRow],
    positions_K: NDArray[np.int64],
    weights_BK: torch.Tensor,
    *,
    logprobs_BK: torch.Tensor | None = None,
    entropy_BK: torch.Tensor | None = None,
    scores_BK: torch.Tensor | None = None,
) -> TokenBatch:
    """What a term's loss looks at, at the K positions that went through the output layer."""

    def column(name: str) -> torch.Tensor:
        values_BT = padded(rows, [getattr(row, name) for row in rows], missing=math.nan)
        values_BK = torch.from_numpy(values_BT[:, positions_K]).to(weights_BK.device)
        # Outside of the term a row need not have values, and a NaN would reach the gradient as 0 x NaN.
        return torch.where(weights_BK != 0, values_BK, 0.0)

    nothing_BK = torch.full_like(weights_BK, math.nan)
    return TokenBatch(
        nothing_BK if logprobs_BK is None else logprobs_BK,
        nothing_BK if entropy_BK is None else entropy_BK,
        nothing_BK if scores_BK is None else scores_BK,
        advantages_BT=column("advantages"),
        sampled_logprobs_BT=column("sampled_logprobs"),
        reference_logprobs_BT=column("reference_logprobs"),
        targets_BT=column("targets"),
        old_scores_BT=column("old_scores"),
    )


def padded(rows: Sequence[TrainRow], arrays: Sequence[PerToken | None], missing: float = 0.0) -> Array:
    """One per-token array of all rows, float32[B, T]; `missing` where a row has none."""
    filled = [
        np.full(len(row.tokens), missing, np.float32) if array is None else array.array
        for row, array in zip(rows, arrays, strict=True)
    ]
    return pad_right(filled).astype(np.float32)
