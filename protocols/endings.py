"""How likely a policy is to end prompts with given words, such as the names of answers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protocols.policy import PolicyService, ScoreRequest
from protocols.tensor import Tensor


async def ending_logprobs(
    policy: PolicyService, prompts: Sequence[NDArray[np.int32]], endings: Sequence[NDArray[np.int32]]
) -> tuple[NDArray[np.float64], int]:
    """Log-probs of each ending after each prompt, summed over its tokens, float64[B, E] in nats, and the weight
    version behind them. B is at least 1."""
    sequences = [Tensor(np.concatenate([prompt, ending])) for prompt in prompts for ending in endings]
    response = await policy.score(ScoreRequest(sequences=sequences, last=max(map(len, endings))))
    totals = [
        float(logprobs.array[-len(endings[i % len(endings)]) :].astype(np.float64).sum())
        for i, logprobs in enumerate(response.logprobs)
    ]
    return np.array(totals).reshape(-1, len(endings)), response.version
