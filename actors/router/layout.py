"""How a query and the answers of a pool are laid out as one row of tokens (specification sections 2.4 and 2.5)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from actors.policy.microbatch import pad_right

Ids = NDArray[np.int64]
NOTHING = -1
"""In labels: nothing is predicted. In slots: an ordinary token. In blocks: the query."""


@dataclass(frozen=True)
class Layout:
    """One row of L places, int64[L] each."""

    tokens: Ids
    """Token ids; 0 at slots."""
    slots: Ids
    """Candidate whose own embedding stands here instead of a token."""
    blocks: Ids
    """Candidate whose block it is."""
    positions: Ids
    """Position ids."""
    labels: Ids
    """Token that is to be predicted here."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predicted(self) -> int:
        """How many tokens are to be predicted."""
        return int((self.labels != NOTHING).sum())


def query_layout(query: Ids) -> Layout:
    """The query alone."""
    nothing = np.full(len(query), NOTHING)
    return Layout(query, nothing, nothing, np.arange(len(query)), nothing)


def masked_layout(query: Ids, answers: Sequence[Ids] | None, pool: int, size: int, end: int, rate: float) -> Layout:
    """The query (special tokens included), then for each candidate `size` places and the token `end`.

    The last max(floor(length * rate), 1) tokens of an answer are masked by the candidate's own embedding, and are to
    be predicted; those before are visible. Places past a short answer are masked without a label. Without answers,
    as in service, and at rate 1 nothing but masks is there. Every block has the same position ids, so that candidates
    can be exchanged.
    """
    rows = [query_layout(query)]
    for candidate in range(pool):
        slots = np.full(size + 1, candidate)
        tokens, labels = np.zeros(size + 1, np.int64), np.full(size + 1, NOTHING)
        slots[size], tokens[size] = NOTHING, end
        answer = answers[candidate][:size] if answers else np.zeros(0, np.int64)
        if len(answer):
            visible = len(answer) - masked_count(len(answer), rate)
            tokens[:visible], slots[:visible] = answer[:visible], NOTHING
            labels[visible : len(answer)] = answer[visible:]
        positions = len(query) + np.arange(size + 1)
        rows.append(Layout(tokens, slots, np.full(size + 1, candidate), positions, labels))
    return _joined(rows)


def causal_layout(query: Ids, answers: Sequence[Ids] | None, pool: int) -> Layout:
    """The query, then for each candidate its own embedding and, to learn, its answer with the end token.

    Every block begins at the position after the query and sees the query and itself, so that one row says what a row
    per candidate would. Each place predicts the next token of its answer.
    """
    rows = [query_layout(query)]
    for candidate in range(pool):
        answer = answers[candidate] if answers else np.zeros(0, np.int64)
        labels = np.append(answer, NOTHING)
        slots = np.full(len(answer) + 1, NOTHING)
        slots[0] = candidate
        positions = len(query) + np.arange(len(answer) + 1)
        tokens = np.concatenate([[0], answer])
        # Nothing is predicted after the last token, so it need not be read.
        keep = slice(0, max(len(answer), 1))
        parts = (tokens, slots, np.full(len(tokens), candidate), positions, labels)
        rows.append(Layout(*(part[keep] for part in parts)))
    return _joined(rows)


def masked_count(length: int, rate: float) -> int:
    """Tokens of an answer that are masked: max(floor(length * rate), 1)."""
    return max(math.floor(length * rate), 1)


def mask_rate(step: int, warmup: float) -> float:
    """Share of an answer that is masked at an optimiser step, from 0; 1 from step `warmup` on.

    It follows optimiser steps, so that it does not depend on how a batch is spread over processes.
    """
    return 1.0 if step >= warmup else 0.3 + 0.7 * step / warmup


def _joined(rows: Sequence[Layout]) -> Layout:
    names = ("tokens", "slots", "blocks", "positions", "labels")
    return Layout(*(np.concatenate([getattr(row, name) for row in rows]) for name in names))


@dataclass(frozen=True)
class Packed:
    """Rows side by side, padded at the end: int64[B, L] each."""

    tokens: torch.Tensor
    slots: torch.Tensor
    blocks: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    there: torch.Tensor
    """Whether a place belongs to its row, bool[B, L]."""

    @classmethod
    def of(cls, rows: Sequence[Layout], device: torch.device) -> "Packed":
        """Stack rows on a device."""
        lengths = np.array([len(row) for row in rows])
        fills = {"tokens": 0, "slots": NOTHING, "blocks": NOTHING, "positions": 0, "labels": NOTHING}
        parts = {
            name: torch.from_numpy(pad_right([getattr(row, name) for row in rows], fill)).to(device)
            for name, fill in fills.items()
        }
        there_BL = torch.from_numpy(np.arange(lengths.max())[None] < lengths[:, None]).to(device)
        return cls(**parts, there=there_BL)


def causal_mask(packed: Packed) -> torch.Tensor:
    """What each place sees of those before: the query and its own block. bool[B, 1, L, L]."""
    order_L = torch.arange(packed.tokens.shape[1], device=packed.tokens.device)
    before_LL = order_L[None, :] <= order_L[:, None]
    return (before_LL[None] & _query_or_own(packed))[:, None]


def apart_mask(packed: Packed) -> torch.Tensor:
    """The first place sees all, the rest of the query itself, blocks the query and themselves. bool[B, 1, L, L]."""
    seen_BLL = _query_or_own(packed)
    seen_BLL[:, 0] = packed.there
    return seen_BLL[:, None]


def _query_or_own(packed: Packed) -> torch.Tensor:
    block_BL = packed.blocks
    own_BLL = block_BL[:, :, None] == block_BL[:, None, :]
    # A place of the padding sees itself, for a softmax over nothing is NaN.
    itself_LL = torch.eye(block_BL.shape[1], dtype=torch.bool, device=block_BL.device)
    seen_BLL = (own_BLL | (block_BL[:, None, :] == NOTHING)) & packed.there[:, None, :]
    return seen_BLL | itself_LL[None]
