from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.actor import start
from actors.router.router import RouterActor
from cluster.inline import InlineTransport
from methods.worlds.skills import WORDS, SkillsConfig, SkillsWorld
from methods.worlds.tiny import write_tiny
from protocols.handle import make_handle
from protocols.messages import Prompt
from protocols.router import RouterConfig, RouteRow, RouterService

WORLD = SkillsWorld(SkillsConfig(), 0)


def world_rows(count: int, seed: int = 0, name: str = "q") -> list[RouteRow]:
    exam = WORLD.draw(np.random.default_rng(seed), count)
    parts = zip(exam.queries, exam.answers, exam.scores_BT, strict=True)
    return [
        RouteRow(uid=f"{name}{i}", prompt=Prompt(text=query), answers=answers, scores=scores.tolist())
        for i, (query, answers, scores) in enumerate(parts)
    ]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a masked and a causal model of random weights."""
    folder = tmp_path_factory.mktemp("encoders")
    for name in ("masked", "causal"):
        write_tiny(folder / name, WORDS, width=48, masked=name == "masked", spread=0.1)
    return {name: str(folder / name) for name in ("masked", "causal")}


Configure = Callable[..., RouterConfig]


@pytest.fixture
def configure(encoders: dict[str, str]) -> Configure:
    def configured(variant: str = "masked", **given: Any) -> RouterConfig:
        trainer = {"learning_rate": 3e-3, "weight_decay": 0.0, "total_steps": 20, "schedule": "constant"}
        base = {
            "model": encoders[variant],
            "init": "random",
            "threads": 1,
            "device": "cpu",
            "response_tokens": 4,
            "candidates": [{"name": name} for name in WORLD.candidates],
        }
        if "trainer" in given and given["trainer"] is not None:
            given["trainer"] = trainer | given["trainer"]
        return RouterConfig.model_validate({**base, "trainer": trainer, **given})

    return configured


async def started(config: RouterConfig) -> RouterService:
    actor = RouterActor(config)
    await start(actor)
    return make_handle(RouterService, InlineTransport("router", actor))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "router"
