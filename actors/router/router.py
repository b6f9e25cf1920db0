"""The router actor: answers on one thread, and changes over to another router between two batches."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from actors.actor import Actor
from actors.policy.weights import files_of
from actors.router.backbone import text_of
from actors.router.chooser import Chooser, Scored, open_chooser, reopened, texts_of
from actors.router.decide import choose, eligible, prices_of
from actors.router.quality import qualities, reliability
from protocols.errors import BadInput, Corrupt, Stale
from protocols.router import (
    Route,
    RouteEvaluateRequest,
    RouteEvaluateResponse,
    RouteEvaluation,
    RouteOptions,
    RouterConfig,
    RouteRequest,
    RouteResponse,
    RouterInfo,
    RouteRow,
    RouterService,
    RouteTrainRequest,
    RouteTrainResponse,
)
from protocols.service import CheckpointRequest, CheckpointResponse, Empty, HealthRequest, HealthResponse

Result = TypeVar("Result")


class RouterActor(Actor, RouterService):
    """Routes by a chooser, which `load` replaces as a whole: calls under way end with the one they began with."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self._config = config
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="router")
        self._chooser: Chooser

    async def setup(self) -> None:
        """Load encoder and weights. Raises BadInput when there are none or they do not fit the configuration."""
        self._chooser = await self._run(self._open)

    def _open(self) -> Chooser:
        torch.set_num_threads(self._config.threads or len(os.sched_getaffinity(0)))
        return open_chooser(self._config)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    async def close(self) -> None:
        """Stop the worker thread."""
        await super().close()
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)

    async def health(self, request: HealthRequest) -> HealthResponse:
        """Say whether the router can serve, and with which weights."""
        return HealthResponse(kind=self.kind, ready=self._ready, version=self._chooser.version if self._ready else 0)

    async def info(self, request: Empty) -> RouterInfo:
        """Facts about the router."""
        chooser = self._chooser
        parameters, trainable = chooser.counts()
        return RouterInfo(
            kind=chooser.config.kind,
            model=chooser.config.model if chooser.backbone else "",
            masked=chooser.backbone is not None and chooser.backbone.masked,
            candidates=chooser.config.candidates,
            parameters=parameters,
            trainable_parameters=trainable,
            max_tokens=chooser.limit,
            version=chooser.version,
        )

    async def route(self, request: RouteRequest) -> RouteResponse:
        """Choose a candidate for each query."""
        eligible(self._chooser.config.candidates, request.options)
        texts = [text_of(prompt) for prompt in request.prompts]
        chooser = self._chooser
        routes, version = await self._run(lambda: (_routes(chooser, texts, request.options), chooser.version))
        named = zip(routes, request.prompts, strict=True)
        return RouteResponse(
            candidates=chooser.names,
            routes=[route.model_copy(update={"uid": prompt.uid}) for route, prompt in named],
            version=version,
        )

    async def train(self, request: RouteTrainRequest) -> RouteTrainResponse:
        """One optimiser step, or rows to remember."""
        chooser = self._chooser
        if chooser.config.trainer is None:
            raise Stale("train: this router is frozen (trainer is null in its configuration)")
        check_rows(request.rows, chooser.names)
        return await self._run(lambda: chooser.learn(request.rows))

    async def evaluate(self, request: RouteEvaluateRequest) -> RouteEvaluateResponse:
        """Route queries whose scores are known."""
        chooser = self._chooser
        check_rows(request.rows, chooser.names)
        scored, version = await self._run(lambda: (_scored(chooser, texts_of(request.rows)), chooser.version))
        # Resampling takes a while, and routes are waiting for that thread.
        return await asyncio.to_thread(_evaluated, chooser.config, request, scored.scores_BT, version)

    async def save(self, request: CheckpointRequest) -> CheckpointResponse:
        """Write a folder from which the router can be opened again, by `trained` or `load`."""
        chooser = self._chooser
        await self._run(lambda: chooser.write(Path(request.path), request.training_state))
        return CheckpointResponse(files=files_of(Path(request.path)))

    async def load(self, request: CheckpointRequest) -> CheckpointResponse:
        """Change over to the router in a folder, its pool included; calls are answered by the old one until then."""
        folder = Path(request.path)
        config = self._config if request.training_state else self._config.model_copy(update={"learn": "all"})
        # Not on the worker's thread, which goes on with routes meanwhile.
        self._chooser = await asyncio.to_thread(reopened, config, folder, request.training_state)
        return CheckpointResponse(files=files_of(folder))


def check_rows(rows: list[RouteRow], names: list[str]) -> None:
    """Raise BadInput unless each row has a finite score from 0 to 1 for each candidate."""
    for row in rows:
        text_of(row.prompt)
        if len(row.scores) != len(names):
            raise BadInput(
                f"row {row.uid!r}: scores: got {len(row.scores)}, expected one of each of {len(names)} candidates"
            )
        for name, score in zip(names, row.scores, strict=True):
            if not 0 <= score <= 1:
                raise BadInput(f"row {row.uid!r}: scores: got {score} of {name!r}, expected a number from 0 to 1")


def _scored(chooser: Chooser, texts: list[str]) -> Scored:
    scored = chooser.score(texts)
    if not np.isfinite(scored.scores_BT).all():
        raise Corrupt("the router's scores are not numbers")
    return scored


def _routes(chooser: Chooser, texts: list[str], options: RouteOptions) -> list[Route]:
    scored = _scored(chooser, texts)
    pool = chooser.config.candidates
    prices_T = prices_of(pool, options)
    routes = []
    for scores_T, cut in zip(scored.scores_BT, scored.cut_B, strict=True):
        choice = choose(scores_T, pool, options)
        best = scores_T[eligible(pool, options)].max() if choice is None else scores_T[choice]
        routes.append(
            Route(
                choice=None if choice is None else pool[choice].name,
                scores=scores_T.tolist(),
                confidence=float(best),
                price=0.0 if choice is None else float(prices_T[choice]),
                truncated=cut,
            )
        )
    return routes


def _evaluated(
    config: RouterConfig, request: RouteEvaluateRequest, scores_BT: NDArray[np.float64], version: int
) -> RouteEvaluateResponse:
    pool, evaluations = config.candidates, []
    for options in request.options or [RouteOptions()]:
        choices = [choose(scores_T, pool, options) for scores_T in scores_BT]
        groups, mean = qualities(request.rows, choices, prices_of(pool, options), request.seed)
        evaluations.append(RouteEvaluation(groups=groups, mean=mean))
    truth_BT = np.array([row.scores for row in request.rows])
    bins, error = reliability(scores_BT, truth_BT, config.target)
    return RouteEvaluateResponse(evaluations=evaluations, reliability=bins, calibration_error=error, version=version)
