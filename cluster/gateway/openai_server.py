"""The gateway's second door: the part of OpenAI's HTTP API that policies can answer."""

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from aiohttp import web
from pydantic import BaseModel

from cluster.gateway.admission import REQUEST_ID, Admission, Call
from cluster.gateway.auth import Caller
from cluster.gateway.config import LAST_WORDS, GatewayConfig, host_and_port, is_loopback
from cluster.gateway.openai_api import (
    Asked,
    ChatAsked,
    EmbeddingAsked,
    Head,
    TextAsked,
    Texts,
    chat_chunks,
    chat_response,
    embedding_response,
    parsed,
    text_chunks,
    text_response,
    usage,
)
from cluster.gateway.routed import AUTO, ROUTE, RoutedPolicy
from protocols.errors import BadInput, DeadlineExceeded, Denied, Exhausted, RepertoryError, Unavailable
from protocols.policy import (
    DetokenizeRequest,
    PolicyService,
    SampleDelta,
    SampleRequest,
    SampleResponse,
    TokenizeRequest,
)
from protocols.service import Empty, Message
from protocols.tensor import Tensor

STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""HTTP status by code; 500 for those that are not here."""

MOST_MB = 4
"""Longest request, or `max_message_mb` if that is less: JSON takes many times its length while it is read."""
AT_ONCE = 8
"""Answers of no given length that fit into the gateway's room side by side."""

M = TypeVar("M", bound=Message)


class NoSuchModel(BadInput):
    """The request names a model that is not here: 404, as with OpenAI."""


@dataclass(frozen=True)
class Request:
    """A call that has been let in."""

    http: web.Request
    call: Call
    caller: Caller
    body: bytes


Answer = Callable[[Request], Awaitable[web.StreamResponse]]


class OpenAIServer:
    """Answers for the policies that the gateway has, under the tokens and limits of its other door."""

    def __init__(self, config: GatewayConfig, admission: Admission) -> None:
        self._config = config
        self._admission = admission
        self._began = int(time.time())
        self._runner: web.AppRunner | None = None
        self._open = 0
        self._most_mb = min(MOST_MB, config.max_message_mb)
        self.port = 0

    async def start(self, tls: ssl.SSLContext | None) -> None:
        """Listen. Raises BadInput when the address is taken."""
        app = web.Application(client_max_size=self._most_mb << 20)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._answering("models", self._models)),
                web.get("/v1/models/{model}", self._answering("models", self._model)),
                web.post("/v1/chat/completions", self._answering("chat", self._chat)),
                web.post("/v1/completions", self._answering("completions", self._text)),
                web.post("/v1/embeddings", self._answering("embeddings", self._embed)),
            ]
        )
        # A caller that goes away ends its call; the gateway has its own log.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=LAST_WORDS, keepalive_timeout=30.0
        )
        await self._runner.setup()
        host, port = host_and_port("http", self._config.http)
        try:
            await web.TCPSite(self._runner, host.strip("[]"), port, ssl_context=tls).start()
        except OSError as error:
            await self._runner.cleanup()
            raise BadInput(f"gateway.http: cannot listen at {self._config.http}: {error}") from error
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    def _answering(self, name: str, answer: Answer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handler(http: web.Request) -> web.StreamResponse:
            with self._admission.watched(f"openai.{name}", http.headers.get(REQUEST_ID, "")) as call:
                self._open += 1
                try:
                    authorization = http.headers.get("Authorization", "")
                    with self._admission.known(call, "infer", authorization) as caller:
                        if self._open > self._config.most_open:
                            raise Exhausted(f"{self._open - 1} calls are open already")
                        response = await answer(Request(http, call, caller, await self._read(http)))
                        if not response.prepared:
                            response.headers[REQUEST_ID] = call.id
                            await self._sent(http, call, response)
                        return response
                # Whatever it is, the caller is to get it as a status.
                except Exception as error:  # noqa: BLE001
                    return refused(call, error)
                finally:
                    self._open -= 1

        return handler

    async def _sent(self, http: web.Request, call: Call, response: web.StreamResponse) -> None:
        """Send a whole answer while the caller's room is still held; one that does not read it is cut off."""
        try:
            async with asyncio.timeout(self._config.stall_s):
                await response.prepare(http)
                await response.write_eof()
        except ConnectionError:
            call.code = "CANCELLED"
        except TimeoutError:
            call.code = "DEADLINE_EXCEEDED"
            if http.transport is not None:
                http.transport.abort()

    async def _read(self, http: web.Request) -> bytes:
        # A page in a browser may not send this type to other sites unasked, but its own may have taken on this
        # machine's address.
        open_to_all = not self._config.tokens and not (self._config.tls and self._config.tls.client_ca)
        if open_to_all and not is_loopback(host_of(http)):
            raise Denied(f"host: got {http.host[:80]!r}, expected this machine's own; without tokens nothing else")
        if http.method == "POST" and http.content_type != "application/json":
            raise BadInput(f"content-type: got {http.content_type[:80]!r}, expected application/json")
        try:
            async with asyncio.timeout(self._config.stall_s):
                return await http.read()
        except web.HTTPRequestEntityTooLarge:
            raise BadInput(f"request: longer than {self._most_mb} MB") from None
        except web.RequestPayloadError as error:
            raise BadInput(f"request: {error}") from error
        except TimeoutError:
            raise DeadlineExceeded(f"the request did not come within {self._config.stall_s:g} s") from None

    async def _health(self, http: web.Request) -> web.Response:
        return web.Response(status=503 if self._admission.stopping else 200)

    def _policy(self, model: str) -> PolicyService:
        known = self._admission.of_kind(PolicyService)
        if known and model not in self._models_here():
            raise NoSuchModel(f"model: got {model[:80]!r}, expected one of {', '.join(self._models_here())}")
        return self._admission.handle(PolicyService, model)

    def _models_here(self) -> list[str]:
        """The policies, and `auto` where a router may choose among them."""
        names = sorted(self._admission.of_kind(PolicyService))
        return [*names, AUTO] if names and self._admission.routes else names

    async def _models(self, request: Request) -> web.Response:
        data = [self._described(name) for name in self._models_here()]
        return web.json_response({"object": "list", "data": data})

    async def _model(self, request: Request) -> web.Response:
        name = request.http.match_info["model"]
        self._policy(name)
        return web.json_response(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "repertory"}

    async def _chat(self, request: Request) -> web.StreamResponse:
        asked = parsed(ChatAsked, request.body)
        policy = self._policy(asked.model)
        longest = asked.longest or await self._longest(policy, asked.n or 1)
        answering = Answering(policy, asked.request(longest), {} if asked.logprobs else None)
        head = Head(f"chatcmpl-{request.call.id}", asked.model, int(time.time()))
        if asked.stream:
            return await self._streamed(request, asked, answering, partial(chat_chunks, head))
        return await self._whole(request, answering, partial(chat_response, head))

    async def _longest(self, policy: PolicyService, n: int) -> int:
        """Tokens that n answers may have where nobody has said: the context, unless too few callers would fit."""
        room = self._admission.lanes["infer"].capacity // (AT_ONCE * n)
        return max(1, min((await policy.info(Empty())).context_length, room))

    async def _text(self, request: Request) -> web.StreamResponse:
        asked = parsed(TextAsked, request.body)
        sample = asked.request()
        answering = Answering(self._policy(asked.model), sample, None if asked.logprobs is None else {})
        head = Head(f"cmpl-{request.call.id}", asked.model, int(time.time()))
        if asked.stream:
            return await self._streamed(request, asked, answering, partial(text_chunks, head, sample.n))
        return await self._whole(request, answering, partial(text_response, head))

    async def _embed(self, request: Request) -> web.Response:
        asked = parsed(EmbeddingAsked, request.body)
        policy = self._policy(asked.model)
        async with self._room(request, asked.request()) as admitted:
            response = await policy.embed(admitted)
        return web.json_response(embedding_response(asked.model, response, asked.encoding_format))

    def _room(self, request: Request, message: M) -> AbstractAsyncContextManager[M]:
        return self._admission.room(request.call, request.caller, "infer", message, len(request.body))

    async def _whole(
        self,
        request: Request,
        answering: "Answering",
        respond: Callable[[SampleResponse, Texts | None], BaseModel],
    ) -> web.Response:
        async with self._room(request, answering.sample) as sample:
            response = await answering.policy.sample(sample)
            headers = self._told(request.call, answering.policy)
            self._admission.metrics.drew(request.call.method, response)
            for result in response.results:
                for one in result.completions:
                    await answering.learn(one.tokens)
        answered = respond(response, answering.texts)
        return web.json_response(text=named(answered, answering.policy), headers=headers)

    def _told(self, call: Call, policy: PolicyService) -> dict[str, str]:
        """Header that says who answered, if a router chose."""
        if not isinstance(policy, RoutedPolicy) or not policy.decisions:
            return {}
        if not call.route:
            call.route = policy.told()
            self._admission.metrics.routed(policy)
        return {ROUTE: call.route}

    async def _streamed(
        self,
        request: Request,
        asked: Asked,
        answering: "Answering",
        chunked: Callable[[AsyncIterator[SampleDelta], Texts | None], AsyncGenerator[BaseModel, None]],
    ) -> web.StreamResponse:
        """Send chunks as server-sent events; what fails before the first is answered as a status."""
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", REQUEST_ID: request.call.id}
        response = web.StreamResponse(headers=headers)
        drew = partial(self._admission.metrics.drew, request.call.method)
        async with (
            self._room(request, answering.sample),
            aclosing(answering.deltas(asked.usage, drew)) as deltas,
            aclosing(chunked(deltas, answering.texts)) as chunks,
        ):
            chunk = await anext(chunks)
            response.headers.update(self._told(request.call, answering.policy))
            await response.prepare(request.http)
            try:
                await self._written(response, named(chunk, answering.policy))
                async for chunk in chunks:
                    await self._written(response, named(chunk, answering.policy))
                if asked.usage:
                    last = chunk.model_copy(update={"choices": [], "usage": usage(answering.read, answering.drawn)})
                    await self._written(response, named(last, answering.policy))
                await self._written(response, "[DONE]")
            except ConnectionError:
                request.call.code = "CANCELLED"
            except TimeoutError:
                request.call.code = "DEADLINE_EXCEEDED"
                if request.http.transport is not None:
                    request.http.transport.abort()
            # The status has been sent: what fails now is an event.
            except Exception as error:  # noqa: BLE001
                with contextlib.suppress(ConnectionError, TimeoutError):
                    await self._written(response, json.dumps(body_of(request.call.failed(error))))
        return response

    async def _written(self, response: web.StreamResponse, data: str) -> None:
        """Send one event. Raises TimeoutError when the caller does not read: it would hold its room for ever."""
        async with asyncio.timeout(self._config.stall_s):
            await response.write(f"data: {data}\n\n".encode())


def named(answer: BaseModel, policy: PolicyService) -> str:
    """An answer or a piece of one as JSON; under the name of the policy that a router chose."""
    if isinstance(policy, RoutedPolicy) and len(policy.decisions) == 1:
        answer = answer.model_copy(update={"model": policy.decisions[0].model})
    return answer.model_dump_json(exclude_unset=True)


@dataclass
class Answering:
    """What a policy is asked for, and what is known of its answer."""

    policy: PolicyService
    sample: SampleRequest
    texts: dict[int, str] | None
    """Text of each drawn token, if log-probs are wanted."""
    read: int = 0
    drawn: int = 0

    async def learn(self, tokens: Tensor) -> None:
        """Find the text of tokens that have none yet."""
        if self.texts is None:
            return
        if new := sorted(set(tokens.tolist()) - self.texts.keys()):
            found = await self.policy.detokenize(DetokenizeRequest.model_validate({"tokens": [[t] for t in new]}))
            self.texts |= zip(new, found.texts, strict=True)

    async def deltas(self, count: bool, drew: Callable[[SampleDelta], None]) -> AsyncGenerator[SampleDelta, None]:
        """The answer as it grows; `drew` is told of each piece. `count`: count the prompts' tokens too."""
        if count:
            prompts = await self.policy.tokenize(TokenizeRequest(prompts=self.sample.prompts))
            self.read = sum(map(len, prompts.tokens))
        unfinished = len(self.sample.prompts) * self.sample.n
        async with aclosing(cast(AsyncGenerator[SampleDelta, None], self.policy.stream(self.sample))) as deltas:
            async for delta in deltas:
                unfinished -= delta.finish_reason is not None
                self.drawn += len(delta.tokens)
                drew(delta)
                await self.learn(delta.tokens)
                yield delta
        if unfinished:
            raise Unavailable("the policy has stopped amid the completion")


def host_of(http: web.Request) -> str:
    """The host that the caller believes to talk to."""
    try:
        return urlsplit(f"//{http.host}").hostname or ""
    except ValueError:
        return ""


def refused(call: Call, error: Exception) -> web.Response:
    """An error as OpenAI's clients know it; they come again after `Retry-After` seconds."""
    failure = call.failed(error)
    headers = {REQUEST_ID: call.id}
    if isinstance(failure, Exhausted):
        headers["Retry-After"] = str(max(1, round(failure.retry_after_s)))
    status = 404 if isinstance(failure, NoSuchModel) else STATUS.get(failure.code, 500)
    return web.json_response(body_of(failure), status=status, headers=headers)


def body_of(failure: RepertoryError) -> dict[str, Any]:
    """The body of an error: its text, the first field that is wrong, and the code of the gRPC door."""
    field = failure.fields[0][0] if isinstance(failure, BadInput) and failure.fields else None
    kind = "invalid_request_error" if isinstance(failure, BadInput) else "server_error"
    code = "model_not_found" if isinstance(failure, NoSuchModel) else failure.code.lower()
    return {"error": {"message": failure.message, "type": kind, "param": field, "code": code}}
