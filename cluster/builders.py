"""What makes each actor, where it is to live: imports that only that process needs are made there."""

from actors.actor import Actor
from protocols.policy import PolicyConfig, PolicyService
from protocols.questioner import QuestionerConfig
from protocols.reviser import ReviserConfig
from protocols.reward_model import RewardModelConfig
from protocols.router import RouterConfig
from protocols.verifier import VerifierConfig
from protocols.workers import TrainerService


def policy(config: PolicyConfig) -> Actor:
    """A policy in one process."""
    if config.sampler.engine == "vllm":
        from actors.policy.vllm_sampler import VLLMSamplerActor

        return VLLMSamplerActor(config)
    from actors.policy.policy import PolicyActor

    return PolicyActor(config)


def sampler(config: PolicyConfig) -> Actor:
    """A sampler of a policy whose trainer lives elsewhere."""
    if config.sampler.engine == "vllm":
        from actors.policy.vllm_sampler import VLLMSamplerActor

        return VLLMSamplerActor(config)
    from actors.policy.sampler_worker import SamplerActor

    return SamplerActor(config)


def questioner(config: QuestionerConfig, policy: PolicyService) -> Actor:
    """A questioner over a policy."""
    from actors.questioner import QuestionerActor

    return QuestionerActor(config, policy)


def verifier(config: VerifierConfig, policy: PolicyService | None) -> Actor:
    """A verifier, over a policy or by rules alone."""
    from actors.verifier import VerifierActor

    return VerifierActor(config, policy)


def reviser(config: ReviserConfig, policy: PolicyService) -> Actor:
    """A reviser over a policy."""
    from actors.reviser import ReviserActor

    return ReviserActor(config, policy)


def reward_model(config: RewardModelConfig, ranks: TrainerService | None) -> Actor:
    """A reward model over its ranks, or with its model in its own process."""
    if config.kind == "rules":
        from actors.reward_model.rules import RuleRewardActor

        return RuleRewardActor(config)
    from actors.reward_model.reward_model import RewardModelActor

    return RewardModelActor(config, ranks)


def router(config: RouterConfig) -> Actor:
    """A router with its encoder in its own process."""
    from actors.router.router import RouterActor

    return RouterActor(config)
