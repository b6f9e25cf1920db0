"""A verifier that compares two replies, over a small policy with a tokenizer of real text."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from protocols.errors import BadInput
from protocols.messages import ChatMessage, Prompt
from protocols.policy import PolicyConfig, PolicyService, ScoreRequest, TokenizeRequest
from protocols.verifier import COMPARE, ComparedItem, CompareRequest, VerifierConfig

ASKED = [ChatMessage(role="user", content="What is the capital?")]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(MethodConfig(runs_dir=str(tmp_path), wandb="disabled"), method="m", run="r") as cluster:
        yield cluster


@pytest.fixture
async def policy(cluster: Cluster) -> PolicyService:
    return await cluster.policy(PolicyConfig.model_validate({"device": "cpu", "threads": 1, "trainer": None}))


async def chance_of_first(policy: PolicyService, one: str, other: str) -> float:
    content = COMPARE.format(prompt=ASKED[0].content, one=one, other=other, first="A", second="B")
    prompt = Prompt(messages=[ChatMessage(role="user", content=content)])
    (asked,) = (await policy.tokenize(TokenizeRequest(prompts=[prompt]))).tokens
    totals = []
    for name in ("A", "B"):
        (told,) = (await policy.tokenize(TokenizeRequest(prompts=[Prompt(text=name)], continues=True))).tokens
        scored = await policy.score(ScoreRequest(sequences=[np.concatenate([asked.array, told.array])]))
        totals.append(float(scored.logprobs[0].array[len(asked) :].sum()))
    return float(np.exp(totals[0]) / np.exp(totals).sum())


async def test_a_preference_is_the_mean_of_both_orders(cluster: Cluster, policy: PolicyService) -> None:
    verifier = await cluster.verifier(VerifierConfig(), policy)
    pairs = [("Paris", "I do not know"), ("x " * 30, "Rome"), ("y " * 5000, "z"), ("Rome", "x " * 30)]
    items = [ComparedItem(uid=f"{i}", messages=ASKED, one=a, other=b) for i, (a, b) in enumerate(pairs)]
    found = (await verifier.compare(CompareRequest(items=items))).comparisons
    assert [one.uid for one in found] == ["0", "1", "2", "3"]
    first = await chance_of_first(policy, *pairs[0])
    second = 1 - await chance_of_first(policy, *reversed(pairs[0]))
    assert found[0].shown_first == pytest.approx(first, abs=1e-5)
    assert found[0].shown_second == pytest.approx(second, abs=1e-5)
    assert found[0].preference == pytest.approx((first + second) / 2, abs=1e-5)
    # Whoever asks the other way round gets the opposite, whatever place the model likes.
    assert (found[1].preference or 0) + (found[3].preference or 0) == pytest.approx(1, abs=1e-5)
    assert found[2].preference is None and found[2].shown_first is None


async def test_names_that_do_not_tell_replies_apart_are_refused(cluster: Cluster, policy: PolicyService) -> None:
    verifier = await cluster.verifier(VerifierConfig(names=("A", "A B")), policy)
    with pytest.raises(BadInput, match=r"verifier\.names: got \('A', 'A B'\)"):
        await verifier.compare(CompareRequest(items=[ComparedItem(uid="u", messages=ASKED, one="a", other="b")]))


async def test_rules_cannot_compare(cluster: Cluster) -> None:
    verifier = await cluster.verifier(VerifierConfig(mode="rules"), None)
    with pytest.raises(BadInput, match="compare: this verifier goes by rules alone"):
        await verifier.compare(CompareRequest(items=[ComparedItem(uid="u", messages=ASKED, one="a", other="b")]))
