"""Every hyper-parameter of SEFT: the annotated data, the reviser, the rounds, and the baselines beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator

from cluster.config import MethodConfig
from methods.seft_triples import LabelRule
from methods.worlds.sorting import SortingConfig
from protocols.losses import DPOLoss, ORPOLoss
from protocols.messages import SamplingParams
from protocols.model import TrainerConfig
from protocols.policy import PolicyConfig
from protocols.reviser import ReviserConfig
from protocols.reward_model import RewardModelConfig
from protocols.service import Message

PRESETS = Path(__file__).parent / "presets"
OWN = ("seft", "self_train", "best_of_n")
"""Algorithms whose policy learns from replies to prompts without annotation."""


class Acceptance(Message):
    """What a trained reviser must reach on annotated prompts that it has not seen."""

    harm: float = Field(default=0.1, ge=0, le=1)
    """Largest share of the best replies that it makes worse."""
    copies: float = Field(default=0.2, ge=0, le=1)
    """Largest share of texts for `minor` and `major` that are the reply again."""
    no_precision: float = Field(default=0.1, ge=0, le=1)
    """Smallest share of the policy's own replies labelled `no` that are as good as the best annotated one."""
    enforce: bool = True
    """End the run when the reviser fails; false: note it and go on."""


class Drift(Message):
    """When the rounds end (section 4, item 2): the policy comes to write as the reviser does, which likes its
    style."""

    rise: float = Field(default=0.2, ge=0, le=1)
    """The alarm rings when the share of replies labelled `no` is so much above that of the first policy, and the last
    round has not gained."""
    gain: float = Field(default=0.0, ge=0)
    """What the development score must gain in a round."""
    enforce: bool = True
    """End the run after a round without a gain; false: note it and go on."""


class Config(MethodConfig):
    """SEFT and what it is compared with."""

    # Schedules and phases are as long as the run.
    MAY_CHANGE: ClassVar[frozenset[str]] = MethodConfig.MAY_CHANGE - {"steps"}

    algorithm: Literal["seft", "self_train", "best_of_n", "sft", "dpo", "orpo"] = "seft"
    """`seft`; from prompts alone `self_train` (own replies as they are) and `best_of_n` (of own replies the one that
    a reward model likes best); from annotated replies `sft` (the best), `dpo`, `orpo` (pairs of the best and
    another)."""
    evolution: Literal["internal", "external", "both"] = "both"
    """`internal`: the reviser chooses among the policy's replies. `external`: it revises them. `both`: the first
    round is internal, later ones external."""
    world: Literal["", "sorting"] = ""
    """A built-in world instead of data. `sorting`: digits to be sorted, a tiny model, known truth."""
    world_seed: int | None = Field(default=None, ge=0)
    """Seed of the world and its first policy; null: that of the run."""
    sorting: SortingConfig = SortingConfig()
    """The world of that name."""
    preferences: list[str] = []
    """Files of prompts with replies of known order (.jsonl, .jsonl.gz): Nectar, UltraFeedback, chosen/rejected,
    ..."""
    revisions: list[str] = []
    """Files of texts with proposed edits that people accepted or rejected one by one ({before, proposed,
    after_accepted, edits, ...}): the reviser learns from them too."""
    prompts: list[str] = []
    """Files of prompts without annotation: messages, ShareGPT, Alpaca, {prompt}."""
    test_prompts: list[str] = []
    """Files of prompts for the test, with or without a reply to compare with."""
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share of annotated prompts, by a hash of the prompt, that nothing learns from: they test reviser and rounds. Of
    `revisions` as large a share of the documents, by a hash of their names."""

    policy: PolicyConfig = PolicyConfig(trainer=TrainerConfig(learning_rate=5e-6))
    """The policy."""
    reviser: ReviserConfig = ReviserConfig()
    """How the reviser is asked."""
    reviser_policy: PolicyConfig = PolicyConfig(
        trainer=TrainerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=30, total_steps=1000)
    )
    """Its model; where none is named, it starts from the policy's. Its schedule is as long as its training."""
    reviser_trained: str = ""
    """The folder `reviser` of another run, whose reviser is used as it is; empty: one is trained."""
    reward: RewardModelConfig | None = None
    """Scores replies: for `best_of_n`, which trains it first, on the annotated pairs; elsewhere a trained one, for
    revisions that must not be worse and for the development score."""
    judge: PolicyConfig | None = None
    """A model that compares the best round's replies to the test prompts with the first policy's, in both orders. It
    takes no part in training."""
    stronger: PolicyConfig | None = None
    """A stronger model, whose replies take the place of the policy's at some prompts of external rounds."""
    stronger_share: float = Field(default=0.25, ge=0, le=1)
    """Share of these prompts."""

    rule: LabelRule = LabelRule()
    """How labels follow from the order of replies."""
    reviser_steps: int = Field(default=1000, ge=1)
    """Optimiser steps of the reviser, or of the reward model for `best_of_n`."""
    examples_per_step: int = Field(default=128, ge=1)
    """Examples of each."""
    own_replies: int = Field(default=0, ge=0)
    """Replies of the first policy to each annotated prompt that the reviser learns from too, by their distance to the
    best annotated one."""
    acceptance: Acceptance = Acceptance()
    """When the reviser may revise."""

    rounds: int = Field(default=2, ge=1)
    """Rounds; of the algorithms that learn from annotated replies, tests of which the best counts."""
    prompts_per_round: int = Field(default=0, ge=0)
    """Prompts of a round, fresh ones as long as there are some; 0: all of them in each round."""
    prompts_per_call: int = Field(default=512, ge=1)
    """Prompts that are asked together; a killed round goes on with the call that was under way."""
    sampling: SamplingParams = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=1024)
    """How the policy replies in rounds; in tests it takes the most likely tokens."""
    own_samples: int = Field(default=4, ge=1)
    """Replies to each prompt to choose from, in internal rounds and for `best_of_n`."""
    least_own_score: float = Field(default=0.5, ge=0, le=1)
    """Prompts whose best reply has less of p(no) + p(minor) / 2 are left out of internal rounds."""
    choose: bool = False
    """Label revisions again, and keep the reply where the reviser likes it better than its own revision."""
    by_confidence: bool = False
    """Weight what the policy learns by how sure the reviser is of it: a revision by the probability of the reply's
    label, a reply that is kept by p(no), one that is chosen among others by p(no) + p(minor) / 2."""
    round_steps: int = Field(default=400, ge=1)
    """Optimiser steps of a round."""
    targets_per_step: int = Field(default=128, ge=1)
    """Replies, or pairs, of each."""
    from_start: bool = False
    """Begin each round's training with the first policy again, on the targets of all rounds so far."""
    annotated_share: float = Field(default=0.0, ge=0, lt=1)
    """Of algorithms that learn without annotation: share of each step that is best annotated replies instead, against
    forgetting (section 4, item 6)."""
    dpo: DPOLoss = DPOLoss()
    """The loss of `dpo`."""
    orpo: ORPOLoss = ORPOLoss()
    """The loss of `orpo`."""
    drift: Drift = Drift()
    """When rounds end early."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if bool(self.world) == bool(self.preferences):
            raise ValueError("preferences: expected files of annotated replies, or a world")
        if not self.world and self.algorithm in OWN and not self.prompts:
            raise ValueError(f"prompts: expected files of prompts, which {self.algorithm} learns from")
        if self.world and (self.prompts or self.test_prompts or self.revisions):
            raise ValueError(f"prompts, test_prompts, revisions: the world {self.world!r} has its own; expected none")
        if self.policy.trainer is None:
            raise ValueError("policy.trainer: expected one, to train")
        if self.revises and not self.reviser_trained and self.reviser_policy.trainer is None:
            raise ValueError("reviser_policy.trainer: expected one, to train")
        if self.reviser_trained and (not self.revises or self.own_replies):
            raise ValueError(
                "reviser_trained: it is of the algorithm seft, and learns nothing; own_replies must be 0"
            )
        if self.algorithm == "best_of_n" and self.reward is None:
            raise ValueError("reward: expected a reward model, which best_of_n chooses by")
        if self.reward is not None and self.reward.kind == "rules":
            raise ValueError("reward.kind: rules need a right answer, which prompts do not have; expected a model")
        if self.judge is not None and self.reward is not None and self.judge.model == self.reward.model:
            raise ValueError("judge.model: it is the reward model's, which training goes by; expected another")
        if self.reward is not None and self.reward.learns and self.algorithm != "best_of_n":
            raise ValueError(
                "reward.trainer: best_of_n alone trains it; expected null, and reward.model a trained one"
            )
        if self.revises and not self.reviser.adaptive and self.evolution != "external":
            raise ValueError("evolution: a reviser without labels cannot choose; expected external")
        if self.choose and not self.reviser.adaptive:
            raise ValueError("choose: a reviser without labels cannot choose; expected false")
        self._has_no_idle_keys()
        last = self.first_phase + self.rounds * self.round_steps
        if self.steps > self.first_phase and (
            self.steps > last or (self.steps - self.first_phase) % self.round_steps
        ):
            raise ValueError(
                f"steps: got {self.steps}; expected the end of a round, at most {last} (rounds, round_steps)"
            )
        return self

    def _has_no_idle_keys(self) -> None:
        external = self.revises and self.evolution != "internal"
        used = {
            "own_replies": (self.own_replies, self.revises),
            "revisions": (self.revisions, self.revises),
            "choose": (self.choose, external),
            "by_confidence": (self.by_confidence, self.revises and self.reviser.adaptive),
            "stronger": (self.stronger, external or self.algorithm == "self_train"),
            "from_start": (self.from_start, self.algorithm in OWN and self.rounds > 1),
            "annotated_share": (self.annotated_share, self.algorithm in OWN),
        }
        for name, (given, works) in used.items():
            if given and not works:
                raise ValueError(f"{name}: it does nothing for this algorithm and evolution; expected none")
        if round(self.annotated_share * self.targets_per_step) >= self.targets_per_step:
            raise ValueError("annotated_share: no target of the round is left in a step; expected less")

    @model_validator(mode="before")
    @classmethod
    def _as_many_steps_as_it_takes(cls, given: Any) -> Any:
        """All phases together; a given number of steps is kept, so that a run may end early."""
        if not isinstance(given, Mapping) or "steps" in given:
            return given
        names = ("algorithm", "reviser_steps", "reviser_trained", "rounds", "round_steps")
        algorithm, first, trained, rounds, each = (given.get(name, cls.model_fields[name].default) for name in names)
        try:
            learns_first = (
                _learns(given.get("reward")) if algorithm == "best_of_n" else algorithm == "seft" and not trained
            )
            return {**given, "steps": (int(first) if learns_first else 0) + int(rounds) * int(each)}
        except (TypeError, ValueError):
            return given  # the field's own message is clearer

    @property
    def revises(self) -> bool:
        """Whether there is a reviser."""
        return self.algorithm == "seft"

    @property
    def first_phase(self) -> int:
        """Steps before the policy learns."""
        if self.revises:
            return 0 if self.reviser_trained else self.reviser_steps
        learns = self.algorithm == "best_of_n" and self.reward is not None and self.reward.learns
        return self.reviser_steps if learns else 0

    @property
    def seed_of_world(self) -> int:
        """What the world is drawn from."""
        return self.seed if self.world_seed is None else self.world_seed

    @property
    def greedy(self) -> SamplingParams:
        """How texts are written where nothing is to be drawn: revisions, and replies to tests."""
        return self.sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0})

    def round_of(self, step: int) -> tuple[int, int]:
        """The round that a step is of, counted from 1, and its place there from 0; round 0 comes before them."""
        if step <= self.first_phase:
            return 0, step - 1
        turn, place = divmod(step - self.first_phase - 1, self.round_steps)
        return turn + 1, place

    def internal(self, turn: int) -> bool:
        """Whether a round, counted from 1, keeps to the policy's own replies."""
        return self.evolution == "internal" or (self.evolution == "both" and turn == 1)


def _learns(reward: Any) -> bool:
    if isinstance(reward, Mapping):
        return reward.get("kind") != "rules" and reward.get("trainer", True) is not None
    return isinstance(reward, RewardModelConfig) and reward.learns


def preset(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Defaults for a built-in world, and for the embedded model."""
    policy = given.get("policy")
    embedded = not isinstance(policy, Mapping) or policy.get("model", "embedded") == "embedded"
    name = given.get("world") or ("embedded" if embedded else "")
    file = PRESETS / f"seft-{name}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
