"""The model `auto`: a router's choice, another one where that is down, and the decision in the response."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI

from actors.router.router import RouterActor
from cluster import serve
from cluster.gateway.gateway import Gateway
from cluster.gateway.routed import Decision, RoutedPolicy
from cluster.inline import InlineTransport
from protocols.errors import BadInput, Unavailable
from protocols.handle import make_handle
from protocols.messages import FinishReason, Prompt
from protocols.policy import DetokenizeResponse, Sampled, SampleRequest, SampleResponse, TokenizeResponse
from protocols.router import (
    Candidate,
    Route,
    RouterConfig,
    RouteRequest,
    RouteResponse,
    RouterInfo,
    RouterService,
)
from protocols.service import Empty, Message, Method, Service
from protocols.wire import from_bytes, to_bytes
from tests.cluster.gateway.scripted import ANSWERS, COMPLETION, DELTA, Scripted, a_gateway, a_handle, counters, raw

CHAT: list[Any] = [{"role": "user", "content": "math"}]
LAST = DELTA.model_copy(update={"finish_reason": FinishReason.STOP})


class ByWord(RouterActor):
    """Sends `math` to a, `code` to b, and whatever else to c, which is not served; the next best is b."""

    async def setup(self) -> None:
        pass

    async def info(self, request: Empty) -> RouterInfo:
        return RouterInfo(
            kind="best", model="", masked=False, candidates=[Candidate(name=name) for name in "abc"], parameters=0,
            trainable_parameters=0, max_tokens=9, version=0,
        )  # fmt: skip

    async def route(self, request: RouteRequest) -> RouteResponse:
        routes = []
        for prompt in request.prompts:
            word = prompt.text or prompt.messages[0].content
            scores = {"math": [0.9, 0.5, 0.1], "code": [0.2, 0.8, 0.1]}.get(word, [0.3, 0.6, 0.7])
            routes.append(Route(choice="abc"[int(np.argmax(scores))], scores=scores, confidence=max(scores)))
        return RouteResponse(candidates=["a", "b", "c"], routes=routes)


class Named(Scripted):
    """A policy that says its name, once per prompt."""

    async def call(self, method: Method, request: Message) -> Message:
        if method.name != "health":
            await self._follow(request)
        if isinstance(request, SampleRequest):
            said = COMPLETION.model_copy(update={"text": self.name, "finish_reason": FinishReason.LENGTH})
            return SampleResponse(
                results=[Sampled(prompt_tokens=np.asarray([4]), completions=[said]) for _ in request.prompts]
            )
        if method.name == "tokenize":
            return TokenizeResponse(tokens=[np.asarray([4, 4])])
        if method.name == "detokenize":
            return DetokenizeResponse(texts=[self.name])
        return ANSWERS[method.name]


@pytest.fixture
def policies() -> dict[str, Named]:
    return {name: Named(name, last=LAST) for name in "ab"}


@pytest.fixture
async def gateway(policies: dict[str, Named], tmp_path: Path) -> AsyncIterator[Gateway]:
    router = ByWord(RouterConfig(trainer=None))
    router._ready = True
    handles: dict[str, Service] = {name: a_handle(policy) for name, policy in policies.items()}
    handles["router"] = make_handle(RouterService, InlineTransport("router", router))
    async with a_gateway(handles, tmp_path, http="127.0.0.1:0") as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="none", base_url=gateway.base_url, max_retries=0) as client:
        yield client


async def asked(client: AsyncOpenAI, word: str, **given: Any) -> tuple[Any, dict[str, Any]]:
    """The answer, and what the header says of the route."""
    messages: list[Any] = [{"role": "user", "content": word}]
    raw_ = await client.chat.completions.with_raw_response.create(model="auto", messages=messages, **given)
    return raw_.parse(), json.loads(raw_.headers["x-repertory-route"])


async def test_the_router_chooses_who_answers(client: AsyncOpenAI) -> None:
    for word, name in (("math", "a"), ("code", "b"), ("else", "b")):
        answer, route = await asked(client, word)
        assert answer.choices[0].message.content == answer.model == route["model"] == name
        assert set(route["scores"]) == {"a", "b", "c"} and route["down"] == []
    assert [model.id async for model in client.models.list()] == ["a", "b", "auto"]


async def test_another_one_answers_if_the_choice_is_down(
    client: AsyncOpenAI, gateway: Gateway, policies: dict[str, Named]
) -> None:
    policies["a"].error = Unavailable("a is gone")
    answer, route = await asked(client, "math")
    assert answer.choices[0].message.content == answer.model == route["model"] == "b"
    assert route["down"] == ["a"]
    assert 'repertory_routed_total{model="b"} 1.0' in counters(gateway)
    assert 'repertory_routed_past_total{model="a"} 1.0' in counters(gateway)
    policies["b"].error = Unavailable("b is gone")
    with pytest.raises(openai.InternalServerError, match="b is gone"):
        await asked(client, "math")


async def test_an_error_of_the_request_is_not_taken_elsewhere(
    client: AsyncOpenAI, policies: dict[str, Named]
) -> None:
    policies["a"].error = BadInput("too long")
    with pytest.raises(openai.BadRequestError, match="too long"):
        await asked(client, "math")
    assert policies["b"].requests == []


async def test_a_stream_is_routed_too(client: AsyncOpenAI, policies: dict[str, Named]) -> None:
    given: dict[str, Any] = {"model": "auto", "messages": CHAT, "stream": True}
    chunks = [chunk async for chunk in await client.chat.completions.create(**given)]
    assert {chunk.model for chunk in chunks} == {"a"}
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "stop"]
    counted = await client.chat.completions.with_raw_response.create(**given, stream_options={"include_usage": True})
    assert json.loads(counted.headers["x-repertory-route"])["model"] == "a"
    last = [chunk async for chunk in counted.parse()][-1]
    assert last.usage is not None and (last.usage.prompt_tokens, last.model) == (2, "a")
    # What has begun cannot begin anew elsewhere.
    policies["a"].error = Unavailable("a is gone")
    with pytest.raises(openai.APIError, match="a is gone"):
        [chunk async for chunk in await client.chat.completions.create(**given)]


async def test_prompts_go_each_to_its_own_and_come_back_in_order(
    client: AsyncOpenAI, policies: dict[str, Named]
) -> None:
    raw_ = await client.completions.with_raw_response.create(model="auto", prompt=["code", "math", "code", "else"])
    answer = raw_.parse()
    assert [choice.text for choice in answer.choices] == ["b", "a", "b", "b"]
    assert json.loads(raw_.headers["x-repertory-route"]) == {"prompts": {"b": 3, "a": 1}, "down": []}
    assert answer.model == "auto"
    # What goes to one policy is one call to it.
    assert [len(request.prompts) for request in policies["b"].requests] == [3]  # type: ignore[attr-defined]
    policies["a"].error = Unavailable("a is gone")
    answer = await client.completions.create(model="auto", prompt=["math", "code"])
    assert [choice.text for choice in answer.choices] == ["b", "b"]
    with pytest.raises(openai.APIError, match="streams one prompt at a time"):
        await client.completions.create(model="auto", prompt=["math", "code"], stream=True)


async def test_log_probs_are_in_the_words_of_who_answered(client: AsyncOpenAI) -> None:
    answer, _ = await asked(client, "code", logprobs=True)
    assert [token.token for token in answer.choices[0].logprobs.content] == ["b"]


async def test_log_probs_of_several_policies_would_be_in_the_wrong_words(client: AsyncOpenAI) -> None:
    given: dict[str, Any] = {"model": "auto", "logprobs": 1}
    answer = await client.completions.create(prompt=["code", "else"], **given)
    assert [choice.logprobs.tokens for choice in answer.choices if choice.logprobs] == [["b"], ["b"]]
    with pytest.raises(openai.BadRequestError, match="for prompts of one policy; these went to 2"):
        await client.completions.create(prompt=["code", "math"], **given)


async def test_a_call_that_fails_leaves_none_behind(client: AsyncOpenAI, policies: dict[str, Named]) -> None:
    policies["a"].error, policies["b"].waits = BadInput("too long"), True
    with pytest.raises(openai.BadRequestError, match="too long"):
        await client.completions.create(model="auto", prompt=["math", "code"])
    await policies["b"].cancelled.acquire()


def test_the_scores_of_a_large_pool_do_not_fill_the_header() -> None:
    names = [f"model-{i}" for i in range(200)]
    policy = RoutedPolicy(None, {})  # type: ignore[arg-type]
    policy.decisions = [Decision(names, dict.fromkeys(names, 0.5))]
    assert json.loads(policy.told()) == {"model": "model-0", "scores": {}, "down": []}


async def test_the_grpc_door_routes_as_well(gateway: Gateway, policies: dict[str, Named]) -> None:
    request = to_bytes(SampleRequest(prompts=[Prompt(text="math")]))
    actor = (("repertory-actor", "auto"),)
    async with raw(gateway) as send:
        call = send("PolicyService/Sample", request, actor)
        (result,) = from_bytes(SampleResponse, await call).results
        assert result.completions[0].text == "a"
        trailing = dict(await call.trailing_metadata())
        assert json.loads(trailing["x-repertory-route"])["model"] == "a"
        assert await send("PolicyService/Stream", request, actor)
        for method in ("Score", "Publish", "Save", "Drain"):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await send(f"PolicyService/{method}", bodies()[method], actor)
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "auto only samples" in (raised.value.details() or "")


def bodies() -> dict[str, bytes]:
    from protocols.policy import ScoreRequest
    from protocols.service import CheckpointRequest

    return {
        "Score": to_bytes(ScoreRequest(sequences=[np.arange(3)])),
        "Publish": to_bytes(Empty()),
        "Save": to_bytes(CheckpointRequest(path="x")),
        "Drain": to_bytes(Empty()),
    }


async def test_without_a_router_there_is_no_auto(policies: dict[str, Named], tmp_path: Path) -> None:
    handles: dict[str, Service] = {name: a_handle(policy) for name, policy in policies.items()}
    async with (
        a_gateway(handles, tmp_path, http="127.0.0.1:0") as gateway,
        AsyncOpenAI(api_key="none", base_url=gateway.base_url, max_retries=0) as client,
    ):
        with pytest.raises(openai.NotFoundError, match="got 'auto', expected one of a, b"):
            await client.chat.completions.create(model="auto", messages=CHAT)
        async with raw(gateway) as send:
            request = to_bytes(SampleRequest(prompts=[Prompt(text="math")]))
            with pytest.raises(grpc.aio.AioRpcError, match="got 'auto', expected one of a, b"):
                await send("PolicyService/Sample", request, (("repertory-actor", "auto"),))


async def test_a_pool_that_is_not_here_is_said(policies: dict[str, Named], tmp_path: Path) -> None:
    router = ByWord(RouterConfig(trainer=None))
    router._ready = True
    handles: dict[str, Service] = {"other": a_handle(policies["a"])}
    handles["router"] = make_handle(RouterService, InlineTransport("router", router))
    async with (
        a_gateway(handles, tmp_path, http="127.0.0.1:0") as gateway,
        AsyncOpenAI(api_key="none", base_url=gateway.base_url, max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="none of the router's candidates is served here"):
            await client.chat.completions.create(model="auto", messages=CHAT)


def test_what_serves_does_not_learn_unless_told_to() -> None:
    given = {"pool": {"a": {}, "b": {"trainer": {}}}, "router": {"trained": "x"}}
    config = serve.Config.model_validate(given)
    assert config.pool["a"].trainer is None and config.pool["b"].trainer is not None
    assert config.router is not None and config.router.trainer is None
    for name in ("auto", "policy"):
        with pytest.raises(ValueError, match=f"pool: got the name '{name}', which is taken"):
            serve.Config.model_validate({"pool": {name: {}}})
