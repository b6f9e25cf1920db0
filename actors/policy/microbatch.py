"""Cutting a batch into pieces that fit, and padding a piece into arrays."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group indices into micro-batches, longest sequences together.

    Each group's rows x longest length is at most `budget` tokens; a longer sequence goes alone.
    Equal lengths keep their order, so the cut depends on nothing but its arguments.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
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
