"""The trainer in one process: gradients over micro-batches, AdamW, schedule."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import get_scheduler

from actors.policy.forward import logits_of, logprobs_and_entropy
from actors.policy.loss_functions import TokenBatch, TokenLoss, token_loss
from actors.policy.microbatch import by_length, pad_right
from protocols.errors import BadInput, Corrupt
from protocols.losses import GRPOLoss, LossSpec
from protocols.policy import TrainerConfig
from protocols.tensor import PerToken
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
    TermReport,
    TrainRow,
)

Array = NDArray[np.float32]


class TorchTrainer:
    """Accumulates gradients of loss terms over rows and applies them."""

    def __init__(
        self,
        model: Any,
        config: TrainerConfig,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._model = model
        self._config = config
        self._autocast = autocast
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self._schedule = get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule,
            self._optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.total_steps or None,
        )
        self.version = 0
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """Add the gradient of the batch loss to what is accumulated.

        Each term is divided by its count over the whole batch, so the result does not depend on how the
        batch is cut. Raises BadInput when a row lacks what one of its terms needs, or is all prompt.
        """
        check_rows(request)
        counts = term_counts(request)
        sums = Sums()
        lengths = [len(row.tokens) for row in request.rows]
        groups = by_length(lengths, self._config.micro_batch_tokens)
        self._model.train()
        with torch.random.fork_rng(devices=[]):
            # Dropout, if the model has any, must not depend on what ran in this process before.
            torch.manual_seed(self.version)
            for group in groups:
                rows = [request.rows[i] for i in group]
                self._micro_batch(rows, request.losses, counts, sums)
        self._model.eval()
        return sums.response(request.losses, counts, tokens=sum(lengths), micro_batches=len(groups))

    def _micro_batch(
        self, rows: Sequence[TrainRow], losses: dict[str, LossSpec], counts: dict[str, float], sums: "Sums"
    ) -> None:
        weights = {name: padded(rows, [row.terms.get(name) for row in rows]) for name in losses}
        wanted_BT = np.any([array != 0 for array in weights.values()], axis=0)
        with self._autocast():
            logits, targets, positions = logits_of(self._model, [row.tokens.array for row in rows], wanted_BT)
        total = torch.zeros((), device=logits.device)
        for name, spec in losses.items():
            weights_BK = torch.from_numpy(weights[name][:, positions]).to(logits.device)
            per_token = token_loss(spec, token_batch(spec, rows, logits, targets, positions))
            reduced = reduce_term(spec, per_token.loss_BT, weights_BK)
            sums.add(name, float(reduced.detach()), per_token, weights_BK)
            total = total + spec.coef * reduced / max(counts[name], 1.0)
        torch.autograd.backward(total)

    def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """Clip, step, advance the schedule, clear the gradients.

        Raises Corrupt, clears the gradients and leaves the weights alone, if the gradient is not finite.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._config.grad_clip))
        if not math.isfinite(norm):
            self._optimizer.zero_grad()
            raise Corrupt(f"the gradient at weight version {self.version} has norm {norm}; no step was taken")
        rate = self._optimizer.param_groups[0]["lr"]
        if request.learning_rate is not None:
            rate = request.learning_rate
            for group in self._optimizer.param_groups:
                group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        self.version += 1
        return OptimStepResponse(version=self.version, grad_norm=norm, learning_rate=rate)

    def save(self, directory: Path) -> None:
        """Write optimiser, schedule and version to `trainer.pt`."""
        state = {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "version": self.version,
        }
        torch.save(state, directory / "trainer.pt")

    def load(self, directory: Path) -> None:
        """Take back what `save` wrote. Raises Corrupt when the file is missing or broken."""
        file = directory / "trainer.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
            self.version = int(state["version"])
        except Exception as error:
            raise Corrupt(f"{file} is not a saved trainer: {error}") from error


class Sums:
    """Running sums over micro-batches, from which the report of a batch is made."""

    def __init__(self) -> None:
        self._loss: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, float] = defaultdict(float)
        self._metrics: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, term: str, loss: float, per_token: TokenLoss, weights_BK: torch.Tensor) -> None:
        """Add one micro-batch of one term."""
        present_BK = weights_BK != 0
        self._loss[term] += loss
        self._tokens[term] += float(present_BK.sum())
        for name, values_BK in per_token.metrics.items():
            self._metrics[term][name] += float(values_BK[present_BK].double().sum())

    def response(
        self, losses: dict[str, LossSpec], counts: dict[str, float], *, tokens: int, micro_batches: int
    ) -> ForwardBackwardResponse:
        """Means over the whole batch."""
        reports = {
            term: TermReport(
                loss=self._loss[term] / max(counts[term], 1.0),
                count=counts[term],
                metrics={k: v / max(self._tokens[term], 1.0) for k, v in self._metrics[term].items()},
            )
            for term in losses
        }
        loss = sum(losses[term].coef * report.loss for term, report in reports.items())
        return ForwardBackwardResponse(loss=loss, terms=reports, tokens=tokens, micro_batches=micro_batches)


def check_rows(request: ForwardBackwardRequest) -> None:
    """Raise BadInput when a row lacks an array that one of its terms needs."""
    for row in request.rows:
        for name in row.terms:
            spec = request.losses[name]
            if isinstance(spec, GRPOLoss) and row.advantages is None:
                raise BadInput(f"row {row.row_id!r}: the term {name!r} (grpo) needs advantages")
            if isinstance(spec, GRPOLoss) and spec.kl_coef and row.reference_logprobs is None:
                raise BadInput(f"row {row.row_id!r}: the term {name!r} has a KL and needs reference_logprobs")
    if not any(weights.array.any() for row in request.rows for weights in row.terms.values()):
        raise BadInput("rows: no token has a weight in any term, there is nothing to learn")


def term_counts(request: ForwardBackwardRequest) -> dict[str, float]:
    """What each term is divided by: its tokens with weight, or its rows with any for `sequence`."""
    counts: dict[str, float] = dict.fromkeys(request.losses, 0.0)
    for row in request.rows:
        for name, weights in row.terms.items():
            present = int(np.count_nonzero(weights.array))
            by_sequence = request.losses[name].normalize == "sequence"
            counts[name] += min(present, 1) if by_sequence else present
    return counts | request.counts


def reduce_term(spec: LossSpec, loss_BK: torch.Tensor, weights_BK: torch.Tensor) -> torch.Tensor:
    """Weighted sum over tokens; for `sequence`, the sum over rows of each row's weighted mean."""
    weighted_BK = torch.where(weights_BK != 0, loss_BK * weights_BK, 0.0)
    if spec.normalize == "token":
        return weighted_BK.sum()
    return (weighted_BK.sum(-1) / (weights_BK != 0).sum(-1).clamp(min=1)).sum()


def token_batch(
    spec: LossSpec,
    rows: Sequence[TrainRow],
    logits_BKV: torch.Tensor,
    targets_BK: torch.Tensor,
    positions_K: NDArray[np.int64],
) -> TokenBatch:
    """What a term's loss looks at, at the K positions that went through the output layer."""
    with_gradient = isinstance(spec, GRPOLoss) and spec.entropy_coef > 0
    logprobs_BK, entropy_BK = logprobs_and_entropy(logits_BKV, targets_BK, spec.temperature, with_gradient)

    def column(name: str) -> torch.Tensor:
        values_BT = padded(rows, [getattr(row, name) for row in rows], missing=math.nan)
        return torch.from_numpy(values_BT[:, positions_K]).to(logits_BKV.device)

    return TokenBatch(
        logprobs_BK,
        entropy_BK,
        advantages_BT=column("advantages"),
        sampled_logprobs_BT=column("sampled_logprobs"),
        reference_logprobs_BT=column("reference_logprobs"),
    )


def padded(rows: Sequence[TrainRow], arrays: Sequence[PerToken | None], missing: float = 0.0) -> Array:
    """One per-token array of all rows, float32[B, T]; `missing` where a row has none."""
    filled = [
        np.full(len(row.tokens), missing, np.float32) if array is None else array.array
        for row, array in zip(rows, arrays, strict=True)
    ]
    return pad_right(filled).astype(np.float32)
