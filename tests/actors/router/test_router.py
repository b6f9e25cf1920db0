import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocols.errors import BadInput, Corrupt, Stale
from protocols.messages import ChatMessage, Prompt
from protocols.router import (
    ON_EMBEDDINGS,
    Kind,
    RouteEvaluateRequest,
    RouteOptions,
    RouterConfig,
    RouteRequest,
    RouteRow,
    RouterService,
    RouteTrainRequest,
    RouteTrainResponse,
)
from protocols.service import CheckpointRequest, Empty, HealthRequest
from tests.actors.router.conftest import WORLD, Configure, started, world_rows

LEARNT: tuple[Kind, ...] = ("lookahead", "classifier", "zooter", "router_dc", "mlp", "linear", "matrix")
MEMORY: tuple[Kind, ...] = ("knn", "kmeans", "best", "random")
QUERIES = [Prompt(text=row.prompt.text, uid=row.uid) for row in world_rows(12, seed=5)]
VARIANTS = pytest.mark.parametrize("variant", ["masked", "causal"])


async def scores(router: RouterService, prompts: Sequence[Prompt] = QUERIES) -> list[list[float]]:
    return [route.scores for route in (await router.route(RouteRequest(prompts=list(prompts)))).routes]


async def trained(router: RouterService, steps: int, first: int = 0) -> list[RouteTrainResponse]:
    return [
        await router.train(RouteTrainRequest(rows=world_rows(16, seed=100 + step)))
        for step in range(first, first + steps)
    ]


@VARIANTS
@pytest.mark.parametrize("kind", LEARNT)
async def test_each_kind_learns_what_it_is_shown(configure: Configure, kind: Kind, variant: str) -> None:
    if kind == "matrix" and variant == "causal":
        pytest.skip("embeddings are the same for all light kinds")
    # Embeddings of random weights tell little, so what reads them must step further.
    light = kind in ON_EMBEDDINGS
    router = await started(configure(variant, kind=kind, temperature=0.5, new_rate=20 if light else 1))
    rows = world_rows(16)
    losses = [(await router.train(RouteTrainRequest(rows=rows))).metrics for _ in range(25)]
    assert losses[-1]["choice_loss"] < (0.97 if light else 0.8) * losses[0]["choice_loss"]
    assert ("response_loss" in losses[0]) == (kind == "lookahead")
    if kind == "lookahead":
        assert losses[-1]["response_loss"] < losses[0]["response_loss"]
    assert (await router.info(Empty())).version == 25


@VARIANTS
async def test_micro_batches_do_not_change_a_step(configure: Configure, variant: str) -> None:
    whole = await started(configure(variant, dropout=0.0))
    cut = await started(configure(variant, dropout=0.0, trainer={"micro_batch_tokens": 90}))
    for one, other in zip(await trained(whole, 3), await trained(cut, 3), strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    np.testing.assert_allclose(await scores(cut), await scores(whole), atol=1e-4)


@pytest.mark.parametrize("kind", [*LEARNT, "knn", "best"])
async def test_a_saved_router_goes_on_as_if_never_stopped(configure: Configure, folder: Path, kind: Kind) -> None:
    whole, first = [await started(configure(kind=kind, neighbours=3)) for _ in range(2)]
    await trained(whole, 4)
    await trained(first, 2)
    await first.save(CheckpointRequest(path=str(folder)))
    second = await started(configure(kind=kind, neighbours=3))
    await second.load(CheckpointRequest(path=str(folder)))
    assert (await second.health(HealthRequest())).version == (await first.health(HealthRequest())).version
    await trained(second, 2, first=2)
    assert await scores(second) == await scores(whole)


@pytest.mark.parametrize("kind", [*LEARNT, *MEMORY])
async def test_a_folder_is_all_that_a_router_needs(configure: Configure, folder: Path, kind: Kind) -> None:
    router = await started(configure(kind=kind, neighbours=3, seed=7, max_tokens=30, temperature=0.3))
    await trained(router, 2)
    await router.save(CheckpointRequest(path=str(folder), training_state=False))
    # Neither its kind nor anything else of its shape needs to be said again.
    again = await started(RouterConfig(trained=str(folder), trainer=None, threads=1))
    assert await scores(again) == await scores(router)
    assert [one.name for one in (await again.info(Empty())).candidates] == WORLD.candidates
    with pytest.raises(Stale, match="frozen"):
        await trained(again, 1)


async def test_embeddings_are_the_same_after_a_stop(configure: Configure, folder: Path) -> None:
    """The second time round rows come in other batches, whose padding would change the last bits."""
    rows = [
        row.model_copy(update={"prompt": Prompt(text=" ".join([row.prompt.text or ""] * (1 + i % 3)))})
        for i, row in enumerate(world_rows(12))
    ]

    async def lessons(router: RouterService, batches: Sequence[Sequence[int]]) -> None:
        for batch in batches:
            await router.train(RouteTrainRequest(rows=[rows[i] for i in batch]))

    first, second = [range(6), range(6, 12)], [[0, 7, 2], [11, 1, 10]]
    whole, part, resumed = [await started(configure(kind="linear")) for _ in range(3)]
    await lessons(whole, [*first, *second])
    await lessons(part, first)
    await part.save(CheckpointRequest(path=str(folder)))
    await resumed.load(CheckpointRequest(path=str(folder)))
    await lessons(resumed, second)
    assert await scores(resumed) == await scores(whole)


async def test_memory_kinds_say_what_they_have_seen(configure: Configure) -> None:
    rows = world_rows(40)
    means = np.mean([row.scores for row in rows], axis=0)
    for kind in ("best", "kmeans"):
        router = await started(configure(kind=kind, neighbours=1))
        # Twice the same rows count once.
        for _ in range(2):
            report = await router.train(RouteTrainRequest(rows=rows))
        assert (report.version, report.learnt) == (40, 0)
        np.testing.assert_allclose(await scores(router), np.tile(means, (12, 1)), atol=1e-6)
    nearest = await started(configure(kind="knn", neighbours=1))
    await nearest.train(RouteTrainRequest(rows=rows))
    assert await scores(nearest, [row.prompt for row in rows[:5]]) == [row.scores for row in rows[:5]]


async def test_chance_depends_on_query_and_seed_alone(configure: Configure) -> None:
    routers = [await started(configure(kind="random", seed=seed)) for seed in (0, 0, 1)]
    first, again, other = [await scores(router) for router in routers]
    assert first == again != other
    chosen = [int(np.argmax(row)) for row in await scores(routers[0], [Prompt(text=str(i)) for i in range(400)])]
    assert min(np.bincount(chosen, minlength=4)) > 60


async def test_one_router_takes_over_from_another_while_it_serves(configure: Configure, folder: Path) -> None:
    old = await started(configure())
    new = await started(configure(kind="best", candidates=[{"name": "only"}, {"name": "other"}]))
    shown = [row.model_copy(update={"scores": [1.0, 0.0], "answers": []}) for row in world_rows(3)]
    await new.train(RouteTrainRequest(rows=shown))
    await new.save(CheckpointRequest(path=str(folder), training_state=False))
    names: list[list[str]] = []

    async def ask() -> None:
        while not names or names[-1] == WORLD.candidates:
            names.append((await old.route(RouteRequest(prompts=QUERIES[:1]))).candidates)

    asking = asyncio.ensure_future(ask())
    while not names:
        await asyncio.sleep(0)
    await old.load(CheckpointRequest(path=str(folder), training_state=False))
    await asking
    assert names[0] == WORLD.candidates and names[-1] == ["only", "other"]
    route = (await old.route(RouteRequest(prompts=QUERIES[:1]))).routes[0]
    assert (route.choice, route.scores, route.uid) == ("only", [1.0, 0.0], "q0")
    assert (await old.info(Empty())).kind == "best"


@VARIANTS
async def test_a_new_candidate_learns_alone(configure: Configure, folder: Path, variant: str) -> None:
    first = await started(configure(variant, blocks="apart"))
    await trained(first, 3)
    await first.save(CheckpointRequest(path=str(folder), training_state=False))
    pool = [{"name": name} for name in (*WORLD.candidates[:2], "new", *WORLD.candidates[2:])]
    decay = {"weight_decay": 0.1}
    more = configure(variant, blocks="apart", candidates=pool, trained=str(folder), learn="new", trainer=decay)
    router = await started(more)
    before = np.array(await scores(router))
    info = await router.info(Empty())
    rows = [
        row.model_copy(update={"scores": [0, 0, 1, 0, 0], "answers": [*row.answers[:2], "a a", *row.answers[2:]]})
        for row in world_rows(16)
    ]
    for _ in range(10):
        await router.train(RouteTrainRequest(rows=rows))
    after = np.array(await scores(router))
    old, new = [0, 1, 3, 4], 2
    assert (after[:, new] > before[:, new]).all()
    if variant == "causal":
        # Candidates do not see each other: the others are as they were.
        np.testing.assert_allclose(before[:, old], await scores(first), atol=1e-6)
        np.testing.assert_array_equal(after[:, old], before[:, old])
        assert info.trainable_parameters == 5 * 48
    # A run that is continued keeps to it.
    again = folder.with_name("again")
    await router.save(CheckpointRequest(path=str(again)))
    resumed = await started(more)
    await resumed.load(CheckpointRequest(path=str(again)))
    await resumed.train(RouteTrainRequest(rows=rows))
    await router.train(RouteTrainRequest(rows=rows))
    assert await scores(resumed) == await scores(router)


async def test_a_candidate_can_be_removed(configure: Configure, folder: Path) -> None:
    first = await started(configure("causal"))
    await trained(first, 3)
    await first.save(CheckpointRequest(path=str(folder), training_state=False))
    left = [{"name": WORLD.candidates[i]} for i in (3, 1)]
    router = await started(configure("causal", candidates=left, trained=str(folder)))
    np.testing.assert_allclose(await scores(router), np.array(await scores(first))[:, [3, 1]], atol=1e-6)


async def test_evaluation_of_several_ways_to_choose(configure: Configure) -> None:
    pool = [{"name": name, "price": price} for name, price in zip(WORLD.candidates, (1, 2, 3, 4), strict=True)]
    router = await started(configure(kind="best", candidates=pool))
    rows = world_rows(50)
    await router.train(RouteTrainRequest(rows=rows))
    ways = [RouteOptions(), RouteOptions(exclude=WORLD.candidates[1:]), RouteOptions(price_weight=100.0)]
    found = await router.evaluate(RouteEvaluateRequest(rows=rows, options=ways))
    means = np.mean([row.scores for row in rows], axis=0)
    chosen, first, cheapest = (one.mean for one in found.evaluations)
    assert chosen.router == pytest.approx(means.max())
    assert first.router == cheapest.router == pytest.approx(means[0])
    assert (first.price, first.shares) == (1.0, [1, 0, 0, 0])
    assert chosen.low <= chosen.normalised <= chosen.high
    assert 0 <= found.calibration_error <= 1


async def test_a_conversation_is_read_as_its_turns(configure: Configure) -> None:
    router = await started(configure())
    turns = [ChatMessage(role="user", content="1 2"), ChatMessage(role="assistant", content="3")]
    spoken, plain = await scores(router, [Prompt(messages=turns), Prompt(text="1 2\n3")])
    assert spoken == plain


async def test_queries_of_any_length(configure: Configure) -> None:
    for variant in ("masked", "causal"):
        router = await started(configure(variant))
        info = await router.info(Empty())
        asked = [Prompt(text=""), Prompt(text=" ".join("7" * 500)), Prompt(text="1 2 3")]
        routes = (await router.route(RouteRequest(prompts=asked))).routes
        assert [route.truncated for route in routes] == [False, True, False]
        assert info.max_tokens == {"masked": 128 - 5, "causal": 128 - 10}[variant]
        # What is cut off is the beginning.
        tail = Prompt(text=" ".join("3" * 100 + "7" * 400))
        assert (await scores(router, [tail]))[0] == pytest.approx(routes[1].scores, abs=1e-6)


def without(row: RouteRow, **changes: Any) -> RouteTrainRequest:
    return RouteTrainRequest(rows=[row.model_copy(update=changes)])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"scores": [0.5]}, r"row 'q0': scores: got 1, expected one of each of 4 candidates"),
        ({"scores": [0.5, 0, 0, float("nan")]}, r"row 'q0': scores: got nan of 'model-3', expected a number from 0"),
        ({"scores": [2.0, 0, 0, 0]}, r"got 2\.0 of 'model-0'"),
        ({"answers": ["a"]}, r"row 'q0': answers: got 1, expected one of each of 4 candidates"),
        ({"prompt": Prompt(tokens=[1])}, "a router reads text"),
    ],
)
async def test_bad_rows_change_nothing(configure: Configure, changes: dict[str, Any], error: str) -> None:
    router = await started(configure())
    before = await scores(router)
    with pytest.raises(BadInput, match=error):
        await router.train(without(world_rows(1)[0], **changes))
    assert await scores(router) == before
    assert (await router.health(HealthRequest())).version == 0


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"candidates": [{"name": "a"}]}, "candidates: got 1, expected at least two"),
        ({"model": "nowhere"}, r"model: 'nowhere' does not exist"),
        ({"trained": "/nowhere"}, "holds no router"),
        ({"response_tokens": 125}, r"response_tokens: 125 leave 2 tokens for the query, in a model of 128 positions"),
    ],
)
async def test_configurations_that_cannot_work(configure: Configure, given: dict[str, Any], error: str) -> None:
    with pytest.raises(BadInput, match=error):
        await started(configure(**given))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"candidates": [{"name": "a"}, {"name": "a"}]}, "expected each name once"),
        ({"learn": "new"}, "set `trained`"),
        ({"trainer": {"workers": 2}}, "trains in one process"),
        ({"resources": {"replicas": 2}}, "one replica"),
        ({"lora": {}}, "expected null"),
    ],
)
def test_configurations_that_contradict_themselves(configure: Configure, given: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        configure(**given)


async def test_a_trained_router_of_another_kind_is_refused(configure: Configure, folder: Path) -> None:
    await (await started(configure())).save(CheckpointRequest(path=str(folder)))
    with pytest.raises(BadInput, match="kind: got 'classifier', expected 'lookahead'"):
        await started(configure(kind="classifier", trained=str(folder)))
    with pytest.raises(BadInput, match="knows all candidates"):
        await started(configure(trained=str(folder), learn="new"))


@pytest.mark.parametrize("file", ["router.json", "router.safetensors"])
async def test_a_damaged_folder_is_noticed(configure: Configure, folder: Path, file: str) -> None:
    router = await started(configure())
    await router.save(CheckpointRequest(path=str(folder)))
    before = await scores(router)
    (folder / file).write_text(json.dumps({"kind": "lookahead"}))
    with pytest.raises(Corrupt, match="router"):
        await router.load(CheckpointRequest(path=str(folder)))
    assert await scores(router) == before
