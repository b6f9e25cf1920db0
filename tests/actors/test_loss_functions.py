import math
from collections.abc import Sequence

import pytest
import torch

from actors.policy.loss_functions import TokenBatch, grpo, k3, token_loss
from actors.policy.torch_trainer import reduce_term
from protocols.losses import GRPOLoss, SFTLoss

NAN = math.nan
APPROX = {"rel": 0, "abs": 1e-5}


def batch(
    logprobs: torch.Tensor,
    advantages: float | Sequence[float] = NAN,
    sampled: float | Sequence[float] = NAN,
    reference: float | Sequence[float] = NAN,
    entropy: float | Sequence[float] = 0.0,
) -> TokenBatch:
    def like(values: float | Sequence[float]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32).expand_as(logprobs)

    return TokenBatch(logprobs, like(entropy), like(advantages), like(sampled), like(reference))


def off_policy(ratio: float, advantage: float, **spec: float) -> tuple[float, float]:
    """Loss of one token, and its derivative by the log-prob."""
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    loss = grpo(GRPOLoss(**spec), batch(logprobs, advantage, -1.0 - math.log(ratio))).loss_BT
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1, -1.2, 0.0),
        (1.5, -1, 1.5, 1.5),
        (0.5, 1, -0.5, -0.5),
        (0.5, -1, 0.8, 0.0),
        (4, -1, 3.0, 0.0),
        (1.1, 2, -2.2, -2.2),
    ],
)
def test_the_clipped_losses_of_the_specification(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    assert off_policy(ratio, advantage) == pytest.approx((loss, gradient), **APPROX)


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss"),
    [
        (4, -1, {"dual_clip": 0}, 4.0),
        (4, -1, {"dual_clip": 5}, 4.0),
        (4, 1, {"dual_clip": 3}, -1.2),
        (1.5, 1, {"clip_high": 0.28}, -1.28),
        (1.5, 1, {"clip_low": 0.0}, -1.2),
        (0.5, -1, {"clip_low": 0.3}, 0.7),
        (0.5, -1, {"clip_high": 9}, 0.8),
    ],
)
def test_each_bound_has_its_own_setting(
    ratio: float, advantage: float, options: dict[str, float], loss: float
) -> None:
    assert off_policy(ratio, advantage, **options)[0] == pytest.approx(loss, **APPROX)


def test_log_ratios_end_at_twenty() -> None:
    assert off_policy(math.exp(30), -1, dual_clip=0) == pytest.approx((math.exp(20), 0.0), rel=1e-5)
    assert off_policy(math.exp(-30), 1) == pytest.approx((-math.exp(-20), 0.0), rel=1e-5)
    assert off_policy(math.exp(30), 1) == pytest.approx((-1.2, 0.0), **APPROX)
    assert off_policy(math.exp(19), -1, dual_clip=0) == pytest.approx((math.exp(19), math.exp(19)), rel=1e-4)


@pytest.mark.parametrize(
    ("normalize", "loss", "gradients"),
    [("token", -0.4, (-0.2, 0.1)), ("sequence", -0.25, (-1 / 6, 1 / 8))],
)
def test_the_means_of_the_specification(normalize: str, loss: float, gradients: tuple[float, float]) -> None:
    spec = GRPOLoss.model_validate({"normalize": normalize})
    logprobs = torch.log(torch.tensor([[0.5, 0.9, 0.1], [0.3, 0.4, 0.2]])).requires_grad_()
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    per_token = grpo(spec, batch(logprobs, [[1.0] * 3, [-0.5] * 3])).loss_BT
    mean = reduce_term(spec, per_token, weights) / (5 if normalize == "token" else 2)
    mean.backward()
    assert mean.item() == pytest.approx(loss, **APPROX)
    first, second = gradients
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [
        pytest.approx([first] * 3, **APPROX),
        pytest.approx([second, second, 0.0], **APPROX),
    ]


def test_weights_scale_tokens_but_do_not_count_more() -> None:
    losses, weights = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.0, 2.0]])
    assert reduce_term(SFTLoss(), losses, weights).item() == pytest.approx(0.5 + 8)
    assert reduce_term(SFTLoss(normalize="sequence"), losses, weights).item() == pytest.approx((0.5 + 8) / 2)


@pytest.mark.parametrize(("difference", "value"), [(0.1, 0.005171), (-0.1, 0.004837), (1.0, 0.718282), (0.0, 0.0)])
def test_the_k3_values_of_the_specification(difference: float, value: float) -> None:
    logprobs = torch.tensor([-1.5], requires_grad=True)
    kl = k3(logprobs, torch.tensor([-1.5 + difference]))
    kl.backward()
    assert kl.item() == pytest.approx(value, abs=1e-6)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(1 - math.exp(difference), abs=1e-6)


def test_k3_of_close_policies_is_not_lost_in_rounding() -> None:
    assert k3(torch.tensor([-0.5]), torch.tensor([-0.499])).item() == pytest.approx(5e-7, rel=2e-3)


def test_kl_and_entropy_enter_with_their_factors() -> None:
    logprobs = torch.tensor([[-1.0]])
    given = batch(logprobs, 1.0, reference=-0.9, entropy=2.0)
    assert grpo(GRPOLoss(), given).loss_BT.item() == pytest.approx(-1.0)
    assert grpo(GRPOLoss(kl_coef=0.5), given).loss_BT.item() == pytest.approx(-1 + 0.5 * 0.005171, **APPROX)
    assert grpo(GRPOLoss(entropy_coef=0.1), given).loss_BT.item() == pytest.approx(-1.2)


def test_tokens_without_sampled_logprobs_are_on_policy() -> None:
    logprobs = torch.tensor([[-1.0, -1.0, -2.0]], requires_grad=True)
    given = batch(logprobs, [[2.0, 2.0, -1.0]], [[NAN, -1.0 - math.log(1.1), NAN]])
    result = grpo(GRPOLoss(), given)
    result.loss_BT.sum().backward()
    assert result.loss_BT.tolist() == [pytest.approx([-2.0, -2.2, 1.0], **APPROX)]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [pytest.approx([-2.0, -2.2, 1.0], **APPROX)]
    assert result.metrics["ratio"].tolist() == [pytest.approx([1.0, 1.1, 1.0], **APPROX)]


def test_metrics_of_the_policy_gradient() -> None:
    given = batch(torch.tensor([[-1.0, -1.0]]), 1.0, [[-1.0, -1.5]], reference=-0.9, entropy=0.7)
    metrics = grpo(GRPOLoss(kl_coef=0.1), given).metrics
    assert {name: values.tolist()[0] for name, values in metrics.items()} == {
        "ratio": pytest.approx([1.0, math.exp(0.5)]),
        "ratio_squared": pytest.approx([1.0, math.exp(1.0)]),
        "clip_share": [0.0, 1.0],
        "sampler_gap": pytest.approx([0.0, 0.5]),
        "entropy": pytest.approx([0.7, 0.7]),
        "kl": pytest.approx([0.005171] * 2, abs=1e-6),
    }


def test_the_supervised_loss_is_minus_log_p() -> None:
    result = token_loss(SFTLoss(), batch(torch.tensor([[-1.0, -0.25]]), entropy=0.5))
    assert result.loss_BT.tolist() == [[1.0, 0.25]]
    assert result.metrics["entropy"].tolist() == [[0.5, 0.5]]


def test_the_spec_chooses_the_loss() -> None:
    given = batch(torch.tensor([[-1.0]]), 3.0)
    assert token_loss(GRPOLoss(), given).loss_BT.item() == -3.0
    assert token_loss(SFTLoss(), given).loss_BT.item() == 1.0


def test_the_clipped_terms_of_q_rm() -> None:
    # Q-RM's specification, section 5.4: PPO without dual clip.
    pairs = [(1.3, 1.0, -1.2), (1.3, -1.0, 1.3), (0.7, 2.0, -1.4), (0.7, -0.5, 0.4)]
    losses = [off_policy(ratio, advantage, dual_clip=0)[0] for ratio, advantage, _ in pairs]
    assert losses == pytest.approx([loss for *_, loss in pairs], **APPROX)
    assert sum(losses) / 4 == pytest.approx(-0.225, **APPROX)
