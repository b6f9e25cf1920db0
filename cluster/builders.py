"""What makes each actor, where it is to live: imports that only that process needs are made there."""

from collections.abc import Sequence

from actors.actor import Actor
from protocols.policy import PolicyConfig, PolicyService
from protocols.questioner import QuestionerConfig
from protocols.retriever import RetrieverConfig, RetrieverService
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


def retriever(config: RetrieverConfig) -> Actor:
    """A retriever with its index in its own process."""
    from actors.retriever.retriever import RetrieverActor

    return RetrieverActor(config)


def retriever_shard(config: RetrieverConfig, index: int) -> Actor:
    """One of several retrievers that have a part of the documents each."""
    path = f"{config.path}/shard-{index}" if config.path else ""
    return retriever(config.model_copy(update={"shards": 1, "path": path}))


def sharded_retriever(config: RetrieverConfig, shards: Sequence[RetrieverService]) -> Actor:
    """A retriever over others, each of which has a part of the documents."""
    from actors.retriever.sharded import ShardedRetrieverActor

    return ShardedRetrieverActor(config, shards)
