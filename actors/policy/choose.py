"""Choosing the next token: pure functions over logits."""

import numpy as np
import torch
from numpy.typing import NDArray

from protocols.messages import SamplingParams


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
            tokens_R = _invert(logprobs_RV.double().exp(), uniforms_R)
    return tokens_R, logprobs_RV.gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1)


def _draw_from_top(logprobs_RV: torch.Tensor, uniforms_R: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Draw from the most likely tokens: top-k first, then the smallest set that reaches top-p."""
    width = params.top_k or logprobs_RV.shape[-1]
    sorted_RK, order_RK = logprobs_RV.topk(min(width, logprobs_RV.shape[-1]), dim=-1)
    probs_RK = sorted_RK.double().exp()
    probs_RK = probs_RK / probs_RK.sum(-1, keepdim=True)
    before_RK = probs_RK.cumsum(-1) - probs_RK
    kept_RK = torch.where(before_RK < params.top_p, probs_RK, 0.0)
    chosen_R = _invert(kept_RK, uniforms_R)
    return order_RK.gather(-1, chosen_R.unsqueeze(-1)).squeeze(-1)


def _invert(weights_RK: torch.Tensor, uniforms_R: torch.Tensor) -> torch.Tensor:
    """Index of the first entry whose cumulative weight exceeds the uniform share of the total."""
    cumulative_RK = weights_RK.cumsum(-1)
    threshold_R = uniforms_R.to(cumulative_RK) * cumulative_RK[:, -1]
    index_R = torch.searchsorted(cumulative_RK, threshold_R.unsqueeze(-1), right=True).squeeze(-1)
    # Rounding may put the threshold on the total itself; the last entry with weight is meant.
    last_R = (weights_RK > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(index_R, last_R)


class Uniforms:
    """A stream of uniform numbers per row, from (seed, sample index) alone."""

    BLOCK = 64

    def __init__(self, seeds: list[tuple[int, int]]) -> None:
        self._streams = [np.random.Generator(np.random.Philox(key=_key(*seed))) for seed in seeds]
        self._block: NDArray[np.float64] = np.empty((len(seeds), 0))
        self._rows = np.arange(len(seeds))
        self._used = 0

    def next(self) -> NDArray[np.float64]:
        """The next number of every remaining row, float64[R]."""
        if self._used == self._block.shape[1]:
            self._block = np.stack([self._streams[i].random(self.BLOCK) for i in self._rows])
            self._used = 0
        self._used += 1
        return self._block[:, self._used - 1]

    def select(self, rows: NDArray[np.int64]) -> None:
        """Keep the given rows."""
        self._rows, self._block = self._rows[rows], self._block[rows]


def _key(seed: int, index: int) -> NDArray[np.uint64]:
    return np.array([seed % 2**64, index], dtype=np.uint64)
