"""Cutting a batch into pieces that fit, and padding a piece into arrays."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

SMALL = 2048
"""Tokens of a micro-batch below which more of them cost hardly more."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together."""

    rows: list[int]
    shared: int = 0
    """Leading tokens that all rows have in common and that are computed once for them; 0: rows are padded."""


def by_prompt(rows: Sequence[NDArray[np.int32]], prompts: Sequence[int], budget: int) -> list[MicroBatch]:
    """Group rows that begin with the same prompt where that saves half of their tokens; pad the rest.

    `prompts`: how many leading tokens of each row are prompt; 0 for a row that must not share. A group that
    shares has at most `budget` tokens. It is of one prompt, since attention over several would mostly be masked.
    """
    lengths = [len(row) for row in rows]
    same: defaultdict[bytes, list[int]] = defaultdict(list)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        same[row[:prompt].tobytes() if prompt else b""].append(i)
    alone = same.pop(b"", [])
    groups: list[MicroBatch] = []
    for members in same.values():
        prompt = prompts[members[0]]
        for piece in _pieces(members, lengths, prompt, budget):
            total = sum(lengths[i] for i in piece)
            if total - prompt * (len(piece) - 1) <= total / 2:
                groups.append(MicroBatch(piece, prompt))
            else:
                alone += piece
    alone.sort()
    padded = by_length([lengths[i] for i in alone], budget)
    return groups + [MicroBatch([alone[i] for i in group]) for group in padded]


def by_pair(rows: Sequence[NDArray[np.int32]], pairs: Sequence[str], budget: int) -> list[MicroBatch]:
    """Group rows so that those of a pair (the same name in `pairs`) stay together; "" is a row alone.

    Each group's rows x longest length is at most `budget` tokens; a longer pair goes alone.
    """
    members: dict[str | int, list[int]] = {}
    for i, name in enumerate(pairs):
        members.setdefault(name or i, []).append(i)
    longest = {key: max(len(rows[i]) for i in own) for key, own in members.items()}
    groups: list[MicroBatch] = []
    width = 0
    for key in sorted(members, key=lambda key: (-longest[key], members[key])):
        if groups and width * (len(groups[-1].rows) + len(members[key])) <= budget:
            groups[-1].rows.extend(members[key])
        else:
            groups.append(MicroBatch(list(members[key])))
            width = longest[key]
    return groups


def _pieces(members: Sequence[int], lengths: Sequence[int], prompt: int, budget: int) -> list[list[int]]:
    """Cut rows of one prompt where a piece, its prompt counted once, would exceed the budget."""
    pieces: list[list[int]] = []
    size = 0
    for i in members:
        if not pieces or size + lengths[i] - prompt > budget:
            pieces.append([])
            size = prompt
        pieces[-1].append(i)
        size += lengths[i] - prompt
    return pieces


def by_length(lengths: Sequence[int], budget: int, padding: float = math.inf) -> list[list[int]]:
    """Group indices into micro-batches, longest sequences together.

    Each group's rows x longest length is at most `budget` tokens; a longer sequence goes alone. From `SMALL` tokens
    on a group is closed where padding would be more than a share of `padding` of its tokens.
    Equal lengths keep their order, so the cut depends on nothing but its arguments.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    tokens = 0
    for i in order:
        padded = lengths[groups[-1][0]] * (len(groups[-1]) + 1) if groups else math.inf
        tokens += lengths[i]
        if padded <= budget and (padded <= SMALL or padded <= tokens * (1 + padding)):
            groups[-1].append(i)
        else:
            groups.append([i])
            tokens = lengths[i]
    return groups


def pad_right(rows: Sequence[NDArray[np.generic]], fill: float = 0) -> NDArray[np.generic]:
    """Stack 1-d arrays of different lengths into [B, T], filled up at the end."""
    width = max(len(row) for row in rows)
    stacked = np.full((len(rows), width), fill, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        stacked[i, : len(row)] = row
    return stacked


def pad_left(rows: Sequence[NDArray[np.generic]], fill: float = 0) -> NDArray[np.generic]:
    """Stack 1-d arrays of different lengths into [B, T], filled up at the start."""
    width = max(len(row) for row in rows)
    stacked = np.full((len(rows), width), fill, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        stacked[i, width - len(row) :] = row
    return stacked


def attention_inputs(lengths: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Attention mask of a right-padded batch; nothing if no row is padded, which lets attention run causal."""
    width = max(lengths)
    if min(lengths) == width:
        return {}
    mask = np.arange(width)[None, :] < np.asarray(lengths)[:, None]
    return {"attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device)}
