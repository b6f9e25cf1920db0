"""Choosers with weights: networks over queries, trained by gradient."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from actors.policy.loading import ONE_AT_A_TIME
from actors.policy.microbatch import by_length
from actors.policy.torch_trainer import rate_share
from actors.router import losses
from actors.router.backbone import Backbone, load_backbone
from actors.router.chooser import About, Chooser, Scored, matched, texts_of
from actors.router.layout import Ids, Layout, mask_rate, query_layout
from actors.router.nets import Net, OnEmbeddings, Output, embedded, in_groups, net_of
from actors.router.targets import targets_of, weights_of
from protocols.errors import BadInput, Corrupt, Stale
from protocols.model import TrainerConfig
from protocols.router import RouterConfig, RouteRow, RouteTrainResponse

WEIGHTS, OPTIMIZER = "router.safetensors", "trainer.pt"
SIGMOID = ("lookahead", "classifier", "mlp", "linear")
"""Kinds whose logits stand for one candidate each; those of the others compete."""
SIDES = 3
"""Of router_dc: most candidates on either side."""


class LearntChooser(Chooser):
    """An encoder and a network on it."""

    def __init__(self, config: RouterConfig, folder: Path | None, fresh: Sequence[str] | None = None) -> None:
        """`folder`: where the encoder was saved, and `fresh`: its weights that did not come with it."""
        super().__init__(config)
        self._backbone: Backbone = load_backbone(config, folder)
        if fresh is not None:
            self._backbone.fresh = set(fresh)
        self.backbone = self._backbone
        if self.limit < 8:
            raise BadInput(
                f"response_tokens: {config.response_tokens} leave {self.limit} tokens for the query, in a model of"
                f" {self._backbone.context} positions"
            )
        with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.net = net_of(self._backbone, config).to(self._backbone.device)
        self.net.eval()
        self._kept: list[int] | None = None
        """Candidates that are not to change, where only new ones learn."""
        self._embeddings: dict[str, torch.Tensor] = {}
        self._optimizer: torch.optim.AdamW | None = None
        self._prepare_training()

    def _prepare_training(self) -> None:
        if self.config.trainer is None:
            return
        if isinstance(self.net, OnEmbeddings):
            self._backbone.requires_grad_(False)
        elif self.config.trainer.gradient_checkpointing:
            self._backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._trainer: TrainerConfig = self.config.trainer
        new = [p for name, p in self.net.named_parameters() if self._is_new(name) and p.requires_grad]
        known = {id(p) for p in new}
        old = [p for p in self.net.parameters() if p.requires_grad and id(p) not in known]
        rate = self._trainer.learning_rate
        groups = [{"params": old, "lr": rate}, {"params": new, "lr": rate * self.config.new_rate}]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=self._trainer.betas,
            # It would shrink what is to stay, gradient or not.
            weight_decay=self._trainer.weight_decay if self._kept is None else 0.0,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: rate_share(self._trainer, step)
        )

    def _is_new(self, name: str) -> bool:
        """Whether a weight did not come with the encoder."""
        inside = "backbone.model."
        return not name.startswith(inside) or name.removeprefix(inside) in self._backbone.fresh

    @property
    def kept(self) -> list[str] | None:
        """Candidates that training does not change, where only new ones learn."""
        return None if self._kept is None else [self.names[i] for i in self._kept]

    def counts(self) -> tuple[int, int]:
        """Number of weights, and of those that a step changes."""
        every = {id(p): p for module in (self._backbone, self.net) for p in module.parameters()}
        trained = [] if self._optimizer is None else [p for g in self._optimizer.param_groups for p in g["params"]]
        return sum(p.numel() for p in every.values()), sum(p.numel() for p in trained if p.requires_grad)

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> Scored:
        """Probabilities of each candidate."""
        queries = [self._backbone.query(text, self.limit) for text in texts]
        logits = self._logits([query for query, _ in queries]).double().cpu()
        scores = logits.sigmoid() if self.config.kind in SIGMOID else logits.softmax(1)
        return Scored(scores.numpy(), [cut for _, cut in queries])

    def _logits(self, queries: Sequence[Ids]) -> torch.Tensor:
        """Logits of each candidate, float32[B, T]."""
        if isinstance(self.net, OnEmbeddings):
            states_BD = embedded(self._backbone, [query_layout(query) for query in queries])
            return self.net(states_BD).logits_BT  # type: ignore[no-any-return]
        layout, net = self.net.layout, self.net
        return in_groups([layout(query, None, 1.0) for query in queries], lambda rows: net(rows).logits_BT)

    def learn(self, rows: Sequence[RouteRow]) -> RouteTrainResponse:
        """One optimiser step. Raises Stale without a trainer, BadInput where answers are missing."""
        if self._optimizer is None:
            raise Stale("train: this router is frozen (trainer is null in its configuration)")
        scores_BT = np.array([row.scores for row in rows])
        weights_B = weights_of(scores_BT, self.config.dead_zone)
        warmup = self.config.curriculum * self._trainer.total_steps
        rate = mask_rate(self.version, warmup)
        layouts, cut = self._layouts(rows, rate)
        with self._training():
            sums = self._accumulate(rows, layouts, scores_BT, weights_B)
            norm, learning_rate = self._step()
        choice, response = sums
        metrics = {"choice_loss": choice}
        if response is not None:
            metrics |= {"response_loss": response}
            if self._backbone.masked:
                metrics["mask_rate"] = rate
        dropped = {"equal scores": int((weights_B == 0).sum()), "query cut": cut}
        return RouteTrainResponse(
            loss=choice + self._response_weight * (response or 0.0),
            metrics=metrics,
            learnt=len(rows),
            dropped={reason: count for reason, count in dropped.items() if count},
            grad_norm=norm,
            learning_rate=learning_rate,
            version=self.version,
        )

    @property
    def _response_weight(self) -> float:
        given = self.config.response_weight
        return (0.2 if self._backbone.masked else 0.5) if given is None else given

    def _layouts(self, rows: Sequence[RouteRow], rate: float) -> tuple[list[Layout], int]:
        """Rows as tokens, and how many queries were cut."""
        queries = [self._backbone.query(text, self.limit) for text in texts_of(rows)]
        cut = sum(was_cut for _, was_cut in queries)
        if not isinstance(self.net, Net):
            return [query_layout(query) for query, _ in queries], cut
        predicts = self.config.kind == "lookahead" and self._response_weight > 0
        return [
            self.net.layout(query, self._answers(row, len(query)) if predicts else None, rate)
            for row, (query, _) in zip(rows, queries, strict=True)
        ], cut

    def _answers(self, row: RouteRow, query: int) -> list[Ids]:
        if len(row.answers) != len(self.names):
            raise BadInput(
                f"row {row.uid!r}: answers: got {len(row.answers)}, expected one of each of"
                f" {len(self.names)} candidates"
            )
        room = self.config.response_tokens
        answers = [self._backbone.text(answer) for answer in row.answers]
        if not self._backbone.masked:
            room = max(0, min(room, min(self.config.max_tokens, self._backbone.context) - query - 2))
            # One that is cut does not end there.
            answers = [tokens if len(tokens) > room else [*tokens, self._backbone.end] for tokens in answers]
            room += 1
        return [np.asarray(tokens[:room], np.int64) for tokens in answers]

    def _accumulate(
        self,
        rows: Sequence[RouteRow],
        layouts: Sequence[Layout],
        scores_BT: NDArray[np.float64],
        weights_B: NDArray[np.float64],
    ) -> tuple[float, float | None]:
        """Gradients of the whole batch, each loss over its own count. Returns the losses."""
        device = self._backbone.device
        scores = torch.from_numpy(scores_BT).float().to(device)
        targets = torch.from_numpy(targets_of(scores_BT, self.config.target)).float().to(device)
        weights = torch.from_numpy(weights_B).float().to(device)
        chosen, predicted = float(weights_B.sum()) or 1.0, sum(layout.predicted for layout in layouts)
        choice, response = 0.0, 0.0
        for group, output in self._training_outputs(rows, layouts):
            loss_B = self._choice_loss(output.logits_BT, scores[group], targets[group])
            total = own = (loss_B * weights[group]).sum() / chosen
            if output.response_loss is not None:
                total = total + self._response_weight * output.response_loss / predicted
                response += float(output.response_loss.detach()) / predicted
            torch.autograd.backward(total)
            choice += float(own.detach())
        return choice, response if predicted else None

    def _training_outputs(
        self, rows: Sequence[RouteRow], layouts: Sequence[Layout]
    ) -> Iterator[tuple[list[int], Output]]:
        if isinstance(self.net, OnEmbeddings):
            yield list(range(len(rows))), self.net(self._embedded(rows, layouts))
            return
        for group in by_length([len(layout) for layout in layouts], self._trainer.micro_batch_tokens):
            yield group, self.net([layouts[i] for i in group])

    @torch.no_grad()
    def _embedded(self, rows: Sequence[RouteRow], layouts: Sequence[Layout]) -> torch.Tensor:
        """Embeddings of rows; the encoder does not change, so each text is encoded once."""
        self._backbone.eval()
        new = dict(zip(texts_of(rows), layouts, strict=True))
        left = [text for text in new if text not in self._embeddings]
        if left:
            self._embeddings.update(zip(left, embedded(self._backbone, [new[text] for text in left]), strict=True))
        return torch.stack([self._embeddings[text] for text in texts_of(rows)])

    def _choice_loss(self, logits: torch.Tensor, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        match self.config.kind:
            case "zooter":
                return losses.forward_kl(logits, scores, self.config.temperature)
            case "router_dc":
                return losses.contrastive(logits, scores, min(SIDES, len(self.names) - 1))
            case "matrix":
                return losses.pairwise(logits, scores)
            case _:
                return losses.bce(logits, targets)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode; dropout depends on seed and step alone, and what fails leaves no gradient behind."""
        assert self._optimizer is not None
        self.net.train()
        try:
            with torch.random.fork_rng(devices=[]):
                seed = np.random.SeedSequence((self.config.seed % 2**64, self.version))
                torch.manual_seed(int(seed.generate_state(1)[0]))
                yield
        except BaseException:
            # Part of a batch must never become a step.
            self._optimizer.zero_grad()
            raise
        finally:
            self.net.eval()

    def _step(self) -> tuple[float, float]:
        """Clip, step, clear. Returns the gradient's norm and the rate. Raises Corrupt if the norm is not finite."""
        assert self._optimizer is not None
        self._keep()
        trained = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self._trainer.grad_clip))
        if not math.isfinite(norm):
            raise Corrupt(f"the gradient at weight version {self.version} has norm {norm}; no step was taken")
        rate = float(self._schedule.get_last_lr()[0])
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        self.version += 1
        return norm, rate

    def _keep(self) -> None:
        """Where only new candidates learn, what belongs to the others gets no gradient."""
        if self._kept is None:
            return
        for name in self.net.per_candidate:
            gradient = self.net.get_parameter(name).grad
            if gradient is not None:
                gradient[self._kept] = 0

    def _write(self, folder: Path, training_state: bool) -> None:
        own = {k: v.contiguous() for k, v in self.net.state_dict().items() if not k.startswith("backbone.")}
        save_file(own, folder / WEIGHTS)
        if training_state and self._optimizer is not None:
            state = {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}
            # In another batch, as padding has it, they would differ in the last bits.
            state["embeddings"] = self._embeddings
            torch.save(state, folder / OPTIMIZER)

    def read(self, folder: Path, about: About, training_state: bool) -> None:
        """Take over weights; the encoder's were loaded with it. Raises Corrupt when they do not fit."""
        pairs = matched(self.names, [one.name for one in about.candidates])
        try:
            saved = load_file(folder / WEIGHTS)
            own = {name: value for name, value in self.net.state_dict().items() if not name.startswith("backbone.")}
            if own.keys() != saved.keys():
                raise ValueError(f"weights differ by name, such as {min(own.keys() ^ saved.keys())}")
            for name, value in own.items():
                if name in self.net.per_candidate:
                    for here, there in pairs:
                        value[here] = saved[name][there]
                else:
                    value.copy_(saved[name])
            if training_state and about.kept is not None:
                self._freeze([self.names.index(name) for name in about.kept])
            if training_state and self._optimizer is not None:
                state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
                self._optimizer.load_state_dict(state["optimizer"])
                self._schedule.load_state_dict(state["schedule"])
                device = self._backbone.device
                self._embeddings = {text: vector.to(device) for text, vector in state["embeddings"].items()}
        except (OSError, ValueError, RuntimeError, KeyError, IndexError, SafetensorError) as error:
            raise Corrupt(f"{folder} does not hold the weights of this router: {error}") from error
        if self.config.learn == "new" and not training_state:
            self._freeze([here for here, _ in pairs])

    def _freeze(self, kept: list[int]) -> None:
        """Let only what belongs to candidates other than `kept` learn. Raises BadInput if there is nothing new."""
        if len(kept) == len(self.names):
            raise BadInput("learn: got 'new', but the router at `trained` knows all candidates; expected 'all'")
        self._kept = kept
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name in self.net.per_candidate)
        self._prepare_training()
