"""Training rows and the messages of the learning verbs."""

from typing import Self

from pydantic import Field, model_validator

from protocols.losses import LossSpec
from protocols.service import Message
from protocols.tensor import PerToken, TokenIds, Versions

ARRAYS = ("advantages", "sampled_logprobs", "versions", "reference_logprobs", "targets", "old_scores")


class TrainRow(Message):
    """One token sequence to learn from. All arrays have its length T; entry t belongs to token t.

    Token 0 has no prediction, so its weights are 0.
    """

    row_id: str
    """Leads from the data row to metrics, logs and errors."""
    tokens: TokenIds
    """The whole sequence, prompt and completion alike, int32[T]."""
    terms: dict[str, PerToken]
    """Per loss term, the weight of each token, float32[T]; 0 keeps it out of the term and of its count."""
    advantages: PerToken | None = None
    """Advantage of each token, float32[T]; needed by policy-gradient terms."""
    sampled_logprobs: PerToken | None = None
    """Log-probs under the policy that sampled, float32[T]; unset: strictly on-policy, the ratio is 1."""
    versions: Versions | None = None
    """Weight version under which each token was sampled, int32[T]."""
    reference_logprobs: PerToken | None = None
    """Log-probs under the reference policy, float32[T]; needed by terms with a KL and by log-ratios."""
    pair: str = ""
    """Name that two rows share which a term over pairs compares."""
    targets: PerToken | None = None
    """What scores are to become, float32[T]; needed by `value` and `steps`."""
    old_scores: PerToken | None = None
    """Scores when the rows were sampled, float32[T]; needed by `value` with a clip."""

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        length = len(self.tokens)
        if length < 2:
            raise ValueError(f"row {self.row_id!r}: expected at least 2 tokens, got {length}")
        arrays = {f"terms[{name!r}]": weights for name, weights in self.terms.items()} | {
            name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None
        }
        for name, array in arrays.items():
            if len(array) != length:
                raise ValueError(f"row {self.row_id!r}: {name} has {len(array)} entries for {length} tokens")
        for name, weights in self.terms.items():
            if weights.array[0] != 0:
                raise ValueError(f"row {self.row_id!r}: terms[{name!r}][0] must be 0, token 0 is not predicted")
        return self


class ForwardBackwardRequest(Message):
    """Accumulates gradients of the sum of the loss terms over the rows."""

    rows: list[TrainRow] = Field(min_length=1)
    """The whole batch: each term is divided by its own count over exactly these rows."""
    losses: dict[str, LossSpec] = Field(min_length=1)
    """Term name to loss. Every term that a row names must be here."""
    counts: dict[str, float] = {}
    """Overrides a term's count, when one batch is split over several calls."""

    @model_validator(mode="after")
    def _known_terms(self) -> Self:
        for row in self.rows:
            unknown = sorted(row.terms.keys() - self.losses.keys())
            if unknown:
                raise ValueError(f"row {row.row_id!r}: no loss for the terms {', '.join(unknown)}")
        return self


class TermReport(Message):
    """What one loss term came to."""

    loss: float
    """Value of the term, before its factor."""
    count: float
    """What it was divided by: tokens or sequences with a non-zero weight, or pairs."""
    metrics: dict[str, float] = {}
    """Means over the term's tokens: ratio, clip share, KL, entropy, log-prob gap to the sampler. Over its pairs:
    margin, and share that is told apart."""


class ForwardBackwardResponse(Message):
    """The loss of the batch. Gradients stay in the trainer until `optim_step`."""

    loss: float
    """Sum over terms of factor times value."""
    terms: dict[str, TermReport]
    """Each term by name."""
    tokens: int
    """Tokens that went through the model, padding apart."""
    micro_batches: int
    """Number of pieces the batch was cut into."""


class OptimStepRequest(Message):
    """Applies the accumulated gradients."""

    learning_rate: float | None = Field(default=None, ge=0.0, le=1e6)
    """For this step only, instead of the schedule's."""


class OptimStepResponse(Message):
    """The step that was taken."""

    version: int
    """Weight version after the step."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate that was used."""
