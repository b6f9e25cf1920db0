"""The vLLM sampler says what the transformers sampler says, and takes new weights between two tokens."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.inline import InlineTransport
from methods.worlds.ledger import vocabulary
from protocols.errors import BadInput, Corrupt
from protocols.losses import GRPOLoss, SFTLoss
from protocols.messages import Completion, FinishReason, Prompt, SamplingParams, Structure
from protocols.policy import EmbedRequest, PolicyConfig, PolicyService, SampleRequest, SampleResponse, ScoreRequest
from protocols.service import Empty
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
"""Of log-probs, in nats."""
CONTEXT = 192
# vLLM's attention on a CPU wants heads of 32 numbers or more.
COMMON = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 7,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": COMMON | {"tie_word_embeddings": True},
    "gemma2": COMMON
    | {
        "sliding_window": 40,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 32,
    },
}
RNG = np.random.default_rng(0)
# Two begin alike, over more than one block of the cache.
SHARED = RNG.integers(8, 180, 70)
PROMPTS = [
    Prompt(tokens=np.arange(20, 24), seed=1),
    Prompt(tokens=np.r_[SHARED, 9], seed=2),
    Prompt(tokens=np.r_[SHARED, 11, 12], seed=3),
]
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40),
    "plain": SamplingParams(max_tokens=70),
    "warm": SamplingParams(max_tokens=40, temperature=0.7),
    "top-p": SamplingParams(max_tokens=40, top_p=0.8),
    "top-k": SamplingParams(max_tokens=40, top_k=5, top_p=0.9, temperature=1.3),
    "stops": SamplingParams(max_tokens=70, stop_token_ids=[30, 31, 32, 33], stop=["owns", "a"]),
    "to the end of the context": SamplingParams(max_tokens=1000),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, ledger_dir: Path) -> dict[str, str]:
    directories = {}
    for name, options in ARCHITECTURES.items():
        directory = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**options)).save_pretrained(directory)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ledger_dir / file, directory)
        directories[name] = str(directory)
    return directories


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(MethodConfig(runs_dir=str(tmp_path)), method="test", run="one") as cluster:
        yield cluster


def a_policy(model: str, engine: str, **options: Any) -> PolicyConfig:
    given = {"model": model, "threads": 1, "device": "cpu", "trainer": None, "sampler": {"engine": engine}}
    return PolicyConfig.model_validate(given | options)


def completions(response: SampleResponse) -> list[Completion]:
    return [one for result in response.results for one in result.completions]


def assert_alike(ones: SampleResponse, others: SampleResponse) -> None:
    for one, other in zip(completions(ones), completions(others), strict=True):
        assert one.tokens == other.tokens
        assert (one.text, one.finish_reason, one.versions) == (other.text, other.finish_reason, other.versions)
        np.testing.assert_allclose(other.logprobs.array, one.logprobs.array, atol=TOLERANCE)


def sequences(response: SampleResponse) -> list[Any]:
    return [
        np.r_[result.prompt_tokens.array, one.tokens.array]
        for result in response.results
        for one in result.completions
    ]


async def pair(cluster: Cluster, model: str, **options: Any) -> tuple[PolicyService, PolicyService]:
    return (
        await cluster.policy(a_policy(model, "transformers", **options), name="transformers"),
        await cluster.policy(a_policy(model, "vllm", **options), name="vllm"),
    )


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
async def test_both_samplers_draw_the_same_tokens_with_the_same_log_probs(
    name: str, cluster: Cluster, models: dict[str, str]
) -> None:
    one, other = await pair(cluster, models[name])
    facts, others = await one.info(Empty()), await other.info(Empty())
    assert facts == others
    # Calls of several kinds at once share one batch.
    requests = [SampleRequest(prompts=PROMPTS, n=3, params=params) for params in PARAMS.values()]
    expected = [await one.sample(request) for request in requests]
    for ones, theirs in zip(expected, await asyncio.gather(*map(other.sample, requests)), strict=True):
        assert_alike(ones, theirs)
    reasons = {done.finish_reason for response in expected for done in completions(response)}
    assert reasons == {FinishReason.STOP, FinishReason.STOP_TEXT, FinishReason.LENGTH}

    scored = [
        ScoreRequest(sequences=sequences(response), temperature=temperature)
        for response in expected
        for temperature in (1.0, 0.6)
    ]
    full = ScoreRequest(sequences=[RNG.integers(0, 180, CONTEXT), RNG.integers(0, 180, 1)])
    scored += [
        request.model_copy(update={"last": last}) for request in (*scored[:2], full) for last in (1, 3, 40, CONTEXT)
    ]
    for request, theirs in zip(
        [*scored, full], await asyncio.gather(*map(other.score, [*scored, full])), strict=True
    ):
        for row, found in zip((await one.score(request)).logprobs, theirs.logprobs, strict=True):
            np.testing.assert_allclose(found.array, row.array, atol=TOLERANCE)


async def test_random_weights_and_a_stream(cluster: Cluster, ledger_dir: Path, models: dict[str, str]) -> None:
    one, other = await pair(cluster, models["llama"], init="random", seed=5)
    request = SampleRequest(prompts=PROMPTS[:2], n=2, params=PARAMS["stops"])
    expected = completions(await one.sample(request))
    grown: dict[tuple[int, int], list[Any]] = {}
    async for delta in other.stream(request):
        grown.setdefault((delta.prompt_index, delta.sample_index), []).append(delta)
    assert sorted(grown) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (_, deltas), done in zip(sorted(grown.items()), expected, strict=True):
        assert [int(t) for d in deltas for t in d.tokens.array] == done.tokens.tolist()
        assert "".join(d.text for d in deltas) == done.text
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [done.finish_reason]


@pytest.fixture
async def vllm(cluster: Cluster, models: dict[str, str]) -> PolicyService:
    return await cluster.policy(a_policy(models["llama"], "vllm"))


def actor(cluster: Cluster, name: str) -> Any:
    transport = cluster._started[name][0]
    assert isinstance(transport, InlineTransport)
    return transport.actor


async def test_a_caller_who_leaves_ends_his_completions_and_no_others(vllm: PolicyService, cluster: Cluster) -> None:
    engine = actor(cluster, "policy")._engine
    request = SampleRequest(prompts=PROMPTS, n=4, params=SamplingParams(max_tokens=60))
    expected = await vllm.sample(request)
    staying = asyncio.ensure_future(vllm.sample(request))
    leaving = asyncio.ensure_future(vllm.sample(request))
    async for _ in vllm.stream(request):
        if len(engine._tickets) == 36:
            break  # closes this stream too
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert_alike(expected, await staying)
    assert engine._tickets == {}
    assert not await engine.run(engine._engine.has_unfinished_requests)


async def test_structures(cluster: Cluster) -> None:
    vllm = await cluster.policy(a_policy("embedded", "vllm"))
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }

    async def texts(structure: Structure) -> set[str]:
        params = SamplingParams(max_tokens=40, temperature=1.5, structure=structure)
        prompts = [Prompt(text="The answer is", seed=seed) for seed in range(4)]
        response = await vllm.sample(SampleRequest(prompts=prompts, n=4, params=params))
        assert {one.finish_reason for one in completions(response)} == {FinishReason.STOP}
        assert all(np.isfinite(one.logprobs.array).all() for one in completions(response))
        return {one.text for one in completions(response)}

    assert await texts(Structure(choices=["yes", "no"])) <= {"yes", "no"}
    assert all(re.fullmatch(r"[0-9]{3}-[a-c]", text) for text in await texts(Structure(regex="[0-9]{3}-[a-c]")))
    found = await texts(Structure(json_schema=json.dumps(schema)))
    assert {json.loads(text)["a"] for text in found} <= {1, 22}


async def test_a_model_that_does_not_exist(cluster: Cluster) -> None:
    with pytest.raises(BadInput, match=r"model: '\./nothing' does not exist"):
        await cluster.policy(a_policy("./nothing", "vllm"))


async def test_narrow_heads_are_refused_at_the_start(cluster: Cluster, ledger_dir: Path) -> None:
    with pytest.raises(
        BadInput, match=r"heads are 16 wide; vLLM on a CPU computes 32, 64, .* set it to transformers"
    ):
        await cluster.policy(a_policy(str(ledger_dir), "vllm", init="random"))


async def test_the_transformers_sampler_has_no_structures(cluster: Cluster, models: dict[str, str]) -> None:
    policy = await cluster.policy(a_policy(models["llama"], "transformers"))
    params = SamplingParams(structure=Structure(choices=["yes"]))
    with pytest.raises(BadInput, match=r"params\.structure: .* set sampler\.engine to vllm"):
        await policy.sample(SampleRequest(prompts=PROMPTS, params=params))


async def test_it_has_no_embeddings(vllm: PolicyService) -> None:
    with pytest.raises(BadInput, match=r"embed: vLLM keeps its hidden states to itself"):
        await vllm.embed(EmbedRequest(prompts=[Prompt(tokens=[3])]))


@pytest.mark.parametrize(
    ("structure", "words"),
    [(Structure(regex="[0-9"), "regex"), (Structure(json_schema="{"), "JSON")],
)
async def test_a_structure_with_a_mistake_is_the_callers(
    structure: Structure, words: str, vllm: PolicyService
) -> None:
    for n in (1, 3):
        with pytest.raises(BadInput, match=words):
            await vllm.sample(
                SampleRequest(prompts=PROMPTS, n=n, params=SamplingParams(structure=structure, max_tokens=4))
            )
    assert (await vllm.sample(SampleRequest(prompts=PROMPTS, params=SamplingParams(max_tokens=2)))).results


def rows(seed: int) -> list[TrainRow]:
    rng = np.random.default_rng(seed)
    return [
        TrainRow(
            row_id=str(i),
            tokens=np.r_[SHARED, rng.integers(8, 180, length)],
            terms={name: np.r_[np.zeros(len(SHARED)), np.ones(length)] for name in ("a", "b")},
            advantages=rng.normal(size=len(SHARED) + length),
        )
        for i, length in enumerate([14, 5, 9, 22, 7])
    ]


async def update(policy: PolicyService, seed: int) -> None:
    losses = {"a": SFTLoss(), "b": GRPOLoss(entropy_coef=0.01)}
    await policy.forward_backward(ForwardBackwardRequest(rows=rows(seed), losses=losses))
    await policy.optim_step(OptimStepRequest())


TRAINER = {"learning_rate": 1e-2, "micro_batch_tokens": 512}


@pytest.mark.parametrize(
    ("name", "lora"), [("llama", None), ("qwen3", None), ("gemma2", None), ("llama", {"rank": 4})]
)
async def test_publication_with_requests_in_flight(
    name: str, lora: dict[str, int] | None, cluster: Cluster, models: dict[str, str]
) -> None:
    """After each of five updates samplers and trainer agree; tokens say which weights drew them, and it is true."""
    shared = await cluster.policy(a_policy(models[name], "transformers", trainer=TRAINER, lora=lora), name="shared")
    split = await cluster.policy(a_policy(models[name], "vllm", trainer=TRAINER, lora=lora), name="split")
    asked = SampleRequest(prompts=PROMPTS, n=3, params=SamplingParams(max_tokens=100, stop_token_ids=[]))
    mixed = []
    for step in range(5):
        under_way = asyncio.ensure_future(split.sample(asked))
        ends = ScoreRequest(sequences=sequences(mixed[-1]), last=8, temperature=0.7) if mixed else None
        # Weights may change between two of these tokens; they are then scored again.
        scored = asyncio.ensure_future(split.score(ends)) if ends else None
        await update(split, step)
        published = await split.publish(Empty())
        assert published.version == step + 1
        assert published.gap < TOLERANCE
        mixed.append(await under_way)
        told = await scored if scored else None
        request = ScoreRequest(sequences=sequences(mixed[-1]))
        before = (await shared.score(request)).logprobs
        expected = {step: (await shared.score(ends)).logprobs} if ends else {}
        await update(shared, step)
        after = (await shared.score(request)).logprobs
        if ends and told:
            expected[step + 1] = (await shared.score(ends)).logprobs
            for one, other in zip(expected[told.version], told.logprobs, strict=True):
                np.testing.assert_allclose(other.array, one.array, atol=TOLERANCE)
        check_versions(mixed[-1], before, after, step)
        for one, other in zip(after, (await split.score(request)).logprobs, strict=True):
            np.testing.assert_allclose(other.array, one.array, atol=TOLERANCE)
    assert any(len(set(one.versions.tolist())) == 2 for response in mixed for one in completions(response))


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
async def test_weights_may_be_broadcast(
    lora: dict[str, int] | None, cluster: Cluster, models: dict[str, str]
) -> None:
    sampler = {"engine": "vllm", "publication": "broadcast"}
    policy = await cluster.policy(a_policy(models["qwen3"], "vllm", trainer=TRAINER, lora=lora, sampler=sampler))
    for step in range(2):
        await update(policy, step)
        published = await policy.publish(Empty())
        assert (published.version, published.gap < TOLERANCE) == (step + 1, True)


def check_versions(response: SampleResponse, before: Any, after: Any, step: int) -> None:
    """Each token has the log-prob of the version that it names."""
    for one, old, new in zip(completions(response), before, after, strict=True):
        count = len(one.tokens)
        for_version = {step: old.array[-count:], step + 1: new.array[-count:]}
        versions = one.versions.array
        assert (np.diff(versions) >= 0).all()
        expected = [for_version[version][t] for t, version in enumerate(versions.tolist())]
        np.testing.assert_allclose(one.logprobs.array, expected, atol=TOLERANCE)


@pytest.mark.slow
async def test_a_trainer_beside_vllm_keeps_its_group(cluster: Cluster, models: dict[str, str]) -> None:
    """vLLM and DeepSpeed compute in the same default group of this process, and vLLM ends first."""
    sharded = TRAINER | {"engine": "deepspeed"}
    before = await cluster.policy(a_policy(models["llama"], "transformers", trainer=sharded), name="before")
    await update(before, 0)
    for name in ("one", "two"):
        policy = await cluster.policy(a_policy(models["llama"], "vllm", trainer=sharded), name=name)
        await update(policy, 0)
        assert (await policy.publish(Empty())).gap < TOLERANCE
        for part in ("", "-trainer", "-sampler"):
            await cluster.stop(name + part)
    await update(before, 1)
    assert (await before.publish(Empty())).version == 2


async def test_samplers_sleep_while_the_trainer_works(cluster: Cluster, models: dict[str, str]) -> None:
    """On a CPU no memory is given back, but requests wait, and nothing is lost."""
    sleeping = {"engine": "vllm", "sleep": True}
    policy = await cluster.policy(a_policy(models["llama"], "vllm", trainer=TRAINER, sampler=sleeping))
    engine = actor(cluster, "policy-sampler")._engine
    request = SampleRequest(prompts=PROMPTS, n=2, params=SamplingParams(max_tokens=30))
    before = asyncio.ensure_future(policy.sample(request))
    await asyncio.sleep(0)
    await update(policy, 0)
    assert engine._engine.is_sleeping()
    assert not engine._awake.is_set()
    # It was finished under the old weights.
    assert before.done()
    waiting = asyncio.ensure_future(engine.complete([]))
    await asyncio.sleep(0)
    assert not waiting.done()
    again = await policy.sample(request)
    await waiting
    assert not engine._engine.is_sleeping()
    assert_alike(before.result(), again)
    await update(policy, 1)
    assert engine._engine.is_sleeping()
    published = await policy.publish(Empty())
    assert (published.version, published.gap < TOLERANCE) == (2, True)


async def test_the_probe_catches_a_prefix_cache_of_old_weights(
    cluster: Cluster, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = await cluster.policy(a_policy(models["llama"], "vllm", trainer=TRAINER))
    engine = actor(cluster, "policy-sampler")._engine._engine
    prompts = [Prompt(tokens=row.tokens) for row in rows(0)]
    await policy.sample(SampleRequest(prompts=prompts, params=SamplingParams(max_tokens=2)))
    await update(policy, 0)
    monkeypatch.setattr(engine, "reset_prefix_cache", lambda **_: True)
    with pytest.raises(Corrupt, match="sampler 0 at version 1 differs from the trainer at version 1 by"):
        await policy.publish(Empty())
