import asyncio
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from actors.actor import answer, answer_stream
from actors.policy.policy import PolicyActor
from protocols.errors import Corrupt
from protocols.messages import FinishReason
from protocols.policy import SampleDelta, SampleRequest, SampleResponse, ScoreRequest
from protocols.service import Empty

MakePolicy = Callable[..., Awaitable[PolicyActor]]


def request(*prompts: Any, n: int = 1, **params: Any) -> SampleRequest:
    given = [{"tokens": tokens, "seed": i} for i, tokens in enumerate(prompts)]
    return SampleRequest.model_validate({"prompts": given, "n": n, "params": {"max_tokens": 20} | params})


# Ending early.


class Gate:
    """Holds the model at its k-th sampling call until it is opened. No end token ends a sample."""

    def __init__(self, policy: PolicyActor, hold_at: int) -> None:
        self.calls = 0
        policy._loaded.eos_token_ids = []
        self.reached, self.opened = asyncio.Event(), threading.Event()
        self._hold_at, self._loop = hold_at, asyncio.get_running_loop()
        policy._loaded.model.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["use_cache"]:
            self.calls += 1
            if self.calls == self._hold_at:
                self._loop.call_soon_threadsafe(self.reached.set)
                assert self.opened.wait(60)


async def until_idle(policy: PolicyActor) -> None:
    """The worker takes one job after the other: once this one is done, all before it have ended."""
    await policy.score(ScoreRequest.model_validate({"sequences": [[3, 4]]}))


async def test_cancelling_a_sample_stops_the_model(policy: PolicyActor) -> None:
    gate = Gate(policy, hold_at=4)
    task = asyncio.create_task(answer(policy, "sample", request([3, 4], [5], n=2, max_tokens=200)))
    await gate.reached.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    gate.opened.set()
    await until_idle(policy)
    assert task.cancelled() and gate.calls == 4


async def test_leaving_a_stream_stops_the_model(policy: PolicyActor) -> None:
    gate = Gate(policy, hold_at=4)
    async with aclosing(answer_stream(policy, "stream", request([3, 4], max_tokens=200))) as stream:
        await anext(stream)
        await gate.reached.wait()
    gate.opened.set()
    await until_idle(policy)
    assert gate.calls == 4
    await answer(policy, "drain", Empty())


async def test_closing_stops_what_is_sampled(policy: PolicyActor) -> None:
    gate = Gate(policy, hold_at=4)
    running = asyncio.create_task(policy.sample(request([3, 4], max_tokens=200)))
    await gate.reached.wait()
    closing = asyncio.create_task(policy.close())
    await asyncio.sleep(0)
    gate.opened.set()
    await closing
    completion = (await running).results[0].completions[0]
    assert completion.finish_reason is FinishReason.ABORTED and gate.calls == 4


# Pieces and the whole.


async def collect(stream: AsyncIterator[SampleDelta]) -> dict[tuple[int, int], list[SampleDelta]]:
    deltas: dict[tuple[int, int], list[SampleDelta]] = {}
    async for delta in stream:
        deltas.setdefault((delta.prompt_index, delta.sample_index), []).append(delta)
    return deltas


def assert_streamed(deltas: dict[tuple[int, int], list[SampleDelta]], response: SampleResponse) -> None:
    whole = {(p, i): c for p, result in enumerate(response.results) for i, c in enumerate(result.completions)}
    assert deltas.keys() == whole.keys()
    for key, completion in whole.items():
        parts = deltas[key]
        assert "".join(part.text for part in parts) == completion.text
        for name in ("tokens", "logprobs", "versions"):
            joined = [value for part in parts for value in getattr(part, name).tolist()]
            assert joined == getattr(completion, name).tolist()
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [completion.finish_reason]


@pytest.mark.parametrize("options", [{}, {"stop": ["V1", "K3 leads"]}, {"stop_token_ids": list(range(60))}])
async def test_a_stream_is_the_sample_in_pieces(options: dict[str, Any], policy: PolicyActor) -> None:
    asked = request([3, 4], [5, 6, 7], [3, 4], n=3, **options)
    assert_streamed(await collect(policy.stream(asked)), await policy.sample(asked))


@pytest.fixture
async def speaker(
    make_policy: MakePolicy, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> tuple[PolicyActor, str]:
    """A policy that says one sentence, byte by byte, whatever it is asked."""
    options = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    CONFIG_MAPPING["llama"](vocab_size=300, **options).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    actor = await make_policy(model=str(tmp_path))
    sentence = "the 日本 theme, été 🜂!"
    script = [*byte_tokenizer(sentence)["input_ids"], byte_tokenizer.eos_token_id]

    def speak(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        said = int(kwargs["past_key_values"].get_seq_length()) - 2
        output.logits[:] = torch.nn.functional.one_hot(torch.tensor(script[said]), 300) * 99.0

    actor._loaded.model.register_forward_hook(speak, with_kwargs=True)
    return actor, sentence


async def test_streamed_characters_come_whole(speaker: tuple[PolicyActor, str]) -> None:
    actor, sentence = speaker
    asked = request([1, 2], max_tokens=60)
    deltas = await collect(actor.stream(asked))
    assert_streamed(deltas, await actor.sample(asked))
    texts = [delta.text for delta in deltas[0, 0]]
    assert "".join(texts) == sentence and "日" in texts and "" in texts
    assert not any("�" in text for text in texts)


async def test_a_stream_keeps_back_a_stop_text(speaker: tuple[PolicyActor, str]) -> None:
    actor, _ = speaker
    asked = request([1, 2], max_tokens=60, stop=["theme, é"])
    deltas = await collect(actor.stream(asked))
    assert_streamed(deltas, await actor.sample(asked))
    assert "".join(delta.text for delta in deltas[0, 0]) == "the 日本 "
    assert deltas[0, 0][-1].finish_reason is FinishReason.STOP_TEXT


async def test_a_stream_that_ends_within_a_character_shows_it(speaker: tuple[PolicyActor, str]) -> None:
    actor, sentence = speaker
    before = len(actor._loaded.tokenizer(sentence[: sentence.index("本")])["input_ids"])
    asked = request([1, 2], max_tokens=before + 1)
    deltas = await collect(actor.stream(asked))
    assert_streamed(deltas, await actor.sample(asked))
    assert deltas[0, 0][-1].text == "�"


async def test_an_error_while_streaming_reaches_the_reader(policy: PolicyActor) -> None:
    with torch.no_grad():
        next(policy._loaded.model.parameters()).fill_(math.nan)
    with pytest.raises(Corrupt, match="not numbers"):
        await collect(answer_stream(policy, "stream", request([3, 4])))
    with pytest.raises(Corrupt, match="not numbers"):
        await answer(policy, "sample", request([3, 4]))
