"""One forward pass over right-padded rows: log-probs and entropy of the tokens that are there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.policy.microbatch import attention_inputs, by_length, pad_right


def logits_of(
    model: Any, rows: Sequence[NDArray[np.int32]], wanted_BT: NDArray[np.bool_]
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """Logits that predict the wanted tokens.

    Only positions that some row wants go through the output layer, which is most of the memory for long
    prompts. Returns logits float32[B, K, V], targets int64[B, K] and the K positions of the targets in T.
    """
    device = model.device
    tokens_BT = torch.from_numpy(pad_right(rows).astype(np.int64)).to(device)
    positions_K = np.flatnonzero(wanted_BT[:, 1:].any(axis=0)) + 1
    keep = torch.from_numpy(positions_K - 1).to(device)
    inputs = attention_inputs([len(row) for row in rows], device)
    output = model(input_ids=tokens_BT, use_cache=False, logits_to_keep=keep, **inputs)
    return output.logits.float(), tokens_BT[:, torch.from_numpy(positions_K).to(device)], positions_K


def log_softmax(logits_BKV: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature)."""
    return torch.log_softmax(logits_BKV / temperature if temperature != 1 else logits_BKV, dim=-1)


def at_targets(values_BKV: torch.Tensor, targets_BK: torch.Tensor) -> torch.Tensor:
    """The targets' entries, float32[B, K]."""
    return values_BKV.gather(-1, targets_BK.unsqueeze(-1)).squeeze(-1)


def logprobs_and_entropy(
    logits_BKV: torch.Tensor, targets_BK: torch.Tensor, temperature: float, *, entropy_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at the targets, and the entropy in nats, float32[B, K] each."""
    all_BKV = log_softmax(logits_BKV, temperature)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_BK = -(all_BKV.exp() * all_BKV).sum(-1)
    return at_targets(all_BKV, targets_BK), entropy_BK


@torch.no_grad()
def score(
    model: Any, rows: Sequence[NDArray[np.int32]], temperature: float, budget: int
) -> list[NDArray[np.float32]]:
    """Log-probs of every token of every row, float32[T] each; entry 0 is 0."""
    results: list[NDArray[np.float32]] = [np.zeros(len(row), np.float32) for row in rows]
    for group in by_length([len(row) for row in rows], budget):
        chosen = [rows[i] for i in group]
        width = max(len(row) for row in chosen)
        if width < 2:
            continue
        logits, targets, _ = logits_of(model, chosen, np.ones((len(chosen), width), np.bool_))
        logprobs_BK = at_targets(log_softmax(logits, temperature), targets).cpu().numpy()
        for i, logprobs_K in zip(group, logprobs_BK, strict=True):
            results[i][1:] = logprobs_K[: len(rows[i]) - 1]
    return results
