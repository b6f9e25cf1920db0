"""Every hyper-parameter of Q-RM: the reward model, what it learns from, and the policy's learning with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator

from cluster.config import MethodConfig, merged
from methods.advantages import KL, Normalisation
from methods.worlds.chain import ChainConfig
from protocols.losses import GRPOLoss, ReinforceLoss
from protocols.messages import SamplingParams
from protocols.model import TrainerConfig
from protocols.placement import Resources
from protocols.policy import PolicyConfig
from protocols.reward_model import FROM_PAIRS, RewardModelConfig
from protocols.service import Message

PRESETS = Path(__file__).parent / "presets"

Credit = Literal["own", "copied", "gae"]


class DataConfig(Message):
    """Files of preferences and prompts."""

    pairs: str = ""
    """Preferences, .jsonl or .jsonl.gz: `instruction`, `chosen`, `rejected`. Empty: they are sampled from the policy
    and told apart by the rules."""
    test_pairs: str = ""
    """Preferences to test the reward model on; empty: a share of `pairs`."""
    prompts: str = ""
    """Prompts for the policy, .jsonl or .jsonl.gz: `instruction`, `label`."""
    test_prompts: str = ""
    """Prompts to test the policy on; empty: a share of `prompts`."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of a file that is kept for tests where they have no file of their own."""


class PairConfig(Message):
    """Pairs made of the policy's own samples, where none are given (section 2.6)."""

    wanted: int = Field(default=4000, ge=1)
    """Pairs to make, of one right and one wrong reply to the same prompt."""
    samples: int = Field(default=4, ge=2)
    """Replies per prompt that they are chosen from."""


class AdvantageConfig(Message):
    """From scores of tokens to advantages (section 2.4)."""

    credit: Credit | None = None
    """`own`: a token's score is its return. `copied`: the reply's score is that of each token. `gae`: scores are
    rewards, the reply's at its last token, and advantages are estimated over them. Null: own for q_function, gated
    and exact credit; gae for PPO with outcome and implicit rewards; copied for rules; for REINFORCE own with implicit
    and copied with outcome rewards."""
    normalisation: Normalisation = "centred"
    """`centred`: less the batch's mean, over its deviation (paper). `scale_only`: over its deviation alone (reference
    code)."""
    last_token: Literal["own", "mean"] = "own"
    """`mean`: the last token's score is replaced by the reply's mean (reference code, REINFORCE)."""
    kl: KL = "k3"
    """Estimate of the KL that is taken off the scores."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Factor of the KL that is taken off the scores; that in the loss is the loss's own kl_coef."""
    baseline_weight: float = Field(default=1.0, ge=0)
    """Factor of the critic's values; 0: no critic."""
    baseline_scale: Literal["none", "std"] = "none"
    """`std`: values are divided by their deviation first (reference code)."""
    gamma: float = Field(default=0.9, ge=0, le=1)
    """Of gae: discount."""
    lam: float = Field(default=0.8, ge=0, le=1)
    """Of gae: decay of the estimates."""
    whiten: bool = False
    """Centre and scale the advantages over the batch."""


class DriftConfig(Message):
    """The alarm: the policy's accuracy falls and its score does not (section 4.3)."""

    fall: float = Field(default=0.05, gt=0)
    """Fall of Pass@1 below its best that counts."""
    enforce: bool = False
    """Whether the alarm ends the run."""


class Config(MethodConfig):
    """Q-RM: token-level values from preferences, as dense credit in reinforcement learning."""

    SHORTCUTS: ClassVar[dict[str, str]] = {
        "model": "policy.model",
        "lr": "policy.trainer.learning_rate",
        "pairs": "data.pairs",
        "prompts": "data.prompts",
    }

    world: Literal["text", "chain"] = "text"
    """`text`: pairs and prompts from files. `chain`: a generated world with known credit and its own tiny model."""
    data: DataConfig = DataConfig()
    """The files."""
    chain: ChainConfig = ChainConfig()
    """The generated world."""
    world_seed: int = Field(default=0, ge=0)
    """Seed of the generated world, of its base model and of pairs that are sampled."""
    pair_sampling: PairConfig = PairConfig()
    """Pairs from the policy's own samples."""
    stage: Literal["reward", "policy", "all"] = "all"
    """`reward`: train the reward model. `policy`: train the policy with one that is trained. `all`: one after the
    other."""
    reward_steps: int = Field(default=100, ge=0)
    """Of all: steps that train the reward model; the others train the policy."""
    pairs_per_step: int = Field(default=32, ge=1)
    """Pairs per step of the reward model."""
    source: Literal["reward_model", "rules", "exact"] = "reward_model"
    """Where rewards come from: the reward model; the rules, as an outcome; or the exact credit of world=chain."""
    policy: PolicyConfig = PolicyConfig()
    """The policy."""
    reward: RewardModelConfig = RewardModelConfig()
    """The reward model. In world=chain it starts from the policy's weights."""
    rules: RewardModelConfig = RewardModelConfig(kind="rules", resources=Resources())
    """The rules that say whether a reply is right."""
    critic: RewardModelConfig = RewardModelConfig(
        kind="value", trainer=TrainerConfig(learning_rate=1e-5, weight_decay=0.0)
    )
    """The critic; it starts from the policy's model unless it names one."""
    algorithm: Literal["ppo", "reinforce"] = "ppo"
    """`ppo`: clipped ratios and a critic. `reinforce`: neither, unless advantage.baseline_weight is set."""
    form: Literal["paper", "reference"] = "paper"
    """`reference`: defaults of the reference code where it differs from the paper: see methods/presets/."""
    advantage: AdvantageConfig = AdvantageConfig()
    """From scores to advantages."""
    ppo: GRPOLoss = GRPOLoss(dual_clip=0.0)
    """The loss of ppo."""
    reinforce: ReinforceLoss = ReinforceLoss()
    """The loss of reinforce."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts per step of the policy."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Replies per prompt."""
    mini_batches: int = Field(default=1, ge=1)
    """Optimiser steps per batch of replies."""
    sampling: SamplingParams = SamplingParams(max_tokens=512)
    """How replies are sampled."""
    reward_test_every: int = Field(default=25, ge=1)
    """Steps between tests of the reward model."""
    test_every: int = Field(default=10, ge=1)
    """Steps between tests of the policy."""
    test_prompts: int = Field(default=200, ge=1)
    """Prompts per test of the policy."""
    test_samples: int = Field(default=1, ge=1)
    """Replies to each of them; Pass@k and best-of-n go up to so many."""
    test_pairs: int = Field(default=500, ge=1)
    """Held-out pairs per test of the reward model."""
    target: float | None = Field(default=None, gt=0, le=1)
    """Pass@1 that ends the run; null: all steps are taken."""
    drift: DriftConfig = DriftConfig()
    """The alarm against exploited rewards."""
    dump_replies: int = Field(default=4, ge=0)
    """Replies per step whose tokens and values go to samples.jsonl."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.policy.trainer is None and self.stage != "reward":
            raise ValueError("policy.trainer is null, but the policy is to be trained; expected stage=reward")
        if self.stage == "all" and self.reward_steps >= self.steps and self.source == "reward_model":
            raise ValueError(f"reward_steps: got {self.reward_steps}, expected fewer than steps={self.steps}")
        if self.world == "text":
            self._check_files()
        if self.stage == "policy" and self.has_reward_model and self.reward.model == RewardModelConfig().model:
            raise ValueError("reward.model: expected the folder of a trained reward model for stage=policy")
        if self.source == "exact" and self.world != "chain":
            raise ValueError("source: exact credit is known in world=chain only")
        if self.has_reward_model:
            self._check_reward()
        if self.critic.kind != "value" or self.rules.kind != "rules":
            raise ValueError(
                f"critic.kind, rules.kind: got {self.critic.kind}, {self.rules.kind}; expected value, rules"
            )
        if self.algorithm == "reinforce" and self.mini_batches > 1:
            raise ValueError("mini_batches: expected 1 for reinforce, which has no ratios for what is off-policy")
        loss = self.ppo if self.algorithm == "ppo" else self.reinforce
        if loss.temperature != self.sampling.temperature:
            raise ValueError(f"sampling.temperature {self.sampling.temperature} and that of the loss differ")
        if self.advantage.credit == "gae" and not self.has_critic:
            raise ValueError("advantage.credit: gae needs a critic; set advantage.baseline_weight above 0")
        return self

    def _check_reward(self) -> None:
        if self.reward.kind not in (*FROM_PAIRS, "implicit_outcome"):
            kinds = ", ".join((*FROM_PAIRS, "implicit_outcome"))
            raise ValueError(f"reward.kind: got {self.reward.kind}, expected one that learns from pairs: {kinds}")
        trainer = self.reward.trainer
        if self.stage != "policy" and trainer is None:
            raise ValueError("reward.trainer is null, but the reward model is to be trained; expected stage=policy")
        if self.reward.lora and trainer and trainer.engine == "deepspeed" and trainer.zero_stage == 3:
            raise ValueError(
                "reward.lora: cannot be merged from shards when the run ends; expected zero_stage 1 or 2"
            )

    def _check_files(self) -> None:
        if not self.data.prompts and self.stage != "reward":
            raise ValueError("prompts: expected a .jsonl file (or world=chain for the built-in world)")
        if not self.data.pairs and not self.data.prompts:
            raise ValueError("pairs: expected a .jsonl file, or prompts to sample pairs for (or world=chain)")

    @property
    def has_critic(self) -> bool:
        """Whether values are learnt beside the policy."""
        return self.stage != "reward" and self.advantage.baseline_weight > 0

    @property
    def has_reward_model(self) -> bool:
        """Whether there is a reward model with weights."""
        return self.stage == "reward" or self.source == "reward_model"

    @property
    def reward_until(self) -> int:
        """The last step that trains the reward model."""
        if not self.has_reward_model:
            return 0
        return {"reward": self.steps, "policy": 0, "all": self.reward_steps}[self.stage]

    @property
    def needs_reference(self) -> bool:
        """Whether a KL to the untrained policy counts, in the loss or in the reward."""
        loss = self.ppo if self.algorithm == "ppo" else self.reinforce
        return loss.kl_coef + self.advantage.kl_coef > 0

    @property
    def credit(self) -> Credit:
        """How scores become the credit of tokens."""
        if self.advantage.credit is not None:
            return self.advantage.credit
        if self.source != "reward_model":
            return "own" if self.source == "exact" else "copied"
        if self.reward.kind in ("q_function", "gated"):
            return "own"
        if self.algorithm == "ppo" and self.has_critic:
            return "gae"
        return "own" if self.reward.needs_reference else "copied"


def preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """`world=chain`, `model=embedded`, `algorithm=reinforce` and `form=reference` have defaults of their own: see
    methods/presets/."""
    names = []
    if given.get("algorithm") == "reinforce":
        names.append("qrm-reinforce.yaml")
    if given.get("world") == "chain":
        names.append("qrm-chain.yaml")
    elif (given.get("policy") or {}).get("model", "embedded") == "embedded":
        names.append("qrm-embedded.yaml")
    if given.get("form") == "reference":
        names.append("qrm-reference.yaml")
        if given.get("algorithm") == "reinforce":
            names.append("qrm-reference-reinforce.yaml")
    values: dict[str, Any] = {}
    for name in names:
        values = merged(values, yaml.safe_load((PRESETS / name).read_text()))
    return values
