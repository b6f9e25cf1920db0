"""Loss terms through the trainer: each against its formula, whatever way a batch is cut; and what is refused."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig

from actors.policy import forward
from actors.policy.forward import log_softmax, logprobs_and_entropy, token_scores
from actors.policy.loading import Loaded, load
from actors.policy.microbatch import by_pair, pad_right
from actors.policy.terms import evaluate, token_batch
from actors.policy.torch_trainer import TorchTrainer
from methods.advantages import normalised
from protocols.errors import BadInput
from protocols.losses import (
    DPOLoss,
    GatedLoss,
    GRPOLoss,
    ImplicitOutcomeLoss,
    LossSpec,
    ORPOLoss,
    OutcomeLoss,
    QFunctionLoss,
    ReinforceLoss,
    SFTLoss,
    StepsLoss,
    ValueLoss,
)
from protocols.model import Head, TrainerConfig
from protocols.reward_model import RewardModelConfig
from protocols.training import ForwardBackwardRequest, TermReport, TrainRow
from tests.actors.test_torch_trainer import Gradients, accumulate, assert_same, gradients_of, plain_logprobs

OVER_PAIRS = (DPOLoss, ORPOLoss, QFunctionLoss, OutcomeLoss, GatedLoss)
SCALAR: dict[str, LossSpec] = {
    "q_function": QFunctionLoss(beta=0.7, gamma=0.5),
    "outcome": OutcomeLoss(),
    "gated": GatedLoss(),
    "steps": StepsLoss(),
    "value": ValueLoss(),
    "value with a clip": ValueLoss(clip=0.3),
}
VOCABULARY: dict[str, LossSpec] = {
    "dpo": DPOLoss(beta=0.2, temperature=0.7),
    "orpo": ORPOLoss(ratio_coef=0.7, temperature=0.8),
    "implicit outcome": ImplicitOutcomeLoss(),
    "reinforce": ReinforceLoss(),
    "reinforce with kl and entropy": ReinforceLoss(
        kl_coef=0.3, entropy_coef=0.1, normalize="sequence", temperature=0.7
    ),
}
CASES = SCALAR | VOCABULARY


@pytest.fixture(scope="module")
def scalar(model_dirs: dict[str, Path]) -> Loaded:
    """The model of `llama` with a head that gives one number per token. Tests only run it."""
    return load(RewardModelConfig(model=str(model_dirs["llama"]), device="cpu"))


def model_for(spec: LossSpec, llama: Loaded, scalar: Loaded) -> Loaded:
    return llama if spec in VOCABULARY.values() else scalar


def rows_for(loaded: Loaded, *specs: LossSpec) -> list[TrainRow]:
    """Pairs of ragged rows, of which neighbours do not belong together; term i is of `specs[i]`."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(5):
        prompt = rng.integers(1, 180, rng.integers(1, 9))
        for side in (1.0, -1.0):
            reply = rng.integers(1, 180, rng.integers(1, 12))
            tokens, length = np.r_[prompt, reply], len(prompt) + len(reply)
            near = plain_logprobs(loaded, tokens, 0.7) if loaded.head == "vocabulary" else np.zeros(length)
            rows.append(
                TrainRow(
                    row_id=f"{i} {side}",
                    tokens=tokens,
                    terms={f"term {j}": weights(spec, side, length, len(reply), rng) for j, spec in enumerate(specs)},
                    pair=f"pair {i}",
                    advantages=rng.normal(size=length),
                    reference_logprobs=near + rng.normal(scale=0.5, size=length),
                    targets=rng.normal(size=length),
                    old_scores=rng.normal(size=length),
                )
            )
    return rows[::2] + rows[:0:-2]


def weights(spec: LossSpec, side: float, length: int, reply: int, rng: np.random.Generator) -> np.ndarray:
    found = np.zeros(length)
    signed = isinstance(spec, (*OVER_PAIRS, ImplicitOutcomeLoss))
    found[-reply:] = side if signed else rng.choice([0.0, 0.5, 1.0], reply)
    found[-1] = found[-1] or 1.0
    return found


# Plain implementations: row by row, without padding.

Seen = dict[str, torch.Tensor]
"""Scores or log-probs and entropies of a row's tokens, float32[T]."""


def seen(model: Any, row: TrainRow, spec: LossSpec, head: Head) -> Seen:
    ids = torch.from_numpy(row.tokens.array.astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0]
    if head == "scalar":
        return {"scores": logits[:, 0]}
    table = torch.log_softmax(logits[:-1] / spec.temperature, -1)
    start = torch.zeros(1)
    return {
        "logprobs": torch.cat([start, table.gather(-1, ids[1:, None])[:, 0]]),
        "entropy": torch.cat([start, -(table.exp() * table).sum(-1)]),
    }


def minus_log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(torch.zeros(()), -x)


def plain_loss(spec: LossSpec, rows: Sequence[TrainRow], found: Sequence[Seen], term: str) -> torch.Tensor:
    masks = [torch.from_numpy(row.terms[term].array != 0) for row in rows]
    if isinstance(spec, OVER_PAIRS):
        margins = [margin for margin, _ in margins_of(spec, rows, found, term)]
        compared = torch.stack([minus_log_sigmoid(margin) for margin in margins]).mean()
        if not isinstance(spec, ORPOLoss):
            return compared
        better = [row.terms[term].array.sum() > 0 for row in rows]
        kept = zip(found, masks, better, strict=True)
        means = [one["logprobs"][mask].mean() for one, mask, is_better in kept if is_better]
        return spec.ratio_coef * compared - torch.stack(means).mean()
    if isinstance(spec, ImplicitOutcomeLoss):
        sums = [
            (one["logprobs"] - tensor(row.reference_logprobs))[mask].sum()
            for row, one, mask in zip(rows, found, masks, strict=True)
        ]
        signs = [float(row.terms[term].array[-1]) for row in rows]
        return torch.stack([minus_log_sigmoid(sign * total) for sign, total in zip(signs, sums, strict=True)]).mean()
    losses = [
        (tensor(row.terms[term]) * plain_token_loss(spec, row, one))[mask]
        for row, one, mask in zip(rows, found, masks, strict=True)
    ]
    if isinstance(spec, StepsLoss) or getattr(spec, "normalize", "") == "sequence":
        return torch.stack([loss.mean() for loss in losses]).mean()
    return torch.cat(losses).mean()


def margins_of(
    spec: LossSpec, rows: Sequence[TrainRow], found: Sequence[Seen], term: str
) -> list[tuple[torch.Tensor, float]]:
    """Of each pair the argument of the sigmoid, and by how much the better reply scores more than the worse."""
    replies: dict[tuple[str, bool], torch.Tensor] = {}
    for row, one in zip(rows, found, strict=True):
        signs = row.terms[term].array
        if isinstance(spec, DPOLoss):
            values = one["logprobs"] - tensor(row.reference_logprobs)
        else:
            values = one["logprobs"] if isinstance(spec, ORPOLoss) else one["scores"]
        replies[row.pair, bool(signs.sum() > 0)] = values[torch.from_numpy(signs != 0)]
    margins = []
    for pair in sorted({row.pair for row in rows}):
        better, worse = replies[pair, True], replies[pair, False]
        match spec:
            case DPOLoss():
                margin, factor, offset = better.sum() - worse.sum(), spec.beta, 0.0
            case ORPOLoss():
                chosen, rejected = better.mean(), worse.mean()
                odds = [p / (1 - p) for p in (chosen.exp(), rejected.exp())]
                margins.append((odds[0].log() - odds[1].log(), (chosen - rejected).item()))
                continue
            case QFunctionLoss():
                margin, factor, offset = better.mean() - worse.mean(), spec.beta, spec.gamma
            case OutcomeLoss():
                margin, factor, offset = better[-1] - worse[-1], 1.0, 0.0
            case _:
                margin = better.sigmoid().mean() - worse.sigmoid().mean()
                factor, offset = (len(better) + len(worse)) / 2, 0.0
        margins.append((factor * margin - offset, margin.item()))
    return margins


def plain_token_loss(spec: LossSpec, row: TrainRow, one: Seen) -> torch.Tensor:
    if isinstance(spec, ReinforceLoss):
        gap = tensor(row.reference_logprobs) - one["logprobs"]
        kl = gap.exp() - gap - 1
        return -tensor(row.advantages) * one["logprobs"] + spec.kl_coef * kl - spec.entropy_coef * one["entropy"]
    scores, targets, old = one["scores"], tensor(row.targets), tensor(row.old_scores)
    if isinstance(spec, StepsLoss):
        return (scores.tanh() - targets) ** 2
    clipped = torch.minimum(torch.maximum(scores, old - spec.clip), old + spec.clip) if spec.clip else scores
    return torch.maximum((scores - targets) ** 2, (clipped - targets) ** 2)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values.tolist())


def plain(loaded: Loaded, losses: dict[str, LossSpec], rows: Sequence[TrainRow]) -> tuple[float, Gradients]:
    """The loss of all terms and its gradients."""
    model = copy.deepcopy(loaded.model)
    total = torch.zeros(())
    for term, spec in losses.items():
        having = [row for row in rows if term in row.terms]
        found = [seen(model, row, spec, loaded.head) for row in having]
        total = total + spec.coef * plain_loss(spec, having, found, term)
    total.backward()
    return total.item(), gradients_of(model)


# The loss and its gradient.


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_formula(case: str, llama: Loaded, scalar: Loaded) -> None:
    loaded, losses = model_for(CASES[case], llama, scalar), {"term 0": CASES[case]}
    rows = rows_for(loaded, CASES[case])
    result = accumulate(loaded, losses, [rows], micro_batch_tokens=60)
    loss, gradients = plain(loaded, losses, rows)
    assert result.response.loss == pytest.approx(loss, abs=1e-5)
    assert_same(result.gradients, gradients, tolerance=2e-5)
    assert result.response.micro_batches > 1


@pytest.mark.parametrize("names", [("q_function", "value", "steps"), ("dpo", "reinforce", "implicit outcome")])
def test_several_terms_add_up(names: Sequence[str], llama: Loaded, scalar: Loaded) -> None:
    specs = [CASES[name].model_copy(update={"coef": 0.5 + i}) for i, name in enumerate(names)]
    losses = {f"term {i}": spec for i, spec in enumerate(specs)}
    loaded = scalar if names[0] in SCALAR else llama
    rows = rows_for(loaded, *specs)
    # The last term is of some rows only, and one row of no pair at all.
    rows[2].terms.pop("term 2")
    rows.append(
        TrainRow.model_validate(
            dict(rows[0]) | {"row_id": "alone", "pair": "", "terms": {"term 1": rows[0].terms["term 1"]}}
        )
    )
    result = accumulate(loaded, losses, [rows], micro_batch_tokens=60)
    loss, gradients = plain(loaded, losses, rows)
    assert result.response.loss == pytest.approx(loss, abs=1e-5)
    assert_same(result.gradients, gradients, tolerance=2e-5)


@pytest.mark.parametrize("case", [case for case, spec in CASES.items() if isinstance(spec, OVER_PAIRS)])
def test_reports_over_pairs(case: str, llama: Loaded, scalar: Loaded) -> None:
    loaded, spec = model_for(CASES[case], llama, scalar), CASES[case]
    rows = rows_for(loaded, spec)
    with torch.no_grad():
        found = [seen(loaded.model, row, spec, loaded.head) for row in rows]
        margins = [margin for _, margin in margins_of(spec, rows, found, "term 0")]
    report = accumulate(loaded, {"term 0": spec}, [rows], micro_batch_tokens=60).response.terms["term 0"]
    assert report.count == 5
    assert report.metrics == {
        "margin": pytest.approx(np.mean(margins), abs=1e-5),
        "accuracy": pytest.approx(np.mean([margin > 0 for margin in margins])),
    }
    assert 0 < report.metrics["accuracy"] < 1, "a batch that tells nothing"


@pytest.mark.parametrize(("case", "counted"), [("implicit outcome", "rows"), ("steps", "rows"), ("value", "tokens")])
def test_counts_of_other_terms(case: str, counted: str, llama: Loaded, scalar: Loaded) -> None:
    loaded, spec = model_for(CASES[case], llama, scalar), CASES[case]
    rows = rows_for(loaded, spec)
    tokens = sum(np.count_nonzero(row.terms["term 0"].array) for row in rows)
    report = accumulate(loaded, {"term 0": spec}, [rows]).response.terms["term 0"]
    assert report.count == (10 if counted == "rows" else tokens)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [1, 40])
def test_the_cut_does_not_matter(case: str, budget: int, llama: Loaded, scalar: Loaded) -> None:
    loaded, losses = model_for(CASES[case], llama, scalar), {"term 0": CASES[case]}
    rows = rows_for(loaded, CASES[case])
    silent = TrainRow(row_id="silent", tokens=[3, 4], terms={})
    whole = accumulate(loaded, losses, [[*rows, silent]], micro_batch_tokens=10_000)
    result = accumulate(loaded, losses, [[*rows, silent]], micro_batch_tokens=budget)
    assert whole.response.micro_batches == 1 < result.response.micro_batches
    assert result.response.loss == pytest.approx(whole.response.loss, abs=1e-5)
    assert result.response.terms["term 0"].metrics == pytest.approx(whole.response.terms["term 0"].metrics, abs=1e-5)
    assert_same(result.gradients, whole.gradients)


@pytest.mark.parametrize("case", CASES)
def test_what_stands_in_padding_does_not_matter(
    case: str, llama: Loaded, scalar: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, losses = model_for(CASES[case], llama, scalar), {"term 0": CASES[case]}
    rows = rows_for(loaded, CASES[case])
    plain = accumulate(loaded, losses, [rows])
    monkeypatch.setattr(forward, "pad_right", lambda rows: pad_right(rows, 77))
    other = accumulate(loaded, losses, [rows])
    assert other.response.loss == pytest.approx(plain.response.loss, abs=1e-6)
    assert_same(other.gradients, plain.gradients, tolerance=1e-6)


@pytest.mark.parametrize(("case", "matters"), [("q_function", False), ("outcome", False), ("gated", True)])
def test_the_level_of_the_scores(case: str, matters: bool, scalar: Loaded) -> None:
    losses, rows = {"term 0": SCALAR[case]}, rows_for(scalar, SCALAR[case])
    raised = copy.copy(scalar)
    raised.model = copy.deepcopy(scalar.model)
    raised.model.score.bias = torch.nn.Parameter(torch.tensor([5.0]))
    before, after = (accumulate(loaded, losses, [rows]) for loaded in (scalar, raised))
    assert (abs(after.response.loss - before.response.loss) > 0.01) == matters
    # Nothing pulls the level anywhere.
    assert (abs(after.gradients["score.bias"].item()) > 1e-3) == matters


# Scores.


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2"])
def test_scores_in_batches_are_those_of_rows_alone(name: str, model_dirs: dict[str, Path]) -> None:
    loaded = load(RewardModelConfig(model=str(model_dirs[name]), device="cpu"))
    model, rows = loaded.model, [row.tokens.array for row in rows_for(loaded)]
    with torch.no_grad():
        alone = [model(input_ids=torch.from_numpy(row.astype(np.int64))[None]).logits[0, :, 0] for row in rows]
    for budget in (1, 40, 10_000):
        for found, expected in zip(token_scores(model, rows, budget), alone, strict=True):
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@settings(max_examples=30)
@given(
    tokens=st.lists(st.integers(1, 179), min_size=2, max_size=30),
    more=st.lists(st.integers(1, 179), max_size=20),
    place=st.integers(0, 29),
)
def test_scores_do_not_depend_on_later_tokens(tokens: list[int], more: list[int], place: int, scalar: Loaded) -> None:
    kept = 1 + place % len(tokens)
    both = [np.asarray(tokens, np.int32), np.asarray(tokens[:kept] + more, np.int32)]
    one, other = token_scores(scalar.model, both, 10_000)
    np.testing.assert_allclose(one[:kept], other[:kept], atol=1e-5)


# The worked numbers of Q-RM's specification, section 5.4, through the trainer.


class LookUp(torch.nn.Module):
    """What comes out at a token depends on that token alone: scores [V, 1], or logits [V, V] of the next one."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = PretrainedConfig()
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids][:, logits_to_keep])


def trained(model: LookUp, head: Head, spec: LossSpec, rows: list[dict[str, Any]]) -> TermReport:
    request = ForwardBackwardRequest(rows=[TrainRow.model_validate(row) for row in rows], losses={"a": spec})
    return TorchTrainer(model, TrainerConfig(), head=head).forward_backward(request).terms["a"]


def over_scores(
    spec: LossSpec, *replies: tuple[list[float], list[float]], **arrays: list[float]
) -> tuple[list[list[float]], TermReport]:
    """Gradients by the scores of replies, and the report. A reply has scores and weights; all are one pair.

    Every token of every reply is a token of its own; token 0 is the prompt. `arrays` are of the one reply.
    """
    scores = [score for reply, _ in replies for score in reply]
    model = LookUp(torch.tensor([9.0, *scores])[:, None])
    places = np.split(np.arange(1, len(scores) + 1), np.cumsum([len(reply) for reply, _ in replies])[:-1])
    rows = [
        {"row_id": str(i), "tokens": [0, *ids.tolist()], "terms": {"a": [0.0, *weights]}, "pair": "p"}
        | {name: [math.nan, *values] for name, values in arrays.items()}
        for i, (ids, (_, weights)) in enumerate(zip(places, replies, strict=True))
    ]
    report = trained(model, "scalar", spec, rows)
    gradient = model.table.grad
    assert gradient is not None and gradient[0] == 0
    return [gradient[ids, 0].tolist() for ids in places], report


def over_logprobs(
    spec: LossSpec, *replies: tuple[list[float], float], **arrays: list[list[float]]
) -> tuple[list[list[float]], TermReport]:
    """Gradients by the log-probs of replies, and the report. A reply has log-probs, and the weight of its tokens.

    Each begins with a prompt of its own. After a token come the reply's next one, or token 0. `arrays` are one per
    reply.
    """
    count = 1 + sum(1 + len(logprobs) for logprobs, _ in replies)
    table, places = torch.full((count, count), -1e4), []
    rows: list[dict[str, Any]] = []
    for i, (logprobs, weight) in enumerate(replies):
        ids = np.arange(len(logprobs) + 1) + 1 + sum(len(place) + 1 for place in places)
        places.append(ids[:-1])
        table[ids[:-1], ids[1:]] = torch.tensor(logprobs, dtype=torch.float32)
        table[ids[:-1], 0] = torch.log1p(-table[ids[:-1], ids[1:]].exp())
        terms = {"a": [0.0, *[weight] * len(logprobs)]}
        given = {name: [math.nan, *values[i]] for name, values in arrays.items()}
        rows.append({"row_id": str(i), "tokens": ids, "terms": terms, "pair": "p" * (len(replies) > 1)} | given)
    model = LookUp(table)
    report = trained(model, "vocabulary", spec, rows)
    gradient = model.table.grad
    assert gradient is not None
    # A logit moves its own log-prob by 1 - p.
    return [(gradient[ids, ids + 1] / (1 - table[ids, ids + 1].exp())).tolist() for ids in places], report


def approx(*values: float) -> Any:
    return pytest.approx(list(values), abs=1e-6)


def test_the_q_function_of_the_specification() -> None:
    (better, worse), report = over_scores(QFunctionLoss(), ([4, 8, 6], [1] * 3), ([-2, 0], [-1] * 2))
    assert report.loss == pytest.approx(1.037488, abs=1e-6)
    assert report.metrics == {"margin": pytest.approx(7), "accuracy": 1}
    assert better == approx(*[-0.043044] * 3)
    assert worse == approx(*[0.064566] * 2)


def test_the_q_function_of_equal_means() -> None:
    _, report = over_scores(QFunctionLoss(), ([1, 3], [1, 1]), ([2], [-1]))
    assert report.loss == pytest.approx(2.126928, abs=1e-6)
    assert report.metrics == {"margin": 0, "accuracy": 0.5}


def test_the_outcome_reward_of_the_specification() -> None:
    (better, worse), report = over_scores(OutcomeLoss(), ([4, 8, 6], [1] * 3), ([-2, 0], [-1] * 2))
    assert report.loss == pytest.approx(0.002476, abs=1e-6)
    # 1 - sigmoid(6)
    assert better == approx(0, 0, -0.002473) and worse == approx(0, 0.002473)


def test_the_gated_reward_of_the_specification() -> None:
    _, report = over_scores(GatedLoss(), ([1, -1, 0.5], [1] * 3), ([0, -2], [-1] * 2))
    assert report.loss == pytest.approx(0.445323, abs=1e-6)
    # The logit, over the mean length.
    assert report.metrics["margin"] == pytest.approx(0.578046 / 2.5, abs=1e-6)


def test_the_step_scores_of_the_specification() -> None:
    (gradient,), report = over_scores(StepsLoss(), ([0.2, 7, -1.5, 3], [1, 0, 1, 1]), targets=[1, math.nan, -1, 1])
    assert report.loss == pytest.approx(0.217743, abs=1e-6)
    assert gradient[1] == 0 and all(gradient[::2])


@pytest.mark.parametrize(("label", "loss"), [(1.0, 0.557509), (3.0, 0.619562)])
def test_the_weighted_likelihood_of_seft(label: float, loss: float) -> None:
    """Sum of w nll over sum of w; the first token is the prompt's, the second the label's."""
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0], [1, 1, 0, 0], [0, 0, 0, 2]])
    logprobs = logits.log_softmax(-1).gather(-1, torch.tensor([0, 1, 2, 0, 3])[:, None]).T
    assert (-logprobs[0]).tolist() == approx(0.340753, 0.743668, 0.139206, 1.006409, 0.340753)
    weights = torch.tensor([[0.0, label, 1, 1, 1]])
    row = TrainRow(row_id="r", tokens=[1] * 5, terms={"a": weights[0].tolist()})
    batch = token_batch([row], np.arange(5), weights, logprobs_BK=logprobs, entropy_BK=torch.zeros(1, 5))
    term = evaluate(SFTLoss(), batch, weights, [row])
    assert (term.total / weights.sum()).item() == pytest.approx(loss, abs=1e-5)


def test_orpo_of_the_specification() -> None:
    (better, worse), report = over_logprobs(ORPOLoss(), ([-0.2, -0.8], 1), ([-1.5, -0.5, -1.0], -1))
    assert report.loss == pytest.approx(0.532030, abs=1e-6)
    assert report.metrics == {"margin": pytest.approx(0.5), "accuracy": 1}
    # Of the ratio: -0.1 (1 - sigmoid(0.974077)) times 1 / (1 - p) of each reply, p = exp(-0.5) and exp(-1).
    pull = 0.1 * (1 - 1 / (1 + math.exp(-0.974077)))
    assert better == approx(*[-(1 + pull / (1 - math.exp(-0.5))) / 2] * 2)
    assert worse == approx(*[pull / (1 - math.exp(-1)) / 3] * 3)


def test_dpo_of_the_specification() -> None:
    (better, worse), report = over_logprobs(
        DPOLoss(), ([-1, -0.5], 1), ([-2, -0.3, -0.7], -1), reference_logprobs=[[-1.2, -0.9], [-1.5, -0.4, -0.6]]
    )
    assert report.loss == pytest.approx(0.639659, abs=1e-6)
    assert report.metrics == {"margin": pytest.approx(1.1), "accuracy": 1}
    # 0.1 (1 - sigmoid(0.11))
    assert better == approx(*[-0.0472528] * 2) and worse == approx(*[0.0472528] * 3)


@pytest.mark.parametrize(("label", "loss", "pull"), [(1, 0.437488, -0.354344), (-1, 1.037488, 0.645656)])
def test_the_implicit_outcome_of_the_specification(label: int, loss: float, pull: float) -> None:
    (gradient,), report = over_logprobs(ImplicitOutcomeLoss(), ([-1, -0.5], label), reference_logprobs=[[-1.2, -0.9]])
    assert report.loss == pytest.approx(loss, abs=1e-6)
    assert report.metrics == {"accuracy": label == 1}
    assert gradient == approx(pull, pull)


# Worked numbers of our own.


def test_the_clipped_value_loss() -> None:
    # 0.81 within the clip; 1.5 counts as 1.2, so 0.64 and no pull; 0.5 moved away, so 2.25; 4 overshot, so 4.
    (gradient,), report = over_scores(
        ValueLoss(clip=0.2), ([1.1, 1.5, 0.5, 4, 8], [1, 1, 1, 1, 0]), targets=[2] * 5, old_scores=[1] * 5
    )
    assert report.loss == pytest.approx((0.81 + 0.64 + 2.25 + 4) / 4, abs=1e-6)
    assert gradient == approx(-1.8 / 4, 0, -3 / 4, 4 / 4, 0)
    assert report.metrics == {
        "value": pytest.approx((1.1 + 1.5 + 0.5 + 4) / 4),
        "target": 2,
        "clip_share": 0.25,
    }


def test_the_value_loss() -> None:
    (gradient,), report = over_scores(ValueLoss(), ([1.5, -1], [1, 0.5]), targets=[2, 1])
    assert report.loss == pytest.approx((0.25 + 0.5 * 4) / 2)
    assert gradient == approx(-0.5, -1)
    assert report.metrics.keys() == {"value", "target"}


def test_reinforce() -> None:
    (gradient,), report = over_logprobs(ReinforceLoss(), ([-1, -0.5], 1), advantages=[[2, -1]])
    assert report.loss == pytest.approx((2 - 0.5) / 2)
    assert gradient == approx(-1, 0.5)


def test_reinforce_by_sequence() -> None:
    (short, long), report = over_logprobs(
        ReinforceLoss(normalize="sequence"), ([-1], 1), ([-0.5, -0.5], 1), advantages=[[2], [1, 3]]
    )
    assert report.loss == pytest.approx((2 + (0.5 + 1.5) / 2) / 2)
    assert short == approx(-1) and long == approx(-0.25, -0.75)


def test_reinforce_with_kl_and_entropy() -> None:
    # Of the KL: d = 0.1, k3 = 0.005171 and its slope 1 - exp(0.1) = -0.105171.
    logprob = math.log(0.25)
    spec = ReinforceLoss(kl_coef=0.5)
    given = {"advantages": [[1.5]], "reference_logprobs": [[logprob + 0.1]]}
    (gradient,), report = over_logprobs(spec, ([logprob], 1), **given)
    assert report.loss == pytest.approx(1.5 * math.log(4) + 0.5 * 0.005171, abs=1e-6)
    assert gradient == approx(-1.5 - 0.5 * 0.105171)
    # Of the entropy: H = 0.562335 for p = 0.25, and dH/dlogit = p (1 - p) log((1 - p) / p) = p (1 - p) 1.098612.
    assert report.metrics == {"entropy": pytest.approx(0.562335, abs=1e-6), "kl": pytest.approx(0.005171, abs=1e-6)}
    bonus = spec.model_copy(update={"entropy_coef": 0.2})
    (with_bonus,), report = over_logprobs(bonus, ([logprob], 1), **given)
    assert report.loss == pytest.approx(1.5 * math.log(4) + 0.5 * 0.005171 - 0.2 * 0.562335, abs=1e-6)
    assert with_bonus == approx(gradient[0] - 0.2 * 0.25 * 1.098612)


# Q-RM's identities: logits are Q values up to a scale and a level.


REWARDS = torch.tensor([[1, 0.2, -0.3], [0.5, -0.1, 0.4]], dtype=torch.float64)
BETA = 0.5


def test_the_two_step_chain_of_the_specification() -> None:
    q1 = REWARDS[1]
    # V is what beta log phi lacks of Q.
    phi1 = log_softmax(q1, BETA)
    v1 = (q1 - BETA * phi1)[0]
    q0 = REWARDS[0] + v1
    z0 = q0 / BETA + 7
    phi0 = log_softmax(z0, 1)
    v0 = (q0 - BETA * phi0)[0]
    assert (v1.item(), v0.item()) == (pytest.approx(0.875690, abs=1e-6), pytest.approx(1.997622, abs=1e-6))
    assert phi0.exp().tolist() == approx(0.783595, 0.158205, 0.058200)
    assert phi1.exp().tolist() == approx(0.471715, 0.142078, 0.386207)
    assert (BETA * (phi0[0] + phi1[2]) + v0).item() == pytest.approx(1.4)
    assert (q0 - q0.mean()).tolist() == approx(0.7, -0.1, -0.6)
    assert (BETA * (z0 - z0.mean())).tolist() == approx(0.7, -0.1, -0.6)
    (of_q,), (of_z,) = normalised([q0.numpy()]), normalised([z0.numpy()])
    np.testing.assert_allclose(of_z, of_q)


def test_the_min_entropy_of_the_specification() -> None:
    z = torch.tensor([0.3, -1.2, 2.0, 0.7])
    logprobs, entropy = logprobs_and_entropy(z.expand(1, 4, 4), torch.arange(4)[None], 1, entropy_gradient=False)
    assert logprobs[0].tolist() == approx(-2.102780, -3.602780, -0.402780, -1.702780)
    min_entropy = (z - z.max()) - logprobs[0]
    assert min_entropy.tolist() == approx(*[0.402780] * 4)
    assert entropy[0, 0].item() == pytest.approx(0.934400, abs=1e-6)


# What is refused.


PLAIN = {"row_id": "r1", "tokens": [1, 2, 3], "terms": {"a": [0, 1, 1]}}
BETTER = PLAIN | {"pair": "p"}
WORSE = BETTER | {"row_id": "r2", "terms": {"a": [0, -1, -1]}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([BETTER], r"pair 'p': expected one better and one worse row of the term 'a', got 1 and 0"),
        ([WORSE], r"pair 'p': .* the term 'a', got 0 and 1"),
        ([BETTER, WORSE, BETTER], r"pair 'p': .* the term 'a', got 2 and 1"),
        ([BETTER, BETTER], r"pair 'p': .* the term 'a', got 2 and 0"),
        ([BETTER, WORSE | {"terms": {}}], r"pair 'p': .* the term 'a', got 1 and 0"),
        ([BETTER, WORSE | {"terms": {"a": [0, 1, -1]}}], r"row 'r2': the term 'a' compares pairs"),
        ([BETTER, WORSE | {"terms": {"a": [0, 0, 0]}}], r"row 'r2': the term 'a' compares pairs"),
        ([BETTER, WORSE | {"pair": ""}], r"row 'r2': the term 'a' compares pairs; expected `pair`"),
    ],
)
@pytest.mark.parametrize("case", [case for case, spec in CASES.items() if isinstance(spec, OVER_PAIRS)])
def test_rows_that_are_no_pairs(
    case: str, rows: list[dict[str, Any]], message: str, llama: Loaded, scalar: Loaded
) -> None:
    loaded = model_for(CASES[case], llama, scalar)
    given = [TrainRow.model_validate(row | {"reference_logprobs": [0, -1, -1]}) for row in rows]
    with pytest.raises(BadInput, match=message):
        accumulate(loaded, {"a": CASES[case]}, [given])


@pytest.mark.parametrize(
    ("spec", "array"),
    [
        (ValueLoss(), "targets"),
        (StepsLoss(), "targets"),
        (ValueLoss(clip=0.1), "old_scores"),
        (DPOLoss(), "reference_logprobs"),
        (ImplicitOutcomeLoss(), "reference_logprobs"),
        (ReinforceLoss(), "advantages"),
        (ReinforceLoss(kl_coef=0.1), "reference_logprobs"),
    ],
)
def test_rows_that_lack_what_a_term_needs(spec: LossSpec, array: str, llama: Loaded, scalar: Loaded) -> None:
    arrays = ("advantages", "reference_logprobs", "targets", "old_scores")
    full = {name: [0.0, -1.0, -1.0] for name in arrays}
    rows = [BETTER | full, WORSE | full | {array: None}]
    losses = {"a": spec}
    loaded = scalar if isinstance(spec, ValueLoss | StepsLoss) else llama
    accumulate(loaded, losses, [[TrainRow.model_validate(row | {array: full[array]}) for row in rows]])
    with pytest.raises(BadInput, match=rf"row 'r2': the term 'a' \({spec.type}\) needs {array}"):
        accumulate(loaded, losses, [[TrainRow.model_validate(row) for row in rows]])


@pytest.mark.parametrize("spec", [SFTLoss(), GRPOLoss(), *VOCABULARY.values()])
def test_terms_over_log_probs_need_a_vocabulary(spec: LossSpec, scalar: Loaded) -> None:
    with pytest.raises(BadInput, match=rf"losses\['a'\]: {spec.type} does not go with .* a scalar head"):
        accumulate(scalar, {"a": spec}, [[TrainRow.model_validate(PLAIN)]])


@pytest.mark.parametrize("spec", SCALAR.values())
def test_terms_over_scores_need_a_scalar_head(spec: LossSpec, llama: Loaded) -> None:
    with pytest.raises(BadInput, match=rf"losses\['a'\]: {spec.type} does not go with .* a vocabulary head"):
        accumulate(llama, {"a": spec}, [[TrainRow.model_validate(PLAIN)]])


def test_a_reply_is_right_or_wrong_as_a_whole(llama: Loaded) -> None:
    row = PLAIN | {"terms": {"a": [0, 1, -1]}, "reference_logprobs": [0, -1, -1]}
    with pytest.raises(BadInput, match=r"row 'r1': the term 'a' .* 1 .* -1"):
        accumulate(llama, {"a": ImplicitOutcomeLoss()}, [[TrainRow.model_validate(row)]])


# Micro-batches of pairs.


@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from(["", *"abcdef"])), min_size=1, max_size=20),
    st.integers(1, 200),
)
def test_pairs_stay_together_within_the_budget(rows: list[tuple[int, str]], budget: int) -> None:
    groups = by_pair([np.ones(length, np.int32) for length, _ in rows], [name for _, name in rows], budget)
    assert sorted(i for group in groups for i in group.rows) == list(range(len(rows)))
    place = {i: g for g, group in enumerate(groups) for i in group.rows}
    for g, group in enumerate(groups):
        names = {rows[i][1] or i for i in group.rows}
        assert {place[i] for i, (_, name) in enumerate(rows) if name in names} <= {g}
        assert group.shared == 0
        assert len(group.rows) * max(rows[i][0] for i in group.rows) <= budget or len(names) == 1
