"""Choosing the next token: pure functions over logits."""

import numpy as np
import torch
from numpy.typing import NDArray

from protocols.messages import SamplingParams

SORTED_FIRST = 1024
"""Top-p sorts so many tokens; only rows whose top-p set is larger have their whole vocabulary sorted."""


def next_tokens(
    logits_RV: torch.Tensor, uniforms_R: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64[R] and their log softmax(logits / temperature) float32[R], before top-k and top-p.

    Inverts the cumulative distribution at one uniform number per row, so a row's token depends on its
    own logits and number alone.
    """
    if params.temperature == 0:
        logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
        tokens_R = logits_RV.argmax(-1)
    else:
        logprobs_RV = torch.log_softmax(logits_RV / params.temperature, dim=-1)
        if params.top_p < 1 or params.top_k:
            tokens_R = _draw_from_top(logprobs_RV, uniforms_R, params)
        else:
            tokens_R = _invert(logprobs_RV.exp(), uniforms_R)
    return tokens_R, logprobs_RV.gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1)


def _draw_from_top(logprobs_RV: torch.Tensor, uniforms_R: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Draw from the most likely tokens: top-k first, then the smallest set that reaches top-p."""
    vocabulary = logprobs_RV.shape[-1]
    width = min(params.top_k or SORTED_FIRST, vocabulary)
    tokens_R, mass_R = _draw_from_best(logprobs_RV, uniforms_R, params, width)
    if params.top_k or width == vocabulary:
        return tokens_R
    short = (mass_R < params.top_p).nonzero().squeeze(-1)
    if short.numel():
        tokens_R[short] = _draw_from_best(logprobs_RV[short], uniforms_R[short], params, vocabulary)[0]
    return tokens_R


def _draw_from_best(
    logprobs_RV: torch.Tensor, uniforms_R: torch.Tensor, params: SamplingParams, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the top-p part of the `width` most likely tokens; also the probability of all of these."""
    sorted_RK, order_RK = logprobs_RV.topk(width, dim=-1)
    probs_RK = sorted_RK.double().exp()
    if params.top_k:
        probs_RK = probs_RK / probs_RK.sum(-1, keepdim=True)
    reached_RK = probs_RK.cumsum(-1)
    kept_RK = torch.where(reached_RK - probs_RK < params.top_p, probs_RK, 0.0)
    chosen_R = _invert(kept_RK, uniforms_R)
    return order_RK.gather(-1, chosen_R.unsqueeze(-1)).squeeze(-1), reached_RK[:, -1]


def _invert(weights_RK: torch.Tensor, uniforms_R: torch.Tensor) -> torch.Tensor:
    """Index of the first entry whose cumulative weight exceeds the uniform share of the total."""
    cumulative_RK = weights_RK.cumsum(-1, dtype=torch.float64)
    total_R = cumulative_RK[:, -1]
    # Rounding may put the share on the total itself; then the last entry with weight is meant.
    share_R = torch.minimum(uniforms_R.double() * total_R, total_R.nextafter(torch.zeros_like(total_R)))
    index_R = torch.searchsorted(cumulative_RK, share_R.unsqueeze(-1), right=True).squeeze(-1)
    # NaN is found nowhere; the index must stay valid until somebody looks at the log-prob.
    return index_R.clamp(max=weights_RK.shape[-1] - 1)


BLOCK = 64


class Uniforms:
    """A stream of uniform numbers per row, from (seed, sample index) alone."""

    def __init__(self, seeds: list[tuple[int, int]]) -> None:
        self._seeds = np.asarray(seeds, dtype=object).reshape(-1, 2)
        self._block: NDArray[np.float64] = np.empty((len(seeds), 0))
        self._used = 0

    def next(self) -> NDArray[np.float64]:
        """The next number of every remaining row, float64[R]."""
        if self._used % BLOCK == 0:
            self._block = np.stack([uniforms(seed, index, self._used // BLOCK) for seed, index in self._seeds])
        self._used += 1
        return self._block[:, (self._used - 1) % BLOCK]

    def select(self, rows: NDArray[np.int64]) -> None:
        """Keep the given rows."""
        self._seeds, self._block = self._seeds[rows], self._block[rows]


def uniforms(seed: int, index: int, block: int) -> NDArray[np.float64]:
    """A block of the stream of one row: its numbers from block * BLOCK on, float64[BLOCK]."""
    philox = np.random.Philox(key=np.array([seed % 2**64, index], dtype=np.uint64))
    # Philox counts in fours of 64-bit numbers, and each uniform number is made of one of these.
    philox.advance(block * BLOCK // 4)
    return np.random.Generator(philox).random(BLOCK)
