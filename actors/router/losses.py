"""Losses of the choice. All take float32[B, T] and give one number per row, float32[B]."""

import torch
from torch.nn import functional as F


def bce(logits_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, mean over candidates (specification section 2.3)."""
    return F.binary_cross_entropy_with_logits(logits_BT, targets_BT, reduction="none").mean(1)


def forward_kl(logits_BT: torch.Tensor, scores_BT: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(softmax(scores / temperature) || softmax(logits)), ZOOTER (arXiv 2311.08692, equation 3)."""
    wanted_BT = torch.log_softmax(scores_BT / temperature, 1)
    return (wanted_BT.exp() * (wanted_BT - torch.log_softmax(logits_BT, 1))).sum(1)


def contrastive(similarities_BT: torch.Tensor, scores_BT: torch.Tensor, sides: int) -> torch.Tensor:
    """The best candidates against the worst: RouterDC's sample-model loss (arXiv 2409.19886, equation 3).

    Mean over the positives k of -log(e^sim_k / (e^sim_k + sum over the negatives of e^sim)). Positives are those of
    the `sides` best that score above the row's mean, negatives those of the `sides` worst that do not. Where all
    score the same there is nothing to push apart, and the row counts 0.
    """
    order_BT = scores_BT.argsort(dim=1, descending=True, stable=True)
    rank_BT = order_BT.argsort(dim=1)
    good_BT = scores_BT > scores_BT.mean(1, keepdim=True)
    positive_BT = good_BT & (rank_BT < sides)
    negative_BT = ~good_BT & (rank_BT >= scores_BT.shape[1] - sides)
    # -inf would leave NaN in the gradient of a row without negatives.
    others_B1 = similarities_BT.masked_fill(~negative_BT, -1e9).logsumexp(1, keepdim=True)
    terms_BT = torch.logaddexp(similarities_BT, others_B1) - similarities_BT
    return (terms_BT * positive_BT).sum(1) / positive_BT.sum(1).clamp(min=1)


def pairwise(logits_BT: torch.Tensor, scores_BT: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(logit_i - logit_j), mean over pairs with score_i > score_j (RouteLLM, arXiv 2406.18665)."""
    better_BTT = scores_BT[:, :, None] > scores_BT[:, None, :]
    losses_BTT = -F.logsigmoid(logits_BT[:, :, None] - logits_BT[:, None, :])
    return (losses_BTT * better_BTT).sum((1, 2)) / better_BTT.sum((1, 2)).clamp(min=1)
