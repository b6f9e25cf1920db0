"""Networks that give a query one logit per candidate: lookahead, and those that read the query alone."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from actors.policy.microbatch import by_length
from actors.router.backbone import Backbone
from actors.router.layout import (
    NOTHING,
    Ids,
    Layout,
    Packed,
    apart_mask,
    causal_layout,
    causal_mask,
    masked_layout,
    query_layout,
)
from protocols.router import RouterConfig

SCORING_TOKENS = 8192
"""Tokens, padding included, that are scored at once."""


@dataclass(frozen=True)
class Output:
    """What a network says of B queries."""

    logits_BT: torch.Tensor
    """One per candidate."""
    response_loss: torch.Tensor | None = None
    """Cross-entropy of the answers' tokens, summed; nothing if none were predicted."""


class Net(torch.nn.Module):
    """A network over queries. Tensors named in `per_candidate` have one row per candidate."""

    per_candidate: tuple[str, ...] = ()

    @abstractmethod
    def layout(self, query: Ids, answers: Sequence[Ids] | None, rate: float) -> Layout:
        """The row that stands for a query, with the answers of its pool to learn from if there are any."""

    @abstractmethod
    def forward(self, rows: Sequence[Layout]) -> Output:
        """Logits of each candidate."""


class Head(torch.nn.Module):
    """From a state to a number per candidate: dense, GELU, norm, dropout, linear."""

    def __init__(self, width: int, pool: int, dropout: float) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)
        self.dropout = torch.nn.Dropout(dropout)
        self.out = torch.nn.Linear(width, pool)

    def forward(self, states_BD: torch.Tensor) -> torch.Tensor:
        """float32[B, D] -> float32[B, T]."""
        logits_BT: torch.Tensor = self.out(self.dropout(self.norm(F.gelu(self.dense(states_BD)))))
        return logits_BT


class MaskedLookahead(Net):
    """Masked places for the answers of all candidates follow the query; the first state decides (section 2.5)."""

    per_candidate = ("slots", "head.out.weight", "head.out.bias")

    def __init__(self, backbone: Backbone, config: RouterConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self._pool, self._size = len(config.candidates), config.response_tokens
        self._apart = config.blocks == "apart"
        backbone.check_blocks(apart=self._apart)
        self.slots = fresh_slots(backbone, self._pool)
        self.head = Head(backbone.width, self._pool, config.dropout)

    def layout(self, query: Ids, answers: Sequence[Ids] | None, rate: float) -> Layout:
        """The query and a block of masks per candidate."""
        return masked_layout(query, answers, self._pool, self._size, self.backbone.end, rate)

    def forward(self, rows: Sequence[Layout]) -> Output:
        """Logits from the first state, and the loss of what the masks hide."""
        packed = Packed.of(rows, self.backbone.device)
        predict = any(row.predicted for row in rows)
        mask = apart_mask(packed) if self._apart else None
        states_BLD, logits_NV = self.backbone(packed, self.slots, mask, predict)
        return Output(self.head(states_BLD[:, 0]), response_loss(logits_NV, packed))


class CausalLookahead(Net):
    """Each candidate's own token follows the query; its state decides and begins the answer (section 2.4)."""

    per_candidate = ("slots",)

    def __init__(self, backbone: Backbone, config: RouterConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self._pool = len(config.candidates)
        backbone.check_blocks(apart=False)
        self.slots = fresh_slots(backbone, self._pool)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.out = torch.nn.Linear(backbone.width, 1)

    def layout(self, query: Ids, answers: Sequence[Ids] | None, rate: float) -> Layout:
        """The query, and per candidate its token and answer."""
        return causal_layout(query, answers, self._pool)

    def forward(self, rows: Sequence[Layout]) -> Output:
        """Logits from the state at each candidate's token, and the loss of the answers after it."""
        packed = Packed.of(rows, self.backbone.device)
        predict = any(row.predicted for row in rows)
        states_BLD, logits_NV = self.backbone(packed, self.slots, causal_mask(packed), predict)
        # Each row has its slots in the order of the pool.
        own_BTD = states_BLD[packed.slots != NOTHING].view(len(rows), self._pool, -1)
        return Output(self.out(self.dropout(own_BTD)).squeeze(-1), response_loss(logits_NV, packed))


class Classifier(Net):
    """The query alone: its first state (masked encoder) or last one (causal), and a head (MLC)."""

    per_candidate = ("head.out.weight", "head.out.bias")

    def __init__(self, backbone: Backbone, config: RouterConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Head(backbone.width, len(config.candidates), config.dropout)

    def layout(self, query: Ids, answers: Sequence[Ids] | None, rate: float) -> Layout:
        """The query."""
        return query_layout(query)

    def forward(self, rows: Sequence[Layout]) -> Output:
        """Logits from the query's state."""
        return Output(self.head(query_states(self.backbone, rows)))


class Contrastive(Net):
    """Cosine of the query's state and one learnt vector per candidate (RouterDC)."""

    per_candidate = ("vectors",)

    def __init__(self, backbone: Backbone, config: RouterConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self._temperature = config.temperature
        self.vectors = torch.nn.Parameter(torch.randn(len(config.candidates), backbone.width) * 0.78)

    def layout(self, query: Ids, answers: Sequence[Ids] | None, rate: float) -> Layout:
        """The query."""
        return query_layout(query)

    def forward(self, rows: Sequence[Layout]) -> Output:
        """Similarities over the temperature."""
        states_BD = F.normalize(query_states(self.backbone, rows), dim=1)
        return Output(states_BD @ F.normalize(self.vectors, dim=1).T / self._temperature)


class OnEmbeddings(torch.nn.Module):
    """A head over embeddings that do not change: `linear`, `mlp`, or `matrix`.

    `matrix`: logit_t = w . (v_t * (W x + b)), a factorisation of who wins on what (RouteLLM, arXiv 2406.18665).
    """

    def __init__(self, width: int, config: RouterConfig) -> None:
        super().__init__()
        pool, hidden = len(config.candidates), config.hidden
        self._kind = config.kind
        self.per_candidate = ("vectors",) if config.kind == "matrix" else ("out.weight", "out.bias")
        if config.kind == "linear":
            self.out = torch.nn.Linear(width, pool)
            return
        self.dense = torch.nn.Linear(width, hidden)
        self.dropout = torch.nn.Dropout(config.dropout)
        if config.kind == "matrix":
            self.vectors = torch.nn.Parameter(torch.randn(pool, hidden))
            self.out = torch.nn.Linear(hidden, 1, bias=False)
        else:
            self.out = torch.nn.Linear(hidden, pool)

    def forward(self, embeddings_BD: torch.Tensor) -> Output:
        """float32[B, D] -> logits float32[B, T]."""
        if self._kind == "linear":
            return Output(self.out(embeddings_BD))
        hidden_BH = self.dense(embeddings_BD)
        if self._kind == "mlp":
            return Output(self.out(self.dropout(F.gelu(hidden_BH))))
        return Output(self.out(self.dropout(hidden_BH)[:, None] * self.vectors[None]).squeeze(-1))


def fresh_slots(backbone: Backbone, pool: int) -> torch.nn.Parameter:
    """An embedding per candidate, that of the mask token (or the mean of all) and noise, float32[T, E].

    The noise is of the size that embeddings have, for the blocks must be told apart.
    """
    base_E = backbone.mask_embedding().float()
    noise_TE = torch.randn(pool, len(base_E), device=base_E.device)
    return torch.nn.Parameter(base_E + noise_TE * backbone.embeddings.float().std())


def query_states(backbone: Backbone, rows: Sequence[Layout]) -> torch.Tensor:
    """The state that has read the whole query, float32[B, D]."""
    packed = Packed.of(rows, backbone.device)
    states_BLD, _ = backbone(packed, None, None)
    if backbone.masked:
        return states_BLD[:, 0]  # type: ignore[no-any-return]
    last_B = packed.there.sum(1) - 1
    return states_BLD[torch.arange(len(rows), device=last_B.device), last_B]  # type: ignore[no-any-return]


def in_groups(rows: Sequence[Layout], compute: Callable[[list[Layout]], torch.Tensor]) -> torch.Tensor:
    """What is computed of each row, [B, ...], with rows of like length together."""
    groups = by_length([len(row) for row in rows], SCORING_TOKENS)
    parts = torch.cat([compute([rows[i] for i in group]) for group in groups])
    return parts[torch.tensor([i for group in groups for i in group], device=parts.device).argsort()]


def embedded(backbone: Backbone, rows: Sequence[Layout]) -> torch.Tensor:
    """Embeddings of queries, float32[B, D]."""
    return in_groups(rows, lambda chosen: mean_states(backbone, chosen))


def mean_states(backbone: Backbone, rows: Sequence[Layout]) -> torch.Tensor:
    """Embeddings: the mean of the states over the query, of length 1, float32[B, D]."""
    packed = Packed.of(rows, backbone.device)
    states_BLD, _ = backbone(packed, None, None)
    return F.normalize((states_BLD * packed.there[..., None]).sum(1), dim=1)


def response_loss(logits_NV: torch.Tensor | None, packed: Packed) -> torch.Tensor | None:
    """Cross-entropy of the labelled places, summed."""
    if logits_NV is None:
        return None
    return F.cross_entropy(logits_NV, packed.labels[packed.labels != NOTHING], reduction="sum")


def net_of(backbone: Backbone, config: RouterConfig) -> Net | OnEmbeddings:
    """The network of a kind."""
    if config.kind == "lookahead":
        return (MaskedLookahead if backbone.masked else CausalLookahead)(backbone, config)
    if config.kind == "router_dc":
        return Contrastive(backbone, config)
    if config.kind in ("classifier", "zooter"):
        return Classifier(backbone, config)
    return OnEmbeddings(backbone.width, config)
