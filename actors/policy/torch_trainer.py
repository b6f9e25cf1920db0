"""The trainer: gradients over micro-batches, AdamW, schedule; alone or as one of several ranks."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.policy.forward import logits_of, logprobs_and_entropy, longest_shared
from actors.policy.loading import Loaded
from actors.policy.loss_functions import TokenBatch, TokenLoss, token_loss
from actors.policy.microbatch import pad_right
from actors.policy.ranks import gathered, shares, sum_gradients
from actors.policy.weights import read_weights, write_model
from protocols.errors import BadInput, Corrupt, Stale
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
from protocols.workers import Rank

Array = NDArray[np.float32]
ALONE = Rank()
NOTHING = "optim_step: no gradient was accumulated since the last step; call forward_backward first"


class TorchTrainer:
    """Accumulates gradients of loss terms over rows and applies them."""

    def __init__(
        self,
        model: Any,
        config: TrainerConfig,
        *,
        seed: int = 0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        rank: Rank = ALONE,
    ) -> None:
        self.model = self._module = model
        self._config = config
        self._seed = seed % 2**64
        self._rank = rank
        self._autocast = autocast
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: rate_share(config, step))
        self.version = 0
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """Add the gradient of the batch loss to what is accumulated.

        Each rank is given the whole batch and takes its share. Each term is divided by its count over the whole
        batch, so the result does not depend on how the batch is cut. Raises BadInput when a row lacks what one
        of its terms needs, or is all prompt. A call that fails clears the gradients.
        """
        check_rows(request)
        counts = term_counts(request)
        sums = Sums()
        tokens = [row.tokens.array for row in request.rows]
        limit = longest_shared(self._module.config)
        prompts = [prompt_length(row) if len(row.tokens) <= limit else 0 for row in request.rows]
        cut = shares(tokens, prompts, self._config.micro_batch_tokens, self._rank.world)
        with self._training():
            for group in cut[self._rank.index]:
                rows = [request.rows[i] for i in group.rows]
                self._micro_batch(rows, request.losses, counts, sums, shared=group.shared)
            for _ in range(len(cut[0]) - len(cut[self._rank.index])):
                self._keep_in_step(request, counts)
        total = Sums.of(gathered(sums))
        return total.response(request.losses, counts, tokens=sum(map(len, tokens)), micro_batches=sum(map(len, cut)))

    def _keep_in_step(self, request: ForwardBackwardRequest, counts: dict[str, float]) -> None:
        """Called when another rank has a micro-batch more."""

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode. Dropout, if the model has any, must not depend on what ran in this process before."""
        self.model.train()
        try:
            with torch.random.fork_rng(devices=[]):
                seed = np.random.SeedSequence((self._seed, self.version, self._rank.index))
                torch.manual_seed(int(seed.generate_state(1)[0]))
                yield
        except BaseException:
            # Part of a batch must never become a step.
            self.forget()
            raise
        finally:
            self.model.eval()

    def _micro_batch(
        self,
        rows: Sequence[TrainRow],
        losses: dict[str, LossSpec],
        counts: dict[str, float],
        sums: "Sums",
        *,
        shared: int = 0,
        factor: float = 1.0,
    ) -> None:
        weights = {name: padded(rows, [row.terms.get(name) for row in rows]) for name in losses}
        wanted_BT = np.any([array != 0 for array in weights.values()], axis=0)
        with self._autocast():
            tokens = [row.tokens.array for row in rows]
            logits, targets, positions = logits_of(self.model, tokens, wanted_BT, shared)
        bonus = any(isinstance(spec, GRPOLoss) and spec.entropy_coef for spec in losses.values())
        predictions = {
            temperature: logprobs_and_entropy(logits, targets, temperature, entropy_gradient=bonus)
            for temperature in {spec.temperature for spec in losses.values()}
        }
        total = torch.zeros((), device=logits.device)
        for name, spec in losses.items():
            weights_BK = torch.from_numpy(weights[name][:, positions]).to(logits.device)
            per_token = token_loss(spec, token_batch(rows, positions, weights_BK, *predictions[spec.temperature]))
            reduced = reduce_term(spec, per_token.loss_BT, weights_BK)
            sums.add(name, float(reduced.detach()), per_token, weights_BK)
            total = total + spec.coef * reduced / (counts[name] or 1.0)
        self._backward(total * factor)

    def _backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)

    def forget(self) -> None:
        """Drop the accumulated gradients."""
        self._optimizer.zero_grad()

    def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """Clip, step, advance the schedule, clear the gradients.

        Raises Stale when nothing was accumulated. Raises Corrupt, clears the gradients and leaves the weights alone,
        if the gradient is not finite.
        """
        # A rank may have had no rows.
        if not any(gathered(any(parameter.grad is not None for parameter in self._parameters))):
            raise Stale(NOTHING)
        sum_gradients(self._parameters)
        norm = self._clipped()
        if not math.isfinite(norm):
            self.forget()
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

    def _clipped(self) -> float:
        """Scale the gradients down to `grad_clip`. Returns their norm before, which float32 would miss by 2e-5."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self._config.grad_clip, norm)
        return float(norm)

    def buckets(self, limit: int) -> Iterator[dict[str, torch.Tensor]]:
        """The trained weights by name, in pieces of about `limit` bytes. All ranks must exhaust it together."""
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        for piece in in_pieces(trained, limit):
            yield {name: parameter.detach() for name, parameter in piece}

    def write(self, loaded: Loaded, directory: Path, training_state: bool) -> None:
        """Rank 0 writes model and tokenizer in Hugging Face format, and what training needs beside them."""
        if self._rank.index:
            return
        write_model(loaded, directory, whole=not training_state)
        if training_state:
            state = {
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "version": self.version,
            }
            torch.save(state, directory / "trainer.pt")

    def read(self, loaded: Loaded, directory: Path, training_state: bool) -> None:
        """Take back what `write` wrote. Raises Corrupt when a file is missing or broken."""
        read_weights(loaded, directory)
        # Gradients of the weights that were there must not become a step of these.
        self.forget()
        if training_state:
            self._read_state(directory / "trainer.pt")

    def _read_state(self, file: Path) -> None:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
            self.version = int(state["version"])
        except Exception as error:
            raise Corrupt(f"{file} is not a saved trainer: {error}") from error


def in_pieces(
    named: Sequence[tuple[str, torch.nn.Parameter]], limit: int
) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    """Parameters in their order, cut where a piece would exceed `limit` bytes; a larger one goes alone."""
    piece: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        own = full_size(parameter) * parameter.element_size()
        if piece and size + own > limit:
            yield piece
            piece, size = [], 0
        piece.append((name, parameter))
        size += own
    yield piece


def full_size(parameter: torch.nn.Parameter) -> int:
    """Number of weights, also of a parameter of which this rank holds a shard (ZeRO-3)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def rate_share(config: TrainerConfig, step: int) -> float:
    """Share of the peak learning rate after so many steps; unlike transformers' cosine it stays 0 at the end."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    left = max(0, config.total_steps - step) / (config.total_steps - config.warmup_steps)
    return left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


class Sums:
    """Running sums over micro-batches, from which the report of a batch is made."""

    def __init__(self) -> None:
        self._loss: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, float] = defaultdict(float)
        self._metrics: dict[str, dict[str, float]] = defaultdict(partial(defaultdict, float))

    def add(self, term: str, loss: float, per_token: TokenLoss, weights_BK: torch.Tensor) -> None:
        """Add one micro-batch of one term."""
        present_BK = weights_BK != 0
        self._loss[term] += loss
        self._tokens[term] += float(present_BK.sum())
        for name, values_BK in per_token.metrics.items():
            self._metrics[term][name] += float(values_BK[present_BK].double().sum())

    @classmethod
    def of(cls, parts: Sequence["Sums"]) -> "Sums":
        """The sums of all ranks."""
        total = cls()
        for part in parts:
            for term, loss in part._loss.items():
                total._loss[term] += loss
                total._tokens[term] += part._tokens[term]
                for name, value in part._metrics[term].items():
                    total._metrics[term][name] += value
        return total

    def response(
        self, losses: dict[str, LossSpec], counts: dict[str, float], *, tokens: int, micro_batches: int
    ) -> ForwardBackwardResponse:
        """Means over the whole batch."""
        reports = {
            term: TermReport(
                loss=self._loss[term] / (counts[term] or 1.0),
                count=counts[term],
                metrics={k: v / max(self._tokens[term], 1.0) for k, v in self._metrics[term].items()},
            )
            for term in losses
        }
        loss = sum(losses[term].coef * report.loss for term, report in reports.items())
        return ForwardBackwardResponse(loss=loss, terms=reports, tokens=tokens, micro_batches=micro_batches)


def check_rows(request: ForwardBackwardRequest) -> None:
    """Raise BadInput when a row lacks an array that one of its terms needs, or a count makes no sense."""
    for row in request.rows:
        for name in row.terms:
            spec = request.losses[name]
            if isinstance(spec, GRPOLoss) and row.advantages is None:
                raise BadInput(f"row {row.row_id!r}: the term {name!r} (grpo) needs advantages")
            if isinstance(spec, GRPOLoss) and spec.kl_coef and row.reference_logprobs is None:
                raise BadInput(f"row {row.row_id!r}: the term {name!r} has a KL and needs reference_logprobs")
    own = own_counts(request)
    for name, count in request.counts.items():
        if name not in own or not (0 < count < math.inf or count == own[name] == 0):
            raise BadInput(f"counts[{name!r}]: got {count}, expected a number above 0 for a term of losses")
    if not any(weights.array.any() for row in request.rows for weights in row.terms.values()):
        raise BadInput("rows: no token has a weight in any term, there is nothing to learn")


def prompt_length(row: TrainRow) -> int:
    """Tokens before the first one with weight in any term; 0 if none has."""
    with_weight = np.flatnonzero(np.any([weights.array != 0 for weights in row.terms.values()], axis=0))
    return int(with_weight[0]) if len(with_weight) else 0


def term_counts(request: ForwardBackwardRequest) -> dict[str, float]:
    """What each term is divided by."""
    return own_counts(request) | request.counts


def own_counts(request: ForwardBackwardRequest) -> dict[str, float]:
    """The tokens with weight of each term, or its rows with any for `sequence`, in this request alone."""
    counts: dict[str, float] = dict.fromkeys(request.losses, 0.0)
    for row in request.rows:
        for name, weights in row.terms.items():
            present = int(np.count_nonzero(weights.array))
            by_sequence = request.losses[name].normalize == "sequence"
            counts[name] += min(present, 1) if by_sequence else present
    return counts


def reduce_term(spec: LossSpec, loss_BK: torch.Tensor, weights_BK: torch.Tensor) -> torch.Tensor:
    """Weighted sum over tokens; for `sequence`, the sum over rows of each row's weighted mean."""
    weighted_BK = torch.where(weights_BK != 0, loss_BK * weights_BK, 0.0)
    if spec.normalize == "token":
        return weighted_BK.sum()
    return (weighted_BK.sum(-1) / (weights_BK != 0).sum(-1).clamp(min=1)).sum()


def token_batch(
    rows: Sequence[TrainRow],
    positions_K: NDArray[np.int64],
    weights_BK: torch.Tensor,
    logprobs_BK: torch.Tensor,
    entropy_BK: torch.Tensor,
) -> TokenBatch:
    """What a term's loss looks at, at the K positions that went through the output layer."""

    def column(name: str) -> torch.Tensor:
        values_BT = padded(rows, [getattr(row, name) for row in rows], missing=math.nan)
        values_BK = torch.from_numpy(values_BT[:, positions_K]).to(weights_BK.device)
        # Outside of the term a row need not have values, and a NaN would reach the gradient as 0 x NaN.
        return torch.where(weights_BK != 0, values_BK, 0.0)

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
