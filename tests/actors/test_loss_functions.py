import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from actors.policy.loss_functions import TokenBatch, grpo, k3, reinforce, token_loss, value
from actors.policy.terms import evaluate
from protocols.losses import GRPOLoss, OutcomeLoss, ReinforceLoss, SFTLoss, StepsLoss, ValueLoss

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

    return TokenBatch(
        logprobs,
        like(entropy),
        scores_BT=like(NAN),
        advantages_BT=like(advantages),
        sampled_logprobs_BT=like(sampled),
        reference_logprobs_BT=like(reference),
        targets_BT=like(NAN),
        old_scores_BT=like(NAN),
    )


def scored(scores: torch.Tensor, targets: Sequence[float], old: float | Sequence[float] = NAN) -> TokenBatch:
    """One row of a model with a scalar head."""
    nothing = torch.full_like(scores, NAN)
    given = {"scores_BT": scores, "targets_BT": torch.tensor([targets])}
    given["old_scores_BT"] = torch.as_tensor(old, dtype=torch.float32).expand_as(scores)
    return replace(batch(nothing), **given)


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
    total = evaluate(spec, batch(logprobs, [[1.0] * 3, [-0.5] * 3]), weights, []).total
    mean = total / (5 if normalize == "token" else 2)
    mean.backward()
    assert mean.item() == pytest.approx(loss, **APPROX)
    first, second = gradients
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [
        pytest.approx([first] * 3, **APPROX),
        pytest.approx([second, second, 0.0], **APPROX),
    ]


def test_weights_scale_tokens_but_do_not_count_more() -> None:
    given, weights = batch(torch.tensor([[-1.0, -2.0, -4.0]]), entropy=[[3.0, 9.0, 5.0]]), torch.tensor([[0.5, 0, 2]])
    for spec, total in ((SFTLoss(), 0.5 + 8), (SFTLoss(normalize="sequence"), (0.5 + 8) / 2)):
        found = evaluate(spec, given, weights, [])
        assert found.total.item() == pytest.approx(total)
        assert (found.items, found.metrics) == (2, {"entropy": 8.0})


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
    given = batch(torch.tensor([[-0.5]]), 3.0)
    assert token_loss(GRPOLoss(), given).loss_BT.item() == -3.0
    assert token_loss(ReinforceLoss(), given).loss_BT.item() == 1.5
    assert token_loss(SFTLoss(), given).loss_BT.item() == 0.5
    given = scored(torch.tensor([[2.0]]), [0.5])
    assert token_loss(ValueLoss(), given).loss_BT.item() == 2.25
    assert token_loss(StepsLoss(), given).loss_BT.item() == pytest.approx((math.tanh(2) - 0.5) ** 2)
    with pytest.raises(TypeError, match="no function for OutcomeLoss"):
        token_loss(OutcomeLoss(), given)


# REINFORCE: -A log p, whose derivative by the log-prob is -A.


def test_reinforce() -> None:
    logprobs = torch.tensor([[-0.5, -2.0, -0.1]], requires_grad=True)
    result = reinforce(ReinforceLoss(), batch(logprobs, [[2.0, -1.0, 0.0]], entropy=0.7))
    result.loss_BT.sum().backward()
    assert result.loss_BT.tolist() == [pytest.approx([1.0, -2.0, 0.0])]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-2.0, 1.0, 0.0]]
    assert result.metrics.keys() == {"entropy"}


def test_reinforce_with_kl_and_entropy() -> None:
    # d = reference - policy = 0.1: k3 = 0.005171, and its derivative 1 - exp(0.1) = -0.105171.
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    spec = ReinforceLoss(kl_coef=0.5, entropy_coef=0.1)
    result = reinforce(spec, batch(logprobs, 1.5, reference=-0.9, entropy=2.0))
    result.loss_BT.backward()
    assert result.loss_BT.item() == pytest.approx(1.5 + 0.5 * 0.005171 - 0.2, **APPROX)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-1.5 + 0.5 * -0.105171, **APPROX)
    assert result.metrics["kl"].item() == pytest.approx(0.005171, abs=1e-6)


# Scores against targets.


def test_the_step_scores_of_q_rm() -> None:
    # Q-RM's specification, section 5.4; the second token is no end of a step.
    scores = torch.tensor([[0.2, 9.0, -1.5, 3.0]], requires_grad=True)
    given, weights = scored(scores, [1, 0, -1, 1]), torch.tensor([[1.0, 0, 1, 1]])
    found = evaluate(StepsLoss(), given, weights, [])
    found.total.backward()
    assert found.total.item() == pytest.approx(0.217743, abs=1e-6)
    assert (found.items, found.metrics) == (3, {})
    errors = torch.tensor([0.2, -1.5, 3.0]).tanh() - torch.tensor([1.0, -1, 1])
    slopes = 1 - torch.tensor([0.2, -1.5, 3.0]).tanh().square()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad[0, [0, 2, 3]], 2 * errors * slopes / 3)
    assert scores.grad[0, 1] == 0


def test_the_value_loss_is_the_squared_error() -> None:
    scores = torch.tensor([[0.5, -1.0]], requires_grad=True)
    result = value(ValueLoss(), scored(scores, [1.5, -1.0]))
    result.loss_BT.sum().backward()
    assert result.loss_BT.tolist() == [[1.0, 0.0]]
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-2.0, 0.0]]
    assert {name: values.tolist()[0] for name, values in result.metrics.items()} == {
        "value": [0.5, -1.0],
        "target": [1.5, -1.0],
    }


@pytest.mark.parametrize(
    ("score", "old", "target", "loss", "gradient"),
    [
        # Within the clip: the plain error.
        (1.1, 1.0, 2.0, 0.81, -1.8),
        # It moved 0.5 towards the target, 0.2 of which count: (1.2 - 2)^2, and nothing pulls it further.
        (1.5, 1.0, 2.0, 0.64, 0.0),
        # It moved away from the target: the plain error (0.5 - 2)^2 is the larger one.
        (0.5, 1.0, 2.0, 2.25, -3.0),
        # It overshot: the plain error (4 - 2)^2 is larger than (1.2 - 2)^2.
        (4.0, 1.0, 2.0, 4.0, 4.0),
    ],
)
def test_the_clipped_value_loss(score: float, old: float, target: float, loss: float, gradient: float) -> None:
    scores = torch.tensor([[score]], requires_grad=True)
    result = value(ValueLoss(clip=0.2), scored(scores, [target], old))
    result.loss_BT.backward()
    assert result.loss_BT.item() == pytest.approx(loss, **APPROX)
    assert scores.grad is not None
    assert scores.grad.item() == pytest.approx(gradient, **APPROX)
    assert result.metrics["clip_share"].item() == (gradient == 0)


def test_the_clipped_terms_of_q_rm() -> None:
    # Q-RM's specification, section 5.4: PPO without dual clip.
    pairs = [(1.3, 1.0, -1.2), (1.3, -1.0, 1.3), (0.7, 2.0, -1.4), (0.7, -0.5, 0.4)]
    losses = [off_policy(ratio, advantage, dual_clip=0)[0] for ratio, advantage, _ in pairs]
    assert losses == pytest.approx([loss for *_, loss in pairs], **APPROX)
    assert sum(losses) / 4 == pytest.approx(-0.225, **APPROX)
