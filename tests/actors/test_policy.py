import asyncio
import math
import shutil
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from actors.actor import answer, answer_stream
from actors.policy.chat import vocabulary_digest
from actors.policy.policy import PolicyActor
from protocols.errors import BadInput, Corrupt, Stale
from protocols.losses import GRPOLoss, SFTLoss
from protocols.messages import Prompt
from protocols.policy import (
    DetokenizeRequest,
    EmbedRequest,
    PolicyInfo,
    SampleRequest,
    ScoreRequest,
    TokenizeRequest,
)
from protocols.service import CheckpointRequest, Empty, HealthRequest
from protocols.training import ForwardBackwardRequest, OptimStepRequest

MakePolicy = Callable[..., Awaitable[PolicyActor]]
ROWS = [
    {"row_id": "a", "tokens": [3, 9, 27, 81, 5], "terms": {"sft": [0, 0, 1, 1, 1]}},
    {"row_id": "b", "tokens": [7, 14, 21], "terms": {"pg": [0, 1, 1]}, "advantages": [0, 1, -0.5]},
]
BATCH = ForwardBackwardRequest.model_validate({"rows": ROWS, "losses": {"sft": SFTLoss(), "pg": GRPOLoss()}})
TRAINER = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 1, "total_steps": 20}


def request(*prompts: Any, n: int = 1, **params: Any) -> SampleRequest:
    given = [{"tokens": tokens, "seed": i} for i, tokens in enumerate(prompts)]
    return SampleRequest.model_validate({"prompts": given, "n": n, "params": {"max_tokens": 8} | params})


def parameters(actor: PolicyActor) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in actor._loaded.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


async def train(actor: PolicyActor, steps: int) -> None:
    for _ in range(steps):
        await answer(actor, "forward_backward", BATCH)
        await answer(actor, "optim_step", OptimStepRequest())


async def scores(actor: PolicyActor) -> list[list[float]]:
    response = await actor.score(ScoreRequest.model_validate({"sequences": [[3, 9, 27, 81, 5], [7, 14, 21]]}))
    return [row.tolist() for row in response.logprobs]


# Facts and text.


async def test_facts(policy: PolicyActor, ledger_dir: Path) -> None:
    total = sum(p.numel() for p in policy._loaded.model.parameters())
    assert await policy.info(Empty()) == PolicyInfo(
        model=str(ledger_dir),
        parameters=total,
        trainable_parameters=total,
        vocab_size=182,
        context_length=256,
        eos_token_ids=[2],
        version=0,
        tokenizer=vocabulary_digest(policy._loaded.tokenizer),
    )


async def test_prompts_become_tokens_and_tokens_text(policy: PolicyActor) -> None:
    prompts = [
        {"messages": [{"role": "user", "content": "K0 is V1."}]},
        {"text": "K0 is V1.K1 leads to K2."},
        {"tokens": [2, 5]},
    ]
    tokens = (await policy.tokenize(TokenizeRequest.model_validate({"prompts": prompts}))).tokens
    answered = await policy.detokenize(DetokenizeRequest(tokens=tokens))
    assert answered.texts[:2] == ["K0 is V1.", "K0 is V1.K1 leads to K2."]
    assert tokens[2].tolist() == [2, 5] and answered.texts[2].startswith("<|end|>")
    # Token 2 is a special one: it ends where the text begins.
    assert [ends.tolist() for ends in answered.ends] == [
        [len("K0 is V1.")],
        [len("K0 is V1."), len("K0 is V1.K1 leads to K2.")],
        [0, len(answered.texts[2].removeprefix("<|end|>"))],
    ]


async def test_tokens_that_are_no_ids_have_no_text(policy: PolicyActor) -> None:
    for ids in ([-1], [182]):
        with pytest.raises(BadInput, match=r"tokens\[1\]: got token ids"):
            await answer(policy, "detokenize", DetokenizeRequest.model_validate({"tokens": [[3], ids]}))


# Sampling.


async def test_a_response_has_prompts_and_completions_in_order(policy: PolicyActor) -> None:
    response = await policy.sample(request([3, 4], [5, 6, 7], n=3))
    assert [result.prompt_tokens.tolist() for result in response.results] == [[3, 4], [5, 6, 7]]
    for completion in (each for result in response.results for each in result.completions):
        assert len(completion.tokens) == len(completion.logprobs) == len(completion.versions) <= 8
        text = policy._loaded.tokenizer.decode(completion.tokens.array, skip_special_tokens=True)
        assert completion.text == text
        assert completion.versions.tolist() == [0] * len(completion.tokens)


async def test_prompts_without_a_seed_are_new_each_time(policy: PolicyActor) -> None:
    prompts = [Prompt(tokens=[3, 4])] * 2
    response = await policy.sample(SampleRequest(prompts=prompts))
    again = await policy.sample(SampleRequest(prompts=prompts))
    texts = {result.completions[0].tokens.array.tobytes() for result in response.results + again.results}
    assert len(texts) == 4


async def test_calls_at_the_same_time_do_not_mix(policy: PolicyActor) -> None:
    alone = [await policy.sample(request([3, 4, i], n=2)) for i in (5, 6)]
    assert await asyncio.gather(*(policy.sample(request([3, 4, i], n=2)) for i in (5, 6))) == alone


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"tokens": []}, "prompt 'q1': expected at least one token"),
        ({"text": ""}, "prompt 'q1': expected at least one token"),
        ({"tokens": [4] * 256}, "prompt 'q1': got 256 tokens, expected 1 to 255"),
        ({"tokens": [4, 182]}, "prompt 'q1': got token ids 4 to 182, expected 0 to 181"),
        ({"tokens": [-1, 4]}, "prompt 'q1': got token ids -1 to 4, expected 0 to 181"),
    ],
)
async def test_prompts_that_cannot_be_continued(prompt: dict[str, Any], message: str, policy: PolicyActor) -> None:
    prompts = [{"tokens": [4], "uid": "q0"}, prompt | {"uid": "q1"}]
    asked = SampleRequest.model_validate({"prompts": prompts})
    with pytest.raises(BadInput, match=message):
        await answer(policy, "sample", asked)
    with pytest.raises(BadInput, match=message):
        await anext(answer_stream(policy, "stream", asked))


@pytest.mark.parametrize("stop", [["a", ""], ["a" * 257]])
def test_stop_texts_have_a_length(stop: list[str]) -> None:
    with pytest.raises(ValidationError, match=r"expected texts of 1 to 256 characters"):
        request([4], stop=stop)


async def test_the_longest_prompt_gets_one_token(policy: PolicyActor) -> None:
    response = await policy.sample(request([4] * 255))
    assert len(response.results[0].completions[0].tokens) == 1


async def test_long_samples_agree_with_score(policy: PolicyActor) -> None:
    asked = request([3, 4], [5] * 40, max_tokens=200, temperature=0.7)
    for result in (await policy.sample(asked)).results:
        completion, start = result.completions[0], len(result.prompt_tokens)
        tokens = np.concatenate([result.prompt_tokens.array, completion.tokens.array])
        scored = await policy.score(ScoreRequest(sequences=[tokens], temperature=0.7))
        np.testing.assert_allclose(scored.logprobs[0].array[start:], completion.logprobs.array, atol=1e-5)


# Scoring.


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([], r"sequences\[1\]: got 0 tokens, expected 1 to 256"),
        ([3] * 257, r"sequences\[1\]: got 257 tokens, expected 1 to 256"),
        ([3, 500], r"sequences\[1\]: got token ids 3 to 500, expected 0 to 181"),
    ],
)
async def test_sequences_that_cannot_be_scored(sequence: list[int], message: str, policy: PolicyActor) -> None:
    with pytest.raises(BadInput, match=message):
        await answer(policy, "score", ScoreRequest.model_validate({"sequences": [[3], sequence]}))


async def test_score_names_its_version(policy: PolicyActor) -> None:
    await train(policy, 2)
    assert (await policy.score(ScoreRequest.model_validate({"sequences": [[3]]}))).version == 2


# Embedding.


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
async def test_a_vector_is_the_mean_of_the_last_hidden_states(
    kind: str, make_policy: MakePolicy, model_dirs: dict[str, Path]
) -> None:
    actor = await make_policy(model=str(model_dirs[kind]), init="pretrained", trainer={"micro_batch_tokens": 16})
    rows = [[3, 4, 5], [6], list(range(7, 20)), [6]]
    prompts = [Prompt.model_validate({"tokens": row}) for row in rows]
    response = await actor.embed(EmbedRequest(prompts=prompts))
    assert response.lengths == [3, 1, 13, 1] and response.version == 0
    for vector, row in zip(response.vectors.array, rows, strict=True):
        with torch.no_grad():
            states = actor._loaded.model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0]
        mean = states.double().mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    np.testing.assert_allclose(response.vectors.array[1], response.vectors.array[3], atol=1e-6)


async def test_a_prompt_that_cannot_be_embedded(policy: PolicyActor) -> None:
    with pytest.raises(BadInput, match=r"prompt 'a': got 257 tokens, expected 1 to 256"):
        await answer(policy, "embed", EmbedRequest(prompts=[Prompt(tokens=np.full(257, 3), uid="a")]))


# Learning.


async def test_every_step_raises_the_version_everywhere(policy: PolicyActor) -> None:
    for version in range(3):
        sampled = (await policy.sample(request([3, 4]))).results[0].completions[0]
        assert set(sampled.versions.tolist()) == {version}
        assert (await policy.health(HealthRequest())).version == version
        assert (await policy.publish(Empty())).version == (await policy.info(Empty())).version == version
        await train(policy, 1)


async def test_the_sampler_uses_the_trained_weights(make_policy: MakePolicy) -> None:
    actor = await make_policy(trainer={"learning_rate": 1e-2})
    row = {"row_id": "a", "tokens": [3, 4, 50, 60], "terms": {"sft": [0, 0, 1, 1]}}
    batch = ForwardBackwardRequest.model_validate({"rows": [row], "losses": {"sft": SFTLoss()}})
    for _ in range(8):
        await actor.forward_backward(batch)
        await actor.optim_step(OptimStepRequest())
    completion = (await actor.sample(request([3, 4], temperature=0, max_tokens=2))).results[0].completions[0]
    assert completion.tokens.tolist() == [50, 60]


@pytest.mark.parametrize("method", ["forward_backward", "optim_step"])
async def test_a_frozen_policy_does_not_learn(method: str, make_policy: MakePolicy) -> None:
    actor = await make_policy(trainer=None)
    with pytest.raises(Stale, match=f"{method}: this policy is frozen"):
        await answer(actor, method, BATCH if method == "forward_backward" else OptimStepRequest())
    assert (await actor.info(Empty())).trainable_parameters == 0
    assert (await actor.publish(Empty())).version == 0


@pytest.mark.parametrize(("tokens", "message"), [([3] * 257, "got 257 tokens"), ([3, 999], "got token ids 3 to 999")])
async def test_rows_that_do_not_fit_the_model(tokens: list[int], message: str, policy: PolicyActor) -> None:
    row = {"row_id": "r9", "tokens": tokens, "terms": {"sft": [0.0] + [1.0] * (len(tokens) - 1)}}
    batch = ForwardBackwardRequest.model_validate({"rows": [row], "losses": {"sft": SFTLoss()}})
    with pytest.raises(BadInput, match=f"row 'r9': {message}"):
        await answer(policy, "forward_backward", batch)


async def test_half_precision_stays_close(make_policy: MakePolicy) -> None:
    full, half = [await make_policy(dtype=dtype) for dtype in ("float32", "bfloat16")]
    rows = [np.concatenate(await scores(actor)) for actor in (full, half)]
    assert (rows[0] != rows[1]).any()
    np.testing.assert_allclose(rows[1], rows[0], atol=0.1)
    greedy = [await actor.sample(request([3, 4], temperature=0, max_tokens=1)) for actor in (full, half)]
    logprobs = [response.results[0].completions[0].logprobs.tolist()[0] for response in greedy]
    assert logprobs[0] != logprobs[1] and logprobs[1] == pytest.approx(logprobs[0], abs=0.1)
    losses = [(await actor.forward_backward(BATCH)).loss for actor in (full, half)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    norms = [(await actor.optim_step(OptimStepRequest())).grad_norm for actor in (full, half)]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert {p.dtype for p in half._loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("trainer", [None, {}])
async def test_half_precision_samples_and_scores_alike(trainer: Any, make_policy: MakePolicy) -> None:
    actor = await make_policy(dtype="bfloat16", trainer=trainer)
    result = (await actor.sample(request([3, 4], max_tokens=12))).results[0]
    tokens = np.concatenate([result.prompt_tokens.array, result.completions[0].tokens.array])
    scored = (await actor.score(ScoreRequest(sequences=[tokens]))).logprobs[0].array[2:]
    np.testing.assert_allclose(scored, result.completions[0].logprobs.array, atol=0.1)


# Saving and loading.


def where(directory: Path, training_state: bool = True) -> CheckpointRequest:
    return CheckpointRequest(path=str(directory), training_state=training_state)


KINDS = {
    "plain": {},
    "adapter": {"lora": {"rank": 2}},
    "adapter with dropout": {"lora": {"rank": 2, "dropout": 0.3}},
    "half precision": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_training_goes_on_as_if_it_had_not_stopped(kind: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    first = await make_policy(trainer=TRAINER, **KINDS[kind])
    await train(first, 3)
    await answer(first, "save", where(tmp_path))
    await train(first, 3)
    second = await make_policy(trainer=TRAINER, **KINDS[kind])
    await answer(second, "load", where(tmp_path))
    assert second.version == 3
    await train(second, 3)
    assert same(parameters(first), parameters(second)) and first.version == second.version == 6


async def test_loading_forgets_gradients(make_policy: MakePolicy, tmp_path: Path) -> None:
    actor = await make_policy(trainer=TRAINER)
    await answer(actor, "save", where(tmp_path))
    await train(actor, 2)
    once = parameters(actor)
    await answer(actor, "forward_backward", BATCH)
    await answer(actor, "load", where(tmp_path))
    await train(actor, 2)
    assert same(parameters(actor), once)


async def test_a_checkpoint_is_a_hugging_face_model(make_policy: MakePolicy, tmp_path: Path) -> None:
    actor = await make_policy(trainer=TRAINER)
    await train(actor, 2)
    saved = await actor.save(where(tmp_path))
    assert {"config.json", "model.safetensors", "tokenizer.json", "trainer.pt"} <= set(saved.files)
    assert saved.files == sorted(path.name for path in tmp_path.iterdir())
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[3, 9, 27]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, actor._loaded.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).decode([3, 4]) == actor._loaded.tokenizer.decode([3, 4])
    other = await make_policy(model=str(tmp_path), init="pretrained")
    assert await scores(other) == await scores(actor) and other.version == 0


async def test_weights_alone_are_a_plain_model(make_policy: MakePolicy, tmp_path: Path) -> None:
    actor = await make_policy(trainer=TRAINER)
    await train(actor, 1)
    assert "trainer.pt" not in (await actor.save(where(tmp_path, training_state=False))).files
    frozen = await make_policy(trainer=None)
    await answer(frozen, "load", where(tmp_path))
    assert await scores(frozen) == await scores(actor)
    with pytest.raises(Corrupt, match=r"trainer.pt is not a saved trainer"):
        await answer(await make_policy(), "load", where(tmp_path))


async def test_only_the_adapter_learns(make_policy: MakePolicy) -> None:
    actor = await make_policy(trainer=TRAINER, lora={"rank": 2})
    before, old = parameters(actor), await scores(actor)
    await train(actor, 2)
    changed = {name for name, p in parameters(actor).items() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert (await actor.info(Empty())).trainable_parameters == sum(
        before[name].numel() for name in before if "lora_" in name
    )
    assert await scores(actor) != old
    embedded = await actor.embed(EmbedRequest(prompts=[Prompt(tokens=[3, 4])]))
    with actor._loaded.model.disable_adapter():
        assert (await actor.embed(EmbedRequest(prompts=[Prompt(tokens=[3, 4])]))).vectors != embedded.vectors


async def test_an_adapter_is_saved_alone_and_exported_merged(
    make_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    actor = await make_policy(trainer=TRAINER, lora={"rank": 2})
    await train(actor, 3)
    files = (await actor.save(where(tmp_path / "state"))).files
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    assert all("lora_" in name for name in load_file(tmp_path / "state" / "adapter_model.safetensors"))
    exported = (await actor.save(where(tmp_path / "model", training_state=False))).files
    assert "model.safetensors" in exported and not any("adapter" in name for name in exported)
    plain = await make_policy(model=str(tmp_path / "model"), init="pretrained", trainer=None)
    np.testing.assert_allclose(np.concatenate(await scores(plain)), np.concatenate(await scores(actor)), atol=1e-5)
    before = parameters(actor)
    await train(actor, 1)
    assert not same(before, parameters(actor)), "the export must leave the adapter in place"


async def test_an_adapter_learns_with_checkpointing(make_policy: MakePolicy) -> None:
    norms = []
    for checkpointing in (False, True):
        actor = await make_policy(trainer=TRAINER | {"gradient_checkpointing": checkpointing}, lora={"rank": 2})
        await actor.forward_backward(BATCH)
        norms.append((await actor.optim_step(OptimStepRequest())).grad_norm)
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-5)


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "nothing there": shutil.rmtree,
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "cut weights": lambda path: cut(path / "model.safetensors"),
    "a missing weight": lambda path: edit(path / "model.safetensors", lambda w: w.pop("model.norm.weight")),
    "another shape": lambda path: edit(
        path / "model.safetensors", lambda w: w.update({"model.norm.weight": torch.ones(3)})
    ),
    "no configuration": lambda path: (path / "config.json").unlink(),
    "no trainer": lambda path: (path / "trainer.pt").unlink(),
    "cut trainer": lambda path: cut(path / "trainer.pt"),
    "empty trainer": lambda path: torch.save({}, path / "trainer.pt"),
    "a list": lambda path: torch.save([1], path / "trainer.pt"),
}


@pytest.mark.parametrize("what", DAMAGE)
async def test_a_damaged_checkpoint_is_corrupt(what: str, policy: PolicyActor, tmp_path: Path) -> None:
    await train(policy, 1)
    await answer(policy, "save", where(tmp_path / "state"))
    DAMAGE[what](tmp_path / "state")
    with pytest.raises(Corrupt, match=str(tmp_path / "state")):
        await answer(policy, "load", where(tmp_path / "state"))


async def test_a_foreign_checkpoint_is_corrupt(
    make_policy: MakePolicy, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("llama", "gpt2"):
        with pytest.raises(Corrupt, match="does not hold the weights of this model"):
            await answer(await make_policy(), "load", where(model_dirs[name]))
    adapter = await make_policy(lora={"rank": 2, "target_modules": "q_proj"})
    await adapter.save(where(tmp_path))
    for lora in ({"rank": 3, "target_modules": "q_proj"}, {"rank": 2, "target_modules": "v_proj"}, None):
        with pytest.raises(Corrupt, match="does not hold the weights of this model"):
            await answer(await make_policy(lora=lora), "load", where(tmp_path))


async def test_a_failed_gradient_leaves_the_policy_as_it_was(policy: PolicyActor) -> None:
    before = parameters(policy)
    row = {"row_id": "a", "tokens": [3, 9], "terms": {"pg": [0, 1]}, "advantages": [0, math.inf]}
    await policy.forward_backward(
        ForwardBackwardRequest.model_validate({"rows": [row], "losses": {"pg": GRPOLoss()}})
    )
    with pytest.raises(Corrupt, match="has norm"):
        await answer(policy, "optim_step", OptimStepRequest())
    assert same(parameters(policy), before) and policy.version == 0
    await train(policy, 1)
    assert policy.version == 1 and not same(parameters(policy), before)


# Setting up.


async def test_a_model_that_cannot_be_sampled_is_refused_at_once(
    make_policy: MakePolicy, ledger_dir: Path, tmp_path: Path
) -> None:
    CONFIG_MAPPING["mamba"](vocab_size=182, hidden_size=8, num_hidden_layers=1, state_size=2).save_pretrained(
        tmp_path
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ledger_dir / name, tmp_path)
    with pytest.raises(BadInput, match="model: cannot sample from 'mamba' models"):
        await make_policy(model=str(tmp_path))
