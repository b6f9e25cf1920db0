import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from actors.policy.loading import Loaded
from actors.policy.microbatch import by_length
from actors.policy.torch_trainer import TorchTrainer, rate_share, term_counts
from protocols.errors import BadInput, Corrupt
from protocols.losses import GRPOLoss, LossSpec, SFTLoss
from protocols.model import TrainerConfig
from protocols.training import ForwardBackwardRequest, ForwardBackwardResponse, OptimStepRequest, TrainRow

Gradients = dict[str, torch.Tensor]
LENGTHS = [5, 12, 3, 9, 12, 2, 7]

LOSSES: dict[str, dict[str, LossSpec]] = {
    "sft": {"a": SFTLoss()},
    "sft by sequence": {"a": SFTLoss(normalize="sequence", temperature=0.7)},
    "grpo": {"a": GRPOLoss()},
    "grpo with kl": {"a": GRPOLoss(kl_coef=0.3, dual_clip=1.5)},
    "grpo with entropy": {"a": GRPOLoss(entropy_coef=0.2, temperature=0.7)},
    "grpo by sequence with both": {"a": GRPOLoss(normalize="sequence", kl_coef=0.1, entropy_coef=0.1)},
    "three terms": {
        "a": SFTLoss(coef=0.5),
        "b": GRPOLoss(coef=2.0, normalize="sequence", temperature=0.7, kl_coef=0.2, clip_high=0.28),
        "c": GRPOLoss(entropy_coef=0.1, clip_low=0.1),
    },
}
NO_STEP = torch.nn.Linear(1, 1)


@dataclass
class Result:
    response: ForwardBackwardResponse
    gradients: Gradients


def make_rows(loaded: Loaded, losses: dict[str, LossSpec]) -> list[TrainRow]:
    """Ragged rows that begin with a prompt; of several terms each row has one or two."""
    rng = np.random.default_rng(3)
    names = sorted(losses)
    return [
        make_row(loaded, rng, length, losses, {names[i % len(names)], names[i // 3 % len(names)]})
        for i, length in enumerate(LENGTHS)
    ]


def make_row(
    loaded: Loaded,
    rng: np.random.Generator,
    length: int,
    losses: dict[str, LossSpec],
    present: set[str],
    prompt: np.ndarray | None = None,
) -> TrainRow:
    tokens = rng.integers(1, 180, length)
    prompt = tokens[: max(1, length // 3)] if prompt is None else prompt
    tokens[: len(prompt)] = prompt
    terms = {name: rng.choice([0.0, 1.0, 0.5], length) for name in sorted(present)}
    for weights in terms.values():
        weights[: len(prompt)] = 0.0
        weights[len(prompt)] = weights[-1] = 1.0
    if not any(isinstance(losses[name], GRPOLoss) for name in present):
        return TrainRow(row_id=f"row of {length}", tokens=tokens, terms=terms)
    near = plain_logprobs(loaded, tokens, 0.7) + rng.normal(scale=0.3, size=(2, length))
    near[0, rng.random(length) < 0.3] = np.nan
    return TrainRow(
        row_id=f"row of {length}",
        tokens=tokens,
        terms=terms,
        advantages=rng.normal(size=length),
        sampled_logprobs=near[0] if length > 5 else None,
        reference_logprobs=near[1],
    )


def plain_logprobs(loaded: Loaded, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        table = torch.log_softmax(loaded.model(ids[None]).logits[0] / temperature, -1)
    return np.asarray([0.0, *(table[t - 1, ids[t]].item() for t in range(1, len(ids)))])


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def accumulate(
    loaded: Loaded, losses: dict[str, LossSpec], rows: list[list[TrainRow]], *, counts: Any = None, **config: Any
) -> Result:
    """Gradients of one or more calls on a fresh copy of the model; the response of the last."""
    model = copy.deepcopy(loaded.model)
    trainer = TorchTrainer(model, TrainerConfig.model_validate(config), head=loaded.head)
    for part in rows:
        request = ForwardBackwardRequest(rows=part, losses=losses, counts=counts or {})
        response = trainer.forward_backward(request)
    return Result(response, gradients_of(model))


def assert_same(a: Gradients, b: Gradients, tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=name)


# The gradient, against a plain implementation.


def plain_gradients(loaded: Loaded, losses: dict[str, LossSpec], rows: list[TrainRow]) -> tuple[float, Gradients]:
    """Row by row, token by token, without padding."""
    model = copy.deepcopy(loaded.model)
    total = torch.zeros(())
    for name, spec in losses.items():
        sums = [plain_row(model, spec, row, row.terms[name].tolist()) for row in rows if name in row.terms]
        if spec.normalize == "sequence":
            term = sum(value / count for value, count in sums) / len(sums)
        else:
            term = sum(value for value, _ in sums) / sum(count for _, count in sums)
        total = total + spec.coef * term
    total.backward()
    return total.item(), gradients_of(model)


def plain_row(model: Any, spec: LossSpec, row: TrainRow, weights: list[float]) -> tuple[torch.Tensor, int]:
    """Weighted sum over the row's tokens, and the number of those with weight."""
    ids = torch.from_numpy(row.tokens.array.astype(np.int64))
    table = torch.log_softmax(model(ids[None]).logits[0] / spec.temperature, -1)
    tokens = [t for t, weight in enumerate(weights) if weight]
    return sum((weights[t] * plain_token(spec, row, t, table[t - 1]) for t in tokens), torch.zeros(())), len(tokens)


def plain_token(spec: LossSpec, row: TrainRow, t: int, logprobs_V: torch.Tensor) -> torch.Tensor:
    logprob = logprobs_V[row.tokens.tolist()[t]]
    if isinstance(spec, SFTLoss):
        return -logprob
    old = row.sampled_logprobs.tolist()[t] if row.sampled_logprobs is not None else math.nan
    ratio = torch.exp(logprob - (logprob.item() if math.isnan(old) else old))
    advantage = row.advantages.tolist()[t]
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high))
    if advantage < 0:
        loss = loss.clamp(max=-spec.dual_clip * advantage)
    gap = row.reference_logprobs.tolist()[t] - logprob
    entropy = -(logprobs_V.exp() * logprobs_V).sum()
    return loss + spec.kl_coef * (gap.exp() - gap - 1) - spec.entropy_coef * entropy


@pytest.mark.parametrize("case", LOSSES)
def test_gradients_are_those_of_a_plain_loop(case: str, llama: Loaded) -> None:
    losses, rows = LOSSES[case], make_rows(llama, LOSSES[case])
    result = accumulate(llama, losses, [rows], micro_batch_tokens=30)
    loss, gradients = plain_gradients(llama, losses, rows)
    assert result.response.loss == pytest.approx(loss, abs=1e-5)
    assert_same(result.gradients, gradients)


def test_gradients_of_every_architecture_are_those_of_a_plain_loop(loaded: Loaded) -> None:
    losses, rows = LOSSES["three terms"], make_rows(loaded, LOSSES["three terms"])
    loss, gradients = plain_gradients(loaded, losses, rows)
    for checkpointing in (False, True):
        result = accumulate(loaded, losses, [rows], micro_batch_tokens=30, gradient_checkpointing=checkpointing)
        assert result.response.loss == pytest.approx(loss, abs=1e-5)
        assert_same(result.gradients, gradients)


def rows_of_two_prompts(loaded: Loaded, losses: dict[str, LossSpec]) -> list[TrainRow]:
    """Four rows of each of two prompts in turn, and one of its own."""
    rng = np.random.default_rng(5)
    names = sorted(losses)
    prompts = rng.integers(1, 180, (3, 20))
    return [
        make_row(loaded, rng, 20 + length, losses, {names[i % len(names)]}, prompts[i % 2 if i < 8 else 2])
        for i, length in enumerate([5, 12, 3, 9, 12, 2, 7, 4, 6])
    ]


@pytest.mark.parametrize("case", LOSSES)
def test_gradients_with_a_shared_prompt_are_those_of_a_plain_loop(case: str, llama: Loaded) -> None:
    losses, rows = LOSSES[case], rows_of_two_prompts(llama, LOSSES[case])
    loss, gradients = plain_gradients(llama, losses, rows)
    for checkpointing in (False, True):
        result = accumulate(llama, losses, [rows], micro_batch_tokens=70, gradient_checkpointing=checkpointing)
        assert result.response.loss == pytest.approx(loss, abs=1e-5)
        assert_same(result.gradients, gradients, tolerance=2e-5)
    assert result.response.micro_batches == 3


def test_a_shared_prompt_is_computed_once(llama: Loaded, forward_calls: Callable[[Any], Any]) -> None:
    rows = rows_of_two_prompts(llama, LOSSES["sft"])[:8]
    model = copy.deepcopy(llama.model)
    with forward_calls(model) as calls:
        TorchTrainer(model, TrainerConfig()).forward_backward(ForwardBackwardRequest(rows=rows, losses=LOSSES["sft"]))
    own = [[len(row.tokens) - 20 for row in rows[i::2]] for i in range(2)]
    assert [tuple(call["input_ids"].shape) for call in calls] == [(1, 20 + sum(lengths)) for lengths in own]


# However the batch is cut.


def budget_for(pieces: int) -> int:
    return next(budget for budget in range(100, 0, -1) if len(by_length(LENGTHS, budget)) == pieces)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_gradients_do_not_depend_on_the_cut(case: str, checkpointing: bool, llama: Loaded) -> None:
    losses, rows = LOSSES[case], make_rows(llama, LOSSES[case])
    whole, *cut = (
        accumulate(llama, losses, [rows], micro_batch_tokens=budget_for(pieces), gradient_checkpointing=checkpointing)
        for pieces in (1, 2, 7)
    )
    assert [result.response.micro_batches for result in (whole, *cut)] == [1, 2, 7]
    for result in cut:
        assert_same(result.gradients, whole.gradients)
        assert result.response.loss == pytest.approx(whole.response.loss, abs=1e-5)
        for name, report in result.response.terms.items():
            assert report.count == whole.response.terms[name].count
            # Of a metric of about 100, float32 itself has steps of 1e-5.
            assert report.metrics == pytest.approx(whole.response.terms[name].metrics, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("case", LOSSES)
def test_one_batch_over_two_calls_with_its_counts(case: str, llama: Loaded) -> None:
    losses, rows = LOSSES[case], make_rows(llama, LOSSES[case])
    counts = term_counts(ForwardBackwardRequest(rows=rows, losses=losses))
    whole = accumulate(llama, losses, [rows])
    assert_same(accumulate(llama, losses, [rows[:3], rows[3:]], counts=counts).gradients, whole.gradients)
    parts = [accumulate(llama, losses, [part], counts=counts).response.loss for part in (rows[:3], rows[3:])]
    assert sum(parts) == pytest.approx(whole.response.loss, abs=1e-5)


def test_a_count_of_zero_is_right_for_a_term_without_tokens(llama: Loaded) -> None:
    losses, rows = {"a": SFTLoss(), "unused": SFTLoss()}, make_rows(llama, LOSSES["sft"])
    report = accumulate(llama, losses, [rows], counts={"a": 9, "unused": 0}).response.terms["unused"]
    assert (report.loss, report.count) == (0, 0)


def test_calls_without_counts_are_batches_of_their_own(llama: Loaded) -> None:
    losses, rows = LOSSES["sft"], make_rows(llama, LOSSES["sft"])
    first, second, both = (
        accumulate(llama, losses, parts) for parts in ([rows[:3]], [rows[3:]], [rows[:3], rows[3:]])
    )
    assert_same(both.gradients, {k: v + second.gradients[k] for k, v in first.gradients.items()})


def test_checkpointing_recomputes_the_layers(llama: Loaded) -> None:
    calls = []
    losses, rows = LOSSES["sft"], make_rows(llama, LOSSES["sft"])[:1]
    for checkpointing in (False, True):
        model = copy.deepcopy(llama.model)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        trainer = TorchTrainer(model, TrainerConfig(gradient_checkpointing=checkpointing))
        trainer.forward_backward(ForwardBackwardRequest(rows=rows, losses=losses))
    assert len(calls) == 1 + 2


# What is reported.


def test_reports_name_counts_tokens_and_weighted_means(llama: Loaded) -> None:
    losses: dict[str, LossSpec] = {"text": SFTLoss(), "style": SFTLoss(normalize="sequence"), "unused": SFTLoss()}
    rows = [
        TrainRow(row_id="a", tokens=[5, 6, 7, 8], terms={"text": [0, 0, 1, 0.5]}),
        TrainRow(row_id="b", tokens=[5, 9, 7], terms={"style": [0, 2, 1], "text": [0, 0, 0]}),
        TrainRow(row_id="c", tokens=[5, 9], terms={"style": [0, 1]}),
    ]
    response = accumulate(llama, losses, [rows]).response
    p = {row.row_id: -plain_logprobs(llama, row.tokens.array) for row in rows}
    terms = response.terms
    assert {name: report.count for name, report in terms.items()} == {"text": 2, "style": 2, "unused": 0}
    assert terms["text"].loss == pytest.approx((p["a"][2] + 0.5 * p["a"][3]) / 2, abs=1e-5)
    assert terms["style"].loss == pytest.approx(((2 * p["b"][1] + p["b"][2]) / 2 + p["c"][1]) / 2, abs=1e-5)
    assert terms["unused"].loss == 0
    assert response.loss == pytest.approx(terms["text"].loss + terms["style"].loss)
    assert (response.tokens, response.micro_batches) == (9, 1)


def test_metrics_are_means_over_the_terms_tokens(llama: Loaded) -> None:
    tokens = np.asarray([5, 6, 7, 8])
    on = TrainRow(row_id="a", tokens=tokens, terms={"a": [0, 0, 1, 0.5]}, advantages=[9, 9, 1, 1])
    ratios = np.log([1, 99, 1.1, 1.5])
    off = TrainRow.model_validate(dict(on) | {"sampled_logprobs": plain_logprobs(llama, tokens) - ratios})
    metrics = accumulate(llama, {"a": GRPOLoss()}, [[off]]).response.terms["a"].metrics
    assert metrics["ratio"] == pytest.approx(1.3, abs=1e-4)
    assert metrics["clip_share"] == 0.5
    assert metrics["sampler_gap"] == pytest.approx((math.log(1.1) + math.log(1.5)) / 2, abs=1e-4)
    metrics = accumulate(llama, {"a": GRPOLoss()}, [[on]]).response.terms["a"].metrics
    assert (metrics["ratio"], metrics["clip_share"], metrics["sampler_gap"]) == (1.0, 0.0, 0.0)


def test_only_wanted_positions_go_through_the_output_layer(llama: Loaded) -> None:
    shapes = []
    model = copy.deepcopy(llama.model)
    model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    weights = np.zeros(40)
    weights[-3:] = 1
    row = TrainRow(row_id="long prompt", tokens=np.arange(1, 41), terms={"a": weights})
    TorchTrainer(model, TrainerConfig()).forward_backward(ForwardBackwardRequest(rows=[row], losses={"a": SFTLoss()}))
    assert shapes == [(1, 3, 182)]


# What is refused, and what is left after a failure.


PLAIN = {"row_id": "r1", "tokens": [1, 2, 3], "terms": {"a": [0, 1, 1]}}


@pytest.mark.parametrize(
    ("row", "spec", "counts", "message"),
    [
        (PLAIN, GRPOLoss(), {}, r"row 'r1': the term 'a' .* advantages"),
        (
            PLAIN | {"advantages": [0, 1, 1]},
            GRPOLoss(kl_coef=0.1),
            {},
            r"row 'r1': the term 'a' .* reference_logprobs",
        ),
        (PLAIN | {"terms": {"a": [0, 0, 0]}}, SFTLoss(), {}, r"rows: .* nothing to learn"),
        (PLAIN | {"terms": {}}, SFTLoss(), {}, r"rows: .* nothing to learn"),
        (PLAIN, SFTLoss(), {"b": 3.0}, r"counts\['b'\]: got 3.0"),
        (PLAIN, SFTLoss(), {"a": 0.0}, r"counts\['a'\]: got 0.0"),
        (PLAIN, SFTLoss(), {"a": math.nan}, r"counts\['a'\]: got nan"),
    ],
)
def test_batches_that_make_no_sense(
    row: dict[str, Any], spec: LossSpec, counts: dict[str, float], message: str, llama: Loaded
) -> None:
    with pytest.raises(BadInput, match=message):
        accumulate(llama, {"a": spec}, [[TrainRow.model_validate(row)]], counts=counts)


def test_a_failure_in_the_middle_leaves_no_gradient_and_no_training_mode(llama: Loaded) -> None:
    model = copy.deepcopy(llama.model)
    trainer = TorchTrainer(model, TrainerConfig(micro_batch_tokens=1))
    seen: list[int] = []

    def fail_at_the_third(*_: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(fail_at_the_third)
    request = ForwardBackwardRequest(rows=make_rows(llama, LOSSES["sft"]), losses=LOSSES["sft"])
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.forward_backward(request)
    assert not model.training and not gradients_of(model)
    hook.remove()
    trainer.forward_backward(request)
    assert_same(gradients_of(model), accumulate(llama, LOSSES["sft"], [request.rows]).gradients)


def test_rows_without_weights_in_a_micro_batch_of_their_own(llama: Loaded) -> None:
    rows = make_rows(llama, LOSSES["sft"])
    silent = TrainRow(row_id="silent", tokens=[4] * 20, terms={"a": [0] * 20})
    whole = accumulate(llama, LOSSES["sft"], [rows])
    assert_same(accumulate(llama, LOSSES["sft"], [[silent, *rows]], micro_batch_tokens=1).gradients, whole.gradients)


def test_dropout_depends_on_seed_and_version_alone(llama: Loaded) -> None:
    def run(seed: int, version: int) -> Gradients:
        torch.manual_seed(int(torch.randint(1 << 30, ())))
        model = copy.deepcopy(llama.model)
        model.model.layers[0].mlp.register_forward_hook(
            lambda module, _, output: torch.nn.functional.dropout(output, 0.5, module.training)
        )
        trainer = TorchTrainer(model, TrainerConfig(), seed=seed)
        trainer.version = version
        before = torch.get_rng_state()
        trainer.forward_backward(ForwardBackwardRequest(rows=make_rows(llama, LOSSES["sft"]), losses=LOSSES["sft"]))
        assert torch.equal(before, torch.get_rng_state())
        return gradients_of(model)

    assert_same(run(1, 5), run(1, 5), tolerance=0)
    for other in (run(2, 5), run(1, 6)):
        with pytest.raises(AssertionError):
            assert_same(run(1, 5), other)


# The optimiser.


def linear_trainer(**config: Any) -> tuple[torch.nn.Linear, TorchTrainer]:
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(2, 3) / 4)
        model.bias.fill_(0.5)
    return model, TorchTrainer(model, TrainerConfig.model_validate(config))


def step(model: torch.nn.Linear, trainer: TorchTrainer, gradient: float = 1.0, **request: Any) -> Any:
    """One step with this value in the whole gradient, which has 8 entries."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    return trainer.optim_step(OptimStepRequest.model_validate(request))


def adamw(gradients: list[float], weights: np.ndarray, config: TrainerConfig) -> Iterator[tuple[float, np.ndarray]]:
    """Norm before clipping and weights after each step, by the formulas of the AdamW paper, algorithm 2."""
    (beta1, beta2), first, second = config.betas, 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        norm = abs(gradient) * math.sqrt(weights.size)
        gradient *= min(1.0, config.grad_clip / (norm + 1e-6))
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        update = first / (1 - beta1**t) / (math.sqrt(second / (1 - beta2**t)) + 1e-8)
        weights = weights - config.learning_rate * (update + config.weight_decay * weights)
        yield norm, weights


def test_steps_are_those_of_adamw_with_clipping() -> None:
    options = {"learning_rate": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.95), "grad_clip": 2.0}
    model, trainer = linear_trainer(**options)
    gradients = [0.1, 5.0, -0.5, 40.0]
    weights = torch.cat([model.weight.flatten(), model.bias]).detach().numpy().astype(np.float64)
    expected = adamw(gradients, weights, TrainerConfig.model_validate(options))
    for i, (gradient, (norm, weights)) in enumerate(zip(gradients, expected, strict=True), 1):
        response = step(model, trainer, gradient)
        assert response.grad_norm == pytest.approx(norm, rel=1e-5)
        assert (response.version, trainer.version, response.learning_rate) == (i, i, 0.1)
        after = torch.cat([model.weight.flatten(), model.bias]).detach().numpy()
        np.testing.assert_allclose(after, weights, atol=1e-5)
        assert model.weight.grad is None


SCHEDULES = {
    "constant": [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1],
    "linear": [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0, 0],
    "cosine": [0, 0.25, 0.5, 0.75, 1, 0.853553, 0.5, 0.146447, 0, 0, 0, 0],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_of_the_schedules(name: str) -> None:
    model, trainer = linear_trainer(learning_rate=0.02, schedule=name, warmup_steps=4, total_steps=8)
    rates = [step(model, trainer).learning_rate for _ in SCHEDULES[name]]
    assert rates == pytest.approx([0.02 * share for share in SCHEDULES[name]], abs=1e-8)


def test_schedules_without_warm_up_start_at_the_peak() -> None:
    for name, second in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        config = TrainerConfig.model_validate({"schedule": name, "total_steps": 2})
        assert [rate_share(config, i) for i in range(2)] == [1.0, pytest.approx(second)]


def test_a_given_learning_rate_holds_for_one_step() -> None:
    model, trainer = linear_trainer(learning_rate=0.02, schedule="linear", total_steps=4)
    rates = [step(model, trainer, learning_rate=given).learning_rate for given in (None, 7.0, None, 0.0, None)]
    assert rates == pytest.approx([0.02, 7.0, 0.01, 0.0, 0.0])


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    model, trainer = linear_trainer(learning_rate=0.02, weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    assert step(model, trainer, learning_rate=0.0).version == 1
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    (model, trainer), (twin, twin_trainer) = (linear_trainer(learning_rate=0.1, warmup_steps=2) for _ in range(2))
    for pair in ((model, trainer), (twin, twin_trainer)):
        step(*pair)
    with pytest.raises(Corrupt, match=r"version 1 has norm (nan|inf)"):
        step(model, trainer, bad)
    assert model.weight.grad is None and trainer.version == 1
    assert torch.equal(model.weight, twin.weight)
    assert step(model, trainer).model_dump() == step(twin, twin_trainer).model_dump()
    assert torch.equal(model.weight, twin.weight)


# The direction.


def train(loaded: Loaded, loss: LossSpec, metric: Callable[[ForwardBackwardResponse], float]) -> tuple[float, float]:
    """The metric on a batch before and after six steps."""
    model = copy.deepcopy(loaded.model)
    trainer = TorchTrainer(model, TrainerConfig(learning_rate=3e-3, weight_decay=0.0))
    advantages = [0, 0, 1, 1, -1, -1]
    row = TrainRow(row_id="a", tokens=[3, 9, 27, 81, 5, 15], terms={"a": [0, 0, 1, 1, 1, 1]}, advantages=advantages)
    request = ForwardBackwardRequest(rows=[row], losses={"a": loss})
    values = []
    for _ in range(7):
        values.append(metric(trainer.forward_backward(request)))
        trainer.optim_step(OptimStepRequest())
    return values[0], values[-1]


def entropy(response: ForwardBackwardResponse) -> float:
    return response.terms["a"].metrics["entropy"]


def test_training_lowers_the_loss_and_the_bonus_raises_entropy(llama: Loaded) -> None:
    first, last = train(llama, SFTLoss(), lambda response: response.loss)
    assert last < first - 0.1
    without = train(llama, GRPOLoss(), entropy)[1]
    first, last = train(llama, GRPOLoss(entropy_coef=10.0), entropy)
    assert last > first and last > without


def test_positive_advantages_make_tokens_likelier(llama: Loaded) -> None:
    model = copy.deepcopy(llama.model)
    trainer = TorchTrainer(model, TrainerConfig(learning_rate=3e-3))
    row = TrainRow(row_id="a", tokens=[3, 9, 27, 81], terms={"a": [0, 0, 1, 1]}, advantages=[0, 0, 1, -1])
    before = plain_logprobs(llama, row.tokens.array)
    trainer.forward_backward(ForwardBackwardRequest(rows=[row], losses={"a": GRPOLoss()}))
    trainer.optim_step(OptimStepRequest())
    change = plain_logprobs(Loaded(model, None, [], 64, True), row.tokens.array) - before
    assert change[2] > 0 > change[3]
