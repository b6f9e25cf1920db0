"""Every hyper-parameter of SPELL, with the specification's default (sections 2.2 to 2.8)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from cluster.config import MethodConfig
from methods.spell_maths import Combine, Shape
from methods.worlds.text import TextConfig
from protocols.losses import GRPOLoss
from protocols.messages import SamplingParams
from protocols.policy import PolicyConfig
from protocols.questioner import QuestionerConfig
from protocols.questions import Task
from protocols.reward_model import RewardModelConfig
from protocols.service import Message
from protocols.verifier import VerifierConfig

PRESETS = Path(__file__).parent / "presets"


class LedgerConfig(Message):
    """The generated world with known truth."""

    training_clusters: int = Field(default=240, ge=1)
    """Clusters to train on."""
    heldout_clusters: int = Field(default=20, ge=1)
    """Clusters for evaluation only."""
    wrong_references: float = Field(default=0.0, ge=0, le=1)
    """Spoils the base: share of the questioner's warm-start examples whose reference is a random value."""
    warmup_steps: int = Field(default=400, ge=0)
    """Optimiser steps that teach the questioner and the verifier."""
    responder_steps: int = Field(default=150, ge=0)
    """Further steps that add an unreliable responder."""


class RewardConfig(Message):
    """Rewards of the three roles."""

    shape: Shape = "gaussian"
    """Questioner reward by accuracy: SPELL eq. 7, or the reference code's `reverse` or `rzero`."""
    mu: float = Field(default=0.5, ge=0, le=1)
    """Accuracy that a question is rewarded most for."""
    sigma: float = Field(default=0.5 / 3, gt=0)
    """Width of the reward around mu."""
    combine: Combine = "max"
    """How rule and majority vote make the responder's reward (SPELL eq. 6: max)."""
    model_weight: float = Field(default=0.25, ge=0)
    """Factor of the reward model's score of an answer, standardised within its question, beside the verdict."""
    ungrounded: float = -0.5
    """Reward of a question that is answered without documents, or whose reference nothing supports."""
    bad_format: float = -1.0
    """Reward of a proposal that cannot be read."""


class GroundingConfig(Message):
    """The grounding filter: can a question be answered without its documents?"""

    enabled: bool = True
    """Whether to ask."""
    attempts: int = Field(default=4, ge=1)
    """Answers sampled without documents."""
    open_hits: int = Field(default=2, ge=1)
    """Right answers that reject a free or numerical question."""
    choice_hits: int = Field(default=3, ge=1)
    """Right answers that reject a multiple choice question (3 of 4 by luck: 5.1 %)."""

    @model_validator(mode="after")
    def _can_reject(self) -> Self:
        for name in ("open_hits", "choice_hits"):
            if getattr(self, name) > self.attempts:
                raise ValueError(f"{name} is {getattr(self, name)}, but there are only {self.attempts} attempts")
        return self

    def thresholds(self) -> dict[Task, int]:
        """Hits that reject a question, by task."""
        return {Task.GENERAL: self.open_hits, Task.MATH: self.open_hits, Task.CHOICE: self.choice_hits}


class RoleConfig(Message):
    """Which roles learn, and how much."""

    questioner: bool = True
    """Train on questions."""
    responder: bool = True
    """Train on answers."""
    verifier: bool = True
    """Train on votes."""
    weights: dict[Literal["questioner", "responder", "verifier"], float] | None = None
    """Null: one token mean over all roles. Else a mean per role, times its weight; 0 for a role without one."""
    negatives_ratio: float = Field(default=1.0, ge=0)
    """Rejected proposals trained on per good question."""
    verifier_share: float = Field(default=0.125, ge=0)
    """Votes trained on, as a share of the answers trained on."""
    agree_bounds: tuple[float, float] = (0.51, 0.99)
    """Share of the majority among the readable votes within which a vote group is trained on."""


class AuditConfig(Message):
    """Protection against collusion: the loop's own reward is not accuracy."""

    proposals: int = Field(default=100, ge=1)
    """Proposals audited before training and at every evaluation."""
    least_right: float = Field(default=0.75, ge=0, le=1)
    """The start gate: with a smaller share of right references, no training."""
    fall: float = Field(default=0.05, gt=0)
    """The re-audit: gold accuracy this far below its best, twice in a row, ends the run."""
    enforce: bool = True
    """Whether the gate and the re-audit stop the run, or only report."""
    judge: str = ""
    """Model (name or path) that audits references where the truth is not known; empty: none does."""
    judge_samples: int = Field(default=5, ge=1)
    """Answers of the judge per proposal; a reference is right if most of them match it."""


class Config(MethodConfig):
    """SPELL: questioner, responder and verifier are one policy that improves on unlabelled documents."""

    SHORTCUTS: ClassVar[dict[str, str]] = {
        "model": "policy.model",
        "lr": "policy.trainer.learning_rate",
        "documents": "text.documents",
        "clusters": "text.clusters",
        "qa": "text.qa",
    }

    world: Literal["text", "ledger"] = "text"
    """`text`: documents from files. `ledger`: a generated world with known truth and its own tiny model."""
    text: TextConfig = TextConfig()
    """Where real documents come from."""
    ledger: LedgerConfig = LedgerConfig()
    """Size of the generated world."""
    policy: PolicyConfig = PolicyConfig()
    """The one model that plays all roles."""
    questioner: QuestionerConfig = QuestionerConfig()
    """How questions are written and remembered."""
    verifier: VerifierConfig = VerifierConfig()
    """How answers are judged."""
    reward_model: RewardModelConfig | None = None
    """Scores the responder's answers beside the verdict (rewards.model_weight); it does not learn. Null: none."""
    proposals: Literal["questioner", "gold"] = "questioner"
    """`gold`: train on given questions with true answers instead (the RLVR baseline)."""
    questions_per_step: int = Field(default=128, ge=1)
    """N: good questions per update."""
    group_size: int = Field(default=8, ge=2)
    """G: answers per question."""
    votes: int = Field(default=8, ge=1)
    """Judgements per answer."""
    generation_batch: int = Field(default=480, ge=1)
    """Clusters that count as one batch of generation."""
    most_batches: int = Field(default=10, ge=1)
    """Generation batches after which an update makes do with what there is."""
    chunk: int = Field(default=8, ge=1)
    """Questions that move through the stages together: one call each to propose, probe, answer, verify."""
    chunks_in_flight: int = Field(default=4, ge=1)
    """Chunks under way at once (back-pressure)."""
    starved_share: float = Field(default=0.25, ge=0, le=1)
    """An update needs this share of N; below it the step is skipped and the questioner reads more."""
    task_weights: dict[Task, float] = {Task.GENERAL: 1.0, Task.MATH: 1.0, Task.CHOICE: 1.0}
    """Shares of the tasks among the clusters drawn; tasks without clusters are left out."""
    max_input_tokens: int = Field(default=18000, ge=1)
    """Longest responder prompt; questions over longer texts are skipped and counted."""
    question_sampling: SamplingParams = SamplingParams(max_tokens=4096, temperature=0.7, top_p=0.95)
    """How questions are sampled."""
    answer_sampling: SamplingParams = SamplingParams(max_tokens=4096, temperature=0.7, top_p=0.95)
    """How answers are sampled."""
    vote_sampling: SamplingParams = SamplingParams(max_tokens=512, temperature=0.7, top_p=0.95)
    """How judgements are sampled."""
    rewards: RewardConfig = RewardConfig()
    """Rewards of the roles."""
    grounding: GroundingConfig = GroundingConfig()
    """The grounding filter."""
    roles: RoleConfig = RoleConfig()
    """What is trained on."""
    remember: Literal["frontier", "solvable"] = "frontier"
    """Questions that enter the history: 0 < accuracy < 1 (paper), or also those that all answer (code)."""
    loss: GRPOLoss = GRPOLoss(temperature=0.7)
    """The policy-gradient loss; its temperature must be that of sampling."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a batch."""
    staleness: int = Field(default=0, ge=0)
    """Steps that self-play may be ahead of training. 0: strictly on-policy, one after the other. From 1 on both go on
    at once, ratios come into play, and runs no longer repeat to the last digit."""
    mini_batches: int = Field(default=1, ge=1)
    """Optimiser steps per pass; above 1 step in all, ratios come into play."""
    audit: AuditConfig = AuditConfig()
    """Start gate and re-audit."""
    test_every: int = Field(default=10, ge=1)
    """Steps between evaluations on held-out questions."""
    test_questions: int = Field(default=240, ge=1)
    """Held-out questions asked at each."""
    test_samples: int = Field(default=1, ge=1)
    """Answers to each of them."""
    dump_questions: int = Field(default=8, ge=0)
    """Questions per step whose samples go to samples.jsonl, with prompts, answers and votes; 0: none."""

    @field_validator("task_weights", mode="before")
    @classmethod
    def _others_keep_theirs(cls, given: Any) -> Any:
        return {**cls.model_fields["task_weights"].default, **given} if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        sampling = (self.question_sampling, self.answer_sampling, self.vote_sampling)
        for params in sampling:
            if params.temperature != self.loss.temperature:
                raise ValueError(
                    f"sampling at temperature {params.temperature} and a loss at {self.loss.temperature} differ"
                )
        if min(self.task_weights.values(), default=0.0) < 0 or not any(self.task_weights.values()):
            raise ValueError("task_weights: expected weights of 0 or more, not all 0")
        if self.reward_model is not None and self.reward_model.learns:
            raise ValueError("reward_model.trainer: expected null, SPELL does not train its reward model")
        if self.policy.trainer is None:
            raise ValueError("policy.trainer is null, but SPELL trains its policy")
        if self.world == "text" and not self.text.documents:
            raise ValueError(
                "documents: expected a file or folder of .txt, .md or .jsonl (or world=ledger for the built-in world)"
            )
        if self.world == "ledger" and (self.text.documents or self.policy.model != PolicyConfig().model):
            raise ValueError("world: the ledger has texts and a model of its own; leave out documents and model")
        return self


def fitted(config: Config, context_length: int) -> Config:
    """The configuration with lengths that the model can take.

    Each role keeps room for what it writes, and a question with an answer and its reference fits a verdict prompt.
    """
    longest = max(1, context_length * 3 // 8)
    questions, answers, votes = (
        params.model_copy(update={"max_tokens": min(params.max_tokens, longest)})
        for params in (config.question_sampling, config.answer_sampling, config.vote_sampling)
    )
    most = min(config.questioner.max_prompt_tokens, context_length - questions.max_tokens)
    return config.model_copy(
        update={
            "question_sampling": questions,
            "answer_sampling": answers,
            "vote_sampling": votes,
            "questioner": config.questioner.model_copy(update={"max_prompt_tokens": most}),
            "max_input_tokens": min(config.max_input_tokens, context_length - answers.max_tokens),
        }
    )


def preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """`world=ledger` and `model=embedded` have smaller defaults for some keys: see methods/presets/."""
    if given.get("world") == "ledger":
        name = "spell-ledger.yaml"
    elif (given.get("policy") or {}).get("model", "embedded") == "embedded":
        name = "spell-embedded.yaml"
    else:
        return {}
    values: dict[str, Any] = yaml.safe_load((PRESETS / name).read_text())
    return values
