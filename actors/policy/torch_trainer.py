"""The trainer: gradients over micro-batches, AdamW, schedule; alone or as one of several ranks."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.policy.forward import logits_of, logprobs_and_entropy, longest_shared, scores_of
from actors.policy.loading import Loaded
from actors.policy.loss_functions import TokenBatch
from actors.policy.microbatch import MicroBatch, by_pair, by_prompt
from actors.policy.ranks import gathered, shares, sum_gradients
from actors.policy.terms import (
    Term,
    check_rows,
    evaluate,
    padded,
    prompt_length,
    term_counts,
    token_batch,
    wants_entropy_gradient,
)
from actors.policy.weights import read_weights, write_model
from protocols.errors import Corrupt, Stale
from protocols.losses import LikelihoodLoss, LossSpec
from protocols.model import Head, TrainerConfig
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
    TermReport,
    TrainRow,
)
from protocols.workers import Rank

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
        head: Head = "vocabulary",
    ) -> None:
        self.model = self._module = model
        self._head = head
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
        check_rows(request, self._head)
        counts = term_counts(request)
        sums = Sums()
        cut = shares(self._cut(request), self._config.micro_batch_tokens, self._rank.world)
        with self._training():
            for group in cut[self._rank.index]:
                self._micro_batch(request, group, counts, sums)
            for _ in range(len(cut[0]) - len(cut[self._rank.index])):
                self._keep_in_step(request, cut[0][0], counts)
        total, tokens = Sums.of(gathered(sums)), sum(len(row.tokens) for row in request.rows)
        return total.response(request.losses, counts, tokens=tokens, micro_batches=sum(map(len, cut)))

    def _cut(self, request: ForwardBackwardRequest) -> Callable[[int], list[MicroBatch]]:
        """How the rows go into micro-batches of a budget of tokens: pairs together, prompts shared where they can."""
        rows = [row.tokens.array for row in request.rows]
        pairs = [row.pair for row in request.rows]
        if self._head == "scalar" or any(pairs):
            return lambda budget: by_pair(rows, pairs, budget)
        limit = longest_shared(self._module.config)
        prompts = [prompt_length(row) if len(row.tokens) <= limit else 0 for row in request.rows]
        return lambda budget: by_prompt(rows, prompts, budget)

    def _keep_in_step(self, request: ForwardBackwardRequest, group: MicroBatch, counts: dict[str, float]) -> None:
        """Called when another rank has a micro-batch more. `group` is one to go through the model meanwhile."""

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
        request: ForwardBackwardRequest,
        group: MicroBatch,
        counts: dict[str, float],
        sums: "Sums",
        *,
        factor: float = 1.0,
    ) -> None:
        rows, losses = [request.rows[i] for i in group.rows], request.losses
        weights = {name: padded(rows, [row.terms.get(name) for row in rows]) for name in losses}
        wanted_BT = np.any([array != 0 for array in weights.values()], axis=0)
        batch_of, positions = self._forward(rows, wanted_BT, group.shared, losses)
        total = torch.zeros((), device=self._module.device)
        for name, spec in losses.items():
            weights_BK = torch.from_numpy(weights[name][:, positions]).to(self._module.device)
            found = evaluate(spec, batch_of(spec, weights_BK), weights_BK, rows)
            sums.add(name, found)
            total = total + spec.coef * found.total / (counts[name] or 1.0)
        self._backward(total * factor)

    def _forward(
        self,
        rows: Sequence[TrainRow],
        wanted_BT: NDArray[np.bool_],
        shared: int,
        losses: Mapping[str, LossSpec],
    ) -> tuple[Callable[[LossSpec, torch.Tensor], TokenBatch], NDArray[np.int64]]:
        """Take rows through the model. Returns what gives a term its batch, and the positions that were wanted."""
        tokens = [row.tokens.array for row in rows]
        if self._head == "scalar":
            with self._autocast():
                scores_BK, positions = scores_of(self.model, tokens, wanted_BT)
            return lambda _, weights_BK: token_batch(rows, positions, weights_BK, scores_BK=scores_BK), positions
        with self._autocast():
            logits, targets, positions = logits_of(self.model, tokens, wanted_BT, shared)
        bonus = any(map(wants_entropy_gradient, losses.values()))
        predictions = {
            temperature: logprobs_and_entropy(logits, targets, temperature, entropy_gradient=bonus)
            for temperature in {spec.temperature for spec in losses.values() if isinstance(spec, LikelihoodLoss)}
        }

        def batch_of(spec: LossSpec, weights_BK: torch.Tensor) -> TokenBatch:
            assert isinstance(spec, LikelihoodLoss)
            logprobs, entropy = predictions[spec.temperature]
            return token_batch(rows, positions, weights_BK, logprobs_BK=logprobs, entropy_BK=entropy)

        return batch_of, positions

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
        self._items: dict[str, float] = defaultdict(float)
        self._metrics: dict[str, dict[str, float]] = defaultdict(partial(defaultdict, float))

    def add(self, name: str, found: Term) -> None:
        """Add one micro-batch of one term."""
        self._loss[name] += float(found.total.detach())
        self._items[name] += found.items
        for metric, value in found.metrics.items():
            self._metrics[name][metric] += value

    @classmethod
    def of(cls, parts: Sequence["Sums"]) -> "Sums":
        """The sums of all ranks."""
        total = cls()
        for part in parts:
            for term, loss in part._loss.items():
                total._loss[term] += loss
                total._items[term] += part._items[term]
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
                metrics={k: v / max(self._items[term], 1.0) for k, v in self._metrics[term].items()},
            )
            for term in losses
        }
        loss = sum(losses[term].coef * report.loss for term, report in reports.items())
        return ForwardBackwardResponse(loss=loss, terms=reports, tokens=tokens, micro_batches=micro_batches)
