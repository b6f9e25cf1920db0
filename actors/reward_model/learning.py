"""What a reward model learns from: preferences and labelled replies as training rows."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.reward_model.reading import Read, Unreadable
from protocols.errors import BadInput
from protocols.losses import (
    DPOLoss,
    GatedLoss,
    ImplicitOutcomeLoss,
    LossSpec,
    OutcomeLoss,
    QFunctionLoss,
    StepsLoss,
    ValueLoss,
)
from protocols.reward_model import FROM_PAIRS, Kind, LabelledReply, LearnRequest, Reply, RewardModelConfig
from protocols.tensor import Tensor
from protocols.training import TrainRow

TERM = "reward"

Learnable = tuple[Read, Read] | tuple[Read, LabelledReply]
"""The better and the worse reply, or a reply with its label."""


def loss_of(config: RewardModelConfig) -> LossSpec:
    """The loss of a kind that learns."""
    match config.kind:
        case "q_function":
            return QFunctionLoss(gamma=config.gamma, **_beta(config))
        case "outcome":
            return OutcomeLoss()
        case "gated":
            return GatedLoss()
        case "implicit":
            return DPOLoss(**_beta(config))
        case "implicit_outcome":
            return ImplicitOutcomeLoss()
        case "steps":
            return StepsLoss()
        case "value":
            return ValueLoss(clip=config.clip)
    raise ValueError(f"{config.kind} does not learn")


def _beta(config: RewardModelConfig) -> dict[str, float]:
    return {} if config.beta is None else {"beta": config.beta}


def check_kind(kind: Kind, request: LearnRequest) -> None:
    """Raise BadInput when the request holds what the kind does not learn from."""
    wanted, other = ("pairs", "replies") if kind in FROM_PAIRS else ("replies", "pairs")
    if getattr(request, other) or not getattr(request, wanted):
        raise BadInput(
            f"{other if getattr(request, other) else wanted}: a reward model of kind {kind} learns from {wanted}"
        )
    for one in request.replies:
        name = one.reply.uid
        if kind == "implicit_outcome" and one.right is None:
            raise BadInput(f"reply {name!r}: right: expected true or false for {kind}")
        if kind in ("steps", "value"):
            length = None if one.reply.tokens is None else len(one.reply.tokens)
            if length is None or one.targets is None or len(one.targets) != length:
                raise BadInput(f"reply {name!r}: expected tokens, and targets of the same length, for {kind}")
            if one.old_values is not None and len(one.old_values) != length:
                raise BadInput(f"reply {name!r}: old_values has {len(one.old_values)} entries for {length} tokens")


def learnable_of(
    request: LearnRequest, read: Callable[[Reply], Read], kind: Kind
) -> tuple[list[Learnable], Counter[str]]:
    """What can be learnt from, and how many were left out for which reason."""
    dropped: Counter[str] = Counter()
    found: list[Learnable] = []
    for pair in request.pairs:
        sides = [_readable(one, read, dropped) for one in (pair.chosen, pair.rejected)]
        if sides[0] is None or sides[1] is None:
            continue
        if np.array_equal(sides[0].tokens, sides[1].tokens):
            dropped["chosen equals rejected"] += 1
        else:
            found.append((sides[0], sides[1]))
    for labelled in request.replies:
        one = _readable(labelled.reply, read, dropped)
        if one is not None:
            found.append((one, labelled))
    return found, dropped


def _readable(reply: Reply, read: Callable[[Reply], Read], dropped: Counter[str]) -> Read | None:
    """The reply in the model's tokens; counted as dropped if it is empty or its prompt leaves no room."""
    try:
        return read(reply)
    except Unreadable as error:
        dropped[error.reason] += 1
        return None


def rows_of(found: Sequence[Learnable], kind: Kind) -> list[TrainRow]:
    """Training rows of the one term."""
    rows: list[TrainRow] = []
    for i, (one, other) in enumerate(found):
        if isinstance(other, Read):
            rows += [_row(one, f"pair {i}", 1.0), _row(other, f"pair {i}", -1.0)]
        elif kind == "implicit_outcome":
            rows.append(_row(one, "", 1.0 if other.right else -1.0))
        else:
            rows.append(_with_targets(one, other, before=kind == "value"))
    return rows


def _row(one: Read, pair: str, weight: float) -> TrainRow:
    weights = np.full(len(one.tokens), weight, np.float32)
    weights[: one.prompt] = 0
    return TrainRow(row_id=one.uid, tokens=Tensor(one.tokens), terms={TERM: Tensor(weights)}, pair=pair)


def _with_targets(one: Read, label: LabelledReply, *, before: bool) -> TrainRow:
    """`before`: a token's target is for the state that has not read it yet, one position earlier."""
    first, count = one.prompt - before, len(one.reply_tokens)

    def placed(values: Tensor) -> NDArray[np.float32]:
        row = np.full(len(one.tokens), np.nan, np.float32)
        row[first : first + count] = values.array[:count]
        return row

    assert label.targets is not None
    targets = placed(label.targets)
    weights = np.isfinite(targets).astype(np.float32)
    # The state of a prompt of one token cannot be weighed.
    weights[0] = 0
    old = None if label.old_values is None else Tensor(placed(label.old_values))
    return TrainRow(
        row_id=one.uid,
        tokens=Tensor(one.tokens),
        terms={TERM: Tensor(weights)},
        targets=Tensor(targets),
        old_scores=old,
    )
