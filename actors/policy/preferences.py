"""Losses that compare replies, each a pure function of scores per token: of DPO log-ratios, of ORPO log-probs.

Arrays are float32[B, T] with a mask of the reply's tokens, the final end token among them; pairs are rows of two such
arrays, the better reply and the worse one. Each returns the loss of every row, float32[B].
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

CERTAIN = -1e-6
"""Mean log-prob above which a reply counts as having this one: the odds of a certain reply are infinite."""
Reply = tuple[Tensor, Tensor]
"""Scores and mask of replies."""


def masked_mean(reply: Reply) -> Tensor:
    """Mean score of each reply, float32[B]."""
    scores_BT, mask_BT = reply
    return masked_sum(reply) / mask_BT.sum(-1).to(scores_BT.dtype)


def masked_sum(reply: Reply) -> Tensor:
    """Sum of each reply's scores, float32[B]. What stands at other tokens does not matter, be it NaN."""
    scores_BT, mask_BT = reply
    return scores_BT.where(mask_BT, 0.0).sum(-1)


def last_score(reply: Reply) -> Tensor:
    """Score of each reply's last token, float32[B]."""
    scores_BT, mask_BT = reply
    # How many of the reply's tokens there are from here on. No reduction: there may be no token at all.
    left_BT = mask_BT.flip(-1).cumsum(-1).flip(-1)
    return masked_sum((scores_BT, mask_BT & (left_BT == 1)))


def q_function(better: Reply, worse: Reply, beta: float = 0.2, gamma: float = 2.0) -> Tensor:
    """Q-RM's loss of logits Z: -log sigmoid(beta (mean Z of the better - mean Z of the worse) - gamma)."""
    return -logsigmoid(beta * (masked_mean(better) - masked_mean(worse)) - gamma)


def outcome(better: Reply, worse: Reply) -> Tensor:
    """Bradley-Terry over the scores of the last tokens (Ouyang et al. 2022, eq. 1)."""
    return -logsigmoid(last_score(better) - last_score(worse))


def dpo(better: Reply, worse: Reply, beta: float = 0.1) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7) of log-ratios log pi - log reference per token."""
    return -logsigmoid(beta * (masked_sum(better) - masked_sum(worse)))


def orpo(better: Reply, worse: Reply, ratio_coef: float = 0.1) -> Tensor:
    """ORPO (Hong et al. 2024, eq. 6 and 7) of log-probs per token; the likelihood is of the better reply's tokens."""
    ratio = log_odds(masked_mean(better)) - log_odds(masked_mean(worse))
    return -masked_mean(better) - ratio_coef * logsigmoid(ratio)


def log_odds(logprob: Tensor) -> Tensor:
    """log p / (1 - p) of log p."""
    logprob = logprob.clamp(max=CERTAIN)
    return logprob - torch.log(-torch.expm1(logprob))


def implicit_outcome(reply: Reply, right_B: Tensor) -> Tensor:
    """Cross entropy of outcomes, the logit being the sum of log-ratios (Yuan et al. 2024, implicit PRM)."""
    return binary_cross_entropy_with_logits(masked_sum(reply), right_B, reduction="none")


def gated(better: Reply, worse: Reply) -> Tensor:
    """Bradley-Terry over mean sigmoid scores times the pair's mean length (PGG-RM)."""
    length_B = (better[1].sum(-1) + worse[1].sum(-1)) / 2
    return -logsigmoid(length_B * (gated_mean(better) - gated_mean(worse)))


def gated_mean(reply: Reply) -> Tensor:
    """Mean sigmoid score of each reply, float32[B]."""
    scores_BT, mask_BT = reply
    return masked_mean((scores_BT.sigmoid(), mask_BT))
