"""OpenAI's official client against the gateway's HTTP door."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.gateway.auth import new_token
from cluster.gateway.gateway import Gateway
from protocols.errors import Internal
from protocols.messages import FinishReason, Prompt, SamplingParams
from protocols.policy import EmbedRequest, PolicyConfig, PolicyService, SampleRequest, TokenizeRequest
from protocols.service import Empty, Service
from tests.cluster.gateway.scripted import ANSWERS, COMPLETION, DELTA, Scripted, a_gateway, a_handle, counters

HTTP = {"http": "127.0.0.1:0"}
LAST = DELTA.model_copy(update={"finish_reason": FinishReason.STOP})
CHAT: list[Any] = [{"role": "user", "content": "Alpha has 3 bonds."}]


@asynccontextmanager
async def a_client(gateway: Gateway, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    given = {"api_key": "none", "base_url": gateway.base_url, "max_retries": 0}
    async with AsyncOpenAI(**given | options) as client:
        yield client


@pytest.fixture
async def policy(tmp_path: Path) -> AsyncIterator[PolicyService]:
    """The embedded one, whose tokens are parts of words."""
    config = PolicyConfig(trainer=None, threads=1, device="cpu")
    async with Cluster(MethodConfig(runs_dir=str(tmp_path)), method="test", run="one") as cluster:
        yield await cluster.policy(config)


@pytest.fixture
async def client(policy: PolicyService, tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    async with a_gateway({"policy": policy}, tmp_path, **HTTP) as gateway, a_client(gateway) as client:
        yield client


# What a policy says, in OpenAI's words.


async def test_a_conversation(client: AsyncOpenAI, policy: PolicyService) -> None:
    answer = await client.chat.completions.create(model="policy", messages=CHAT, seed=7, n=2, max_tokens=5)
    prompt = Prompt.model_validate({"messages": CHAT, "seed": 7})
    same = await policy.sample(SampleRequest(prompts=[prompt], n=2, params=SamplingParams(max_tokens=5)))
    (result,) = same.results
    assert [choice.message.content for choice in answer.choices] == [one.text for one in result.completions]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    drawn = sum(len(one.tokens) for one in result.completions)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(result.prompt_tokens), drawn)
    assert answer.usage.total_tokens == len(result.prompt_tokens) + drawn
    assert answer.model == "policy" and answer.system_fingerprint == "weights-0"


async def test_a_streamed_conversation_is_the_same(client: AsyncOpenAI) -> None:
    given: dict[str, Any] = {
        "model": "policy",
        "messages": CHAT,
        "seed": 7,
        "n": 2,
        "max_tokens": 9,
        "logprobs": True,
    }
    whole = await client.chat.completions.create(**given)
    stream = await client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    texts, finishes, logprobs, roles = ["", ""], [None, None], [[], []], [[], []]  # type: ignore[var-annotated]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason
            roles[choice.index].append(choice.delta.role)
            assert choice.logprobs is not None
            logprobs[choice.index] += choice.logprobs.content
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert [choice.logprobs.content for choice in whole.choices if choice.logprobs] == logprobs
    assert all(first == "assistant" and set(rest) <= {None} for first, *rest in roles)
    assert not chunk.choices and chunk.usage == whole.usage


@pytest.mark.parametrize(("length", "finish"), [(4, FinishReason.LENGTH), (6, FinishReason.STOP)])
async def test_logprobs_are_those_of_the_drawn_tokens(
    length: int, finish: FinishReason, client: AsyncOpenAI, policy: PolicyService
) -> None:
    given: dict[str, Any] = {"seed": 3, "max_tokens": length, "logprobs": True}
    answer = await client.chat.completions.create(model="policy", messages=CHAT, **given)
    prompt = Prompt.model_validate({"messages": CHAT, "seed": 3})
    same = await policy.sample(SampleRequest(prompts=[prompt], params=SamplingParams(max_tokens=length)))
    (completion,) = same.results[0].completions
    assert completion.finish_reason is finish
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    # The end token has no text.
    drawn = completion.logprobs.tolist()[: -1 if finish is FinishReason.STOP else None]
    assert [one.logprob for one in logprobs.content] == drawn
    assert all(bytes(one.bytes or []).decode() == one.token for one in logprobs.content)
    assert "".join(one.token for one in logprobs.content).split() == completion.text.split()


async def test_parts_developers_and_stops(client: AsyncOpenAI, policy: PolicyService) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Alpha "}, {"type": "text", "text": "has"}]},
    ]
    given: dict[str, Any] = {"seed": 5, "max_completion_tokens": 30}
    answer = await client.chat.completions.create(model="policy", messages=messages, **given)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Alpha has"}]
    request = SampleRequest(
        prompts=[Prompt.model_validate({"messages": turns, "seed": 5})], params=SamplingParams(max_tokens=30)
    )
    text = (await policy.sample(request)).results[0].completions[0].text
    assert answer.choices[0].message.content == text
    stop = text.split()[3]
    cut = await client.chat.completions.create(model="policy", messages=messages, stop=stop, **given)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


async def test_without_a_length_an_answer_may_fill_the_context(client: AsyncOpenAI, policy: PolicyService) -> None:
    answer = await client.chat.completions.create(model="policy", messages=CHAT, seed=1, temperature=0.5)
    assert answer.usage is not None
    ended = answer.choices[0].finish_reason == "stop"
    assert ended or answer.usage.total_tokens == (await policy.info(Empty())).context_length


async def test_texts_and_their_stream(client: AsyncOpenAI) -> None:
    given: dict[str, Any] = {
        **{"model": "policy", "prompt": ["Alpha has", "Beta has"], "seed": 2, "n": 2, "max_tokens": 4},
        **{"logprobs": 1, "temperature": 0.7, "top_p": 0.9, "extra_body": {"top_k": 50}},
    }
    whole = await client.completions.create(**given)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) > 1
    texts, logprobs = ["", "", "", ""], [[], [], [], []]  # type: ignore[var-annotated]
    async for chunk in await client.completions.create(**given, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        logprobs[choice.index] += choice.logprobs.token_logprobs
    assert texts == [choice.text for choice in whole.choices]
    assert [choice.logprobs.token_logprobs for choice in whole.choices if choice.logprobs] == logprobs
    short = await client.completions.create(model="policy", prompt="Alpha has", seed=1)
    assert short.usage is not None and short.usage.completion_tokens <= 16


async def test_token_ids_are_prompts_too(client: AsyncOpenAI, policy: PolicyService) -> None:
    (tokens,) = (await policy.tokenize(TokenizeRequest(prompts=[Prompt(text="Alpha has 3 bonds.")]))).tokens
    by_text = await client.completions.create(model="policy", prompt="Alpha has 3 bonds.", seed=4)
    by_ids = await client.completions.create(model="policy", prompt=tokens.tolist(), seed=4)
    by_lists = await client.completions.create(model="policy", prompt=[tokens.tolist()], seed=4)
    assert by_text.choices == by_ids.choices == by_lists.choices
    assert by_text.usage == by_ids.usage


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_embeddings(encoding: Any, client: AsyncOpenAI, policy: PolicyService) -> None:
    texts = ["Alpha has 3 bonds.", "Beta"]
    # Left out, the client asks for base64 and decodes it.
    asked = {} if encoding == "base64" else {"encoding_format": encoding}
    answer = await client.embeddings.create(model="policy", input=texts, **asked)
    same = await policy.embed(EmbedRequest(prompts=[Prompt(text=text) for text in texts]))
    np.testing.assert_array_equal(np.float32([one.embedding for one in answer.data]), same.vectors.array)
    assert answer.usage.prompt_tokens == sum(same.lengths)


async def test_models(tmp_path: Path) -> None:
    handles: dict[str, Service] = {name: a_handle(Scripted(name)) for name in ("policy", "judge")}
    async with a_gateway(handles, tmp_path, **HTTP) as gateway, a_client(gateway) as client:
        assert [model.id async for model in client.models.list()] == ["judge", "policy"]
        assert (await client.models.retrieve("judge")).id == "judge"
        with pytest.raises(openai.NotFoundError, match="expected one of judge, policy"):
            await client.models.retrieve("gpt")
        with pytest.raises(openai.NotFoundError) as raised:
            await client.chat.completions.create(model="gpt", messages=CHAT)
        assert raised.value.code == "model_not_found"


async def test_the_client_without_an_event_loop(client: AsyncOpenAI) -> None:
    def ask() -> str:
        with OpenAI(api_key="none", base_url=client.base_url) as blocking:
            return blocking.completions.create(model="policy", prompt="Alpha", seed=1).choices[0].text

    text = await asyncio.to_thread(ask)
    assert text == (await client.completions.create(model="policy", prompt="Alpha", seed=1)).choices[0].text


# What it cannot do.


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
async def test_what_is_not_understood_is_named(given: dict[str, Any], field: str, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(**{"model": "policy", "messages": CHAT} | given)
    assert (raised.value.param or "").startswith(field)
    assert field in str(raised.value)
    assert raised.value.code == "invalid_argument"


async def test_what_is_neutral_is_taken(client: AsyncOpenAI) -> None:
    given: dict[str, Any] = {
        **{"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "u", "metadata": {"a": "b"}},
        **{"response_format": {"type": "text"}, "top_logprobs": 0, "store": False, "tools": []},
    }
    answer = await client.chat.completions.create(model="policy", messages=CHAT, max_tokens=2, **given)
    assert len(answer.choices) == 1


async def test_forms_need_an_engine_that_has_them(client: AsyncOpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    for form in ({"type": "json_object"}, schema):
        with pytest.raises(openai.BadRequestError, match=r"params\.structure: the transformers sampler has none"):
            await client.chat.completions.create(model="policy", messages=CHAT, max_tokens=2, response_format=form)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b"{", "application/json", "request: EOF while parsing an object at line 1 column 1; expected JSON"),
        (b"\xff", "application/json", "request: expected value"),
        (b"[" * 100_000, "application/json", "request: recursion limit exceeded"),
        (b"[]", "application/json", "value: got []; input should be a valid dictionary"),
        (b'{"temperature": NaN}', "application/json", "request: expected value"),
        (json.dumps(dict.fromkeys(map(str, range(40_001)))).encode(), "application/json", "at most 40000 keys"),
        (b"[" + b"[]," * 40_000 + b"[]]", "application/json", "at most 40000 keys and lists"),
        (b"{}", "text/plain", "content-type: got 'text/plain', expected application/json"),
        (b"{" + b" " * (2 << 20) + b"}", "application/json", "request: longer than 1 MB"),
    ],
)
async def test_bodies_that_are_no_requests(body: bytes, content_type: str, message: str, tmp_path: Path) -> None:
    async with (
        a_gateway({"policy": a_handle(Scripted())}, tmp_path, max_message_mb=1, **HTTP) as gateway,
        aiohttp.ClientSession() as session,
    ):
        headers = {"Content-Type": content_type, "x-request-id": "mine"}
        async with session.post(f"{gateway.base_url}/completions", data=body, headers=headers) as response:
            assert response.status == 400
            assert response.headers["x-request-id"] == "mine"
            assert message in (await response.json())["error"]["message"]


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        ("embeddings", {"input": [None] * 200_000}, "input."),
        ("embeddings", {"input": [""] * 2049}, "input."),
        ("embeddings", {"input": []}, "input."),
        ("completions", {"prompt": []}, "prompt."),
        ("completions", {"prompt": [2**31]}, "prompt."),
        ("completions", {"prompt": [[5], []]}, "prompt."),
        ("chat/completions", {"messages": [{}] * 5000}, "messages"),
        ("chat/completions", {"messages": CHAT, "response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
async def test_lists_have_bounds_and_wrong_ones_cost_little(
    path: str, given: dict[str, Any], param: str, tmp_path: Path
) -> None:
    async with (
        a_gateway({"policy": a_handle(Scripted())}, tmp_path, **HTTP) as gateway,
        aiohttp.ClientSession() as session,
    ):
        body = {"model": "policy"} | given
        async with session.post(f"{gateway.base_url}/{path}", json=body) as response:
            error = (await response.json())["error"]
            assert response.status == 400, error
            assert error["param"].startswith(param)
            assert len(error["message"]) < 2000


async def test_bytes_that_are_no_text_are_the_callers_fault(tmp_path: Path) -> None:
    asker = new_token("asker", ["infer"])
    (tmp_path / "tokens.yaml").write_text(asker[1])
    async with a_gateway({}, tmp_path, tokens=str(tmp_path / "tokens.yaml"), **HTTP) as gateway:
        port = gateway.base_url.split(":")[2].removesuffix("/v1")

        async def status_of(headers: bytes, body: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            length = b"Content-Length: %d\r\n\r\n" % len(body)
            writer.write(head + b"Content-Type: application/json\r\n" + headers + length + body)
            answer = await reader.read()
            writer.close()
            return answer.split()[1]

        assert await status_of(b"Authorization: Bearer \xff\r\n", b"{}") == b"401"
        token = b"Authorization: Bearer " + asker[0].encode() + b"\r\n"
        assert await status_of(token + b"Content-Encoding: gzip\r\n", b"no gzip") == b"400"


# Who may call, and how much.


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "[", "10.0.0.1"])
async def test_without_tokens_a_page_of_another_site_may_not_call(host: str, tmp_path: Path) -> None:
    async with (
        a_gateway({"policy": a_handle(Scripted())}, tmp_path, **HTTP) as gateway,
        aiohttp.ClientSession() as session,
    ):
        url, body = f"{gateway.base_url}/completions", {"model": "policy", "prompt": "x"}
        async with session.post(url, json=body, headers={"Host": host}) as response:
            assert response.status in (400, 403)
        for own in ("localhost", "127.0.0.1:9", "[::1]:80"):
            async with session.post(url, json=body, headers={"Host": own}) as response:
                assert response.status == 200


async def test_answers_of_no_given_length_leave_room_for_others(tmp_path: Path) -> None:
    transport = Scripted()
    room = {"tokens_at_once": 160, "train_share": 0}
    async with (
        a_gateway({"policy": a_handle(transport)}, tmp_path, **HTTP, **room) as gateway,
        a_client(gateway) as client,
    ):
        for n, longest in ((1, 9), (4, 5), (40, 1)):
            await client.chat.completions.create(model="policy", messages=CHAT, n=n)
            request = transport.requests[-1]
            assert isinstance(request, SampleRequest)
            assert request.params.max_tokens == longest


async def test_a_whole_answer_that_nobody_reads_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = COMPLETION.model_copy(update={"text": "x" * (30 << 20)})
    result = ANSWERS["sample"].results[0].model_copy(update={"completions": [long]})  # type: ignore[attr-defined]
    monkeypatch.setitem(ANSWERS, "sample", ANSWERS["sample"].model_copy(update={"results": [result]}))
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path, stall_s=0.2, **HTTP) as gateway:
        port = int(gateway.base_url.split(":")[2].removesuffix("/v1"))
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        body = b'{"model": "policy", "prompt": "x"}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while "DEADLINE_EXCEEDED" not in counters(gateway):
            await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_tokens_and_roles(tmp_path: Path) -> None:
    asker, trainer = new_token("asker", ["infer"]), new_token("trainer", ["train"])
    file = tmp_path / "tokens.yaml"
    file.write_text(asker[1] + trainer[1])
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path, tokens=str(file), **HTTP) as gateway:
        async with a_client(gateway, api_key=asker[0]) as client:
            answer = await client.completions.create(model="policy", prompt="x")
            assert answer.choices[0].text == COMPLETION.text
        async with a_client(gateway, api_key=trainer[0]) as client:
            with pytest.raises(openai.PermissionDeniedError, match="it needs the role infer"):
                await client.completions.create(model="policy", prompt="x")
        async with a_client(gateway, api_key="forged") as client:
            with pytest.raises(openai.AuthenticationError, match="the token is not known"):
                await client.models.list()


async def test_no_room_says_when_to_come_again(tmp_path: Path) -> None:
    transport = Scripted(waits=True)
    limits = {"tokens_at_once": 100, "train_share": 0, "queue": 0}
    async with (
        a_gateway({"policy": a_handle(transport)}, tmp_path, **HTTP, **limits) as gateway,
        a_client(gateway) as client,
    ):
        first = asyncio.ensure_future(client.completions.create(model="policy", prompt="x", max_tokens=90))
        await transport.began.acquire()
        with pytest.raises(openai.RateLimitError, match="0 calls wait already") as raised:
            await client.completions.create(model="policy", prompt="x", max_tokens=90)
        assert raised.value.response.headers["Retry-After"] == "1"
        with pytest.raises(openai.BadRequestError, match="may draw 101 tokens, expected at most 100"):
            await client.completions.create(model="policy", prompt="x", max_tokens=101)
        transport.go.release()
        assert (await first).choices[0].text == COMPLETION.text
        assert gateway.admission.lanes["infer"].used == 0


async def test_a_client_that_leaves_ends_its_call(tmp_path: Path) -> None:
    transport = Scripted(waits=True)
    async with a_gateway({"policy": a_handle(transport)}, tmp_path, **HTTP) as gateway, a_client(gateway) as client:
        whole = asyncio.ensure_future(client.completions.create(model="policy", prompt="x"))
        await transport.began.acquire()
        whole.cancel()
        await transport.cancelled.acquire()
        stream = await client.completions.create(model="policy", prompt="x", stream=True)
        assert (await anext(stream)).choices[0].text == DELTA.text
        await transport.began.acquire()
        await stream.close()
        await transport.cancelled.acquire()
        while gateway.admission.lanes["infer"].used:
            await asyncio.sleep(0)


async def test_calls_under_way_are_finished_when_it_stops(tmp_path: Path) -> None:
    transport = Scripted(waits=True)
    async with a_gateway({"policy": a_handle(transport)}, tmp_path, **HTTP) as gateway, a_client(gateway) as client:
        call = asyncio.ensure_future(client.completions.create(model="policy", prompt="x"))
        await transport.began.acquire()
        closing = asyncio.ensure_future(gateway.close())
        while not gateway.admission.stopping:
            await asyncio.sleep(0)
        with pytest.raises(openai.InternalServerError, match="the gateway is stopping") as raised:
            await client.completions.create(model="policy", prompt="x")
        assert raised.value.response.status_code == 503
        async with aiohttp.ClientSession() as session, session.get(gateway.base_url[:-2] + "health") as health:
            assert health.status == 503
        transport.go.release()
        assert (await call).choices[0].text == COMPLETION.text
        await closing


async def test_failures_before_and_amid_a_stream(tmp_path: Path) -> None:
    transport = Scripted(error=Internal("oh"))
    async with a_gateway({"policy": a_handle(transport)}, tmp_path, **HTTP) as gateway, a_client(gateway) as client:
        with pytest.raises(openai.InternalServerError, match="oh"):
            await client.completions.create(model="policy", prompt="x")
        stream = await client.completions.create(model="policy", prompt="x", stream=True)
        assert (await anext(stream)).choices[0].text == DELTA.text
        with pytest.raises(openai.APIError, match="oh"):
            await anext(stream)


async def test_a_stream_that_just_ends_is_no_answer(tmp_path: Path) -> None:
    # The scripted stream finishes no choice.
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path, **HTTP) as gateway, a_client(gateway) as client:
        stream = await client.completions.create(model="policy", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the policy has stopped amid the completion"):
            async for _ in stream:
                pass
        assert 'code="UNAVAILABLE",method="openai.completions"' in counters(gateway)


async def test_an_answer_that_was_cut_off_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aborted = COMPLETION.model_copy(update={"finish_reason": FinishReason.ABORTED})
    result = ANSWERS["sample"].results[0].model_copy(update={"completions": [aborted]})
    monkeypatch.setitem(ANSWERS, "sample", ANSWERS["sample"].model_copy(update={"results": [result]}))
    async with (
        a_gateway({"policy": a_handle(Scripted())}, tmp_path, **HTTP) as gateway,
        a_client(gateway) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="the policy has stopped amid the completion"):
            await client.completions.create(model="policy", prompt="x")


async def test_calls_are_counted_and_logged_without_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "repertory.gateway")
    async with (
        a_gateway({"policy": a_handle(Scripted(last=LAST))}, tmp_path, **HTTP) as gateway,
        a_client(gateway) as client,
    ):
        await client.completions.create(model="policy", prompt="secret", extra_headers={"x-request-id": "r1"})
        async for _ in await client.completions.create(model="policy", prompt="secret", stream=True):
            pass
        text = counters(gateway)
    assert 'repertory_calls_total{code="OK",method="openai.completions"} 2.0' in text
    assert 'repertory_drawn_tokens_total{method="openai.completions"} 3.0' in text
    (line,) = [record.getMessage() for record in caplog.records if "id=r1" in record.getMessage()]
    assert "caller=anyone method=openai.completions code=OK" in line
    assert "secret" not in caplog.text


async def test_an_address_that_is_taken_opens_no_door(tmp_path: Path) -> None:
    async with a_gateway({}, tmp_path, **HTTP) as first:
        taken = first.base_url.removeprefix("http://").removesuffix("/v1")
        with pytest.raises(Exception, match=rf"gateway\.http: cannot listen at {taken}"):
            async with a_gateway({}, tmp_path, http=taken):
                pass


async def test_events_are_as_the_standard_has_them(tmp_path: Path) -> None:
    async with (
        a_gateway({"policy": a_handle(Scripted(last=LAST))}, tmp_path, **HTTP) as gateway,
        aiohttp.ClientSession() as session,
    ):
        body = {"model": "policy", "messages": CHAT, "stream": True, "max_tokens": 3}
        async with session.post(f"{gateway.base_url}/chat/completions", json=body) as response:
            assert response.content_type == "text/event-stream"
            events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": "y"}, "finish_reason": None, "logprobs": None}
    ]
