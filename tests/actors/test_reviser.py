"""The reviser over a small policy with a tokenizer of real text."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.reviser import ReviserActor
from cluster.cluster import Cluster
from cluster.config import MethodConfig
from protocols.errors import BadInput, Corrupt, Stale
from protocols.messages import ChatMessage, Prompt, SamplingParams
from protocols.policy import (
    PolicyConfig,
    PolicyService,
    PublishResponse,
    SampleRequest,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
)
from protocols.reviser import (
    LABELS,
    ReviseItem,
    ReviserConfig,
    ReviseRequest,
    ReviserExample,
    ReviserService,
    ReviserTrainRequest,
    Revision,
)
from protocols.service import CheckpointRequest, Empty

SHORT = SamplingParams(max_tokens=12, temperature=0.0)
BRIEF = {"prompt": "{prompt} | {reply}"}
TRAINER = {"learning_rate": 3e-3}
GOOD, WEAK, BAD = "Paris is the capital.", "Paris are the capital.", "I like fish."
TARGETS = {GOOD: ("no", ""), WEAK: ("minor", GOOD), BAD: ("major", "It is Paris.")}


def asked(content: str = "What is the capital?") -> list[ChatMessage]:
    return [ChatMessage(role="user", content=content)]


def a_request(*replies: str, **options: Any) -> ReviseRequest:
    items = [ReviseItem(uid=str(i), messages=asked(), reply=reply) for i, reply in enumerate(replies)]
    return ReviseRequest.model_validate({"items": items, "params": SHORT} | options)


EXAMPLES = [
    ReviserExample.model_validate(
        {"uid": reply, "messages": asked(), "reply": reply, "label": label, "target": target}
    )
    for reply, (label, target) in TARGETS.items()
]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(MethodConfig(runs_dir=str(tmp_path)), method="test", run="one") as cluster:
        yield cluster


@pytest.fixture
async def policy(cluster: Cluster) -> PolicyService:
    return await cluster.policy(PolicyConfig.model_validate({"device": "cpu", "threads": 1, "trainer": TRAINER}))


@pytest.fixture
async def reviser(cluster: Cluster, policy: PolicyService) -> ReviserService:
    return await cluster.reviser(ReviserConfig.model_validate(BRIEF), policy)


async def tokens(policy: PolicyService, text: str, *, turn: bool = False) -> list[int]:
    prompt = Prompt(messages=asked(text)) if turn else Prompt(text=text)
    (found,) = (await policy.tokenize(TokenizeRequest(prompts=[prompt], continues=not turn))).tokens
    return found.array.tolist()


async def outputs(policy: PolicyService, label: str, text: str = "") -> tuple[list[int], list[int]]:
    """Tokens of a label with what ends its line, and of the text after it."""
    end = [(await policy.info(Empty())).eos_token_ids[0]]
    if label == "no":
        return await tokens(policy, "[no]") + end, []
    return await tokens(policy, f"[{label}]\n"), (await tokens(policy, text) + end) if text else []


async def test_label_probabilities_are_those_of_the_policy(policy: PolicyService, reviser: ReviserService) -> None:
    (revision,) = (await reviser.revise(a_request(WEAK))).revisions
    start = await tokens(policy, f"What is the capital? | {WEAK}", turn=True)
    logits = []
    for label in LABELS:
        head, _ = await outputs(policy, label)
        scored = await policy.score(ScoreRequest(sequences=[start + head]))
        logits.append(scored.logprobs[0].array[len(start) :].sum())
    shares = np.exp(np.array(logits) - np.logaddexp.reduce(logits))
    assert revision.label_probs is not None
    assert list(revision.label_probs.model_dump().values()) == pytest.approx(shares.tolist(), rel=1e-4)
    assert revision.label == LABELS[int(shares.argmax())]


async def test_the_text_continues_the_label(policy: PolicyService, reviser: ReviserService) -> None:
    (revision,) = (await reviser.revise(a_request(BAD))).revisions
    assert revision.label not in (None, "no"), "an untrained reviser that writes nothing shows nothing"
    head, _ = await outputs(policy, str(revision.label))
    start = await tokens(policy, f"What is the capital? | {BAD}", turn=True)
    sampled = await policy.sample(SampleRequest(prompts=[Prompt(tokens=start + head)], params=SHORT))
    (completion,) = sampled.results[0].completions
    assert (revision.text, revision.finish_reason) == (completion.text, completion.finish_reason)
    assert revision.decoded_tokens == len(completion.tokens) > 0


async def test_the_loss_weighs_labels(policy: PolicyService, reviser: ReviserService) -> None:
    """SEFT 2.3: sum of w nll over sum of w, with w 3 on the label, over its tokens, and 1 on text and end."""
    total = weight = 0.0
    end = (await policy.info(Empty())).eos_token_ids[0]
    for one in EXAMPLES:
        start = await tokens(policy, f"What is the capital? | {one.reply}", turn=True)
        head, text = await outputs(policy, one.label, one.target)
        scored = await policy.score(ScoreRequest(sequences=[start + head + text]))
        nll = -scored.logprobs[0].array[len(start) :]
        named = head[:-1] if one.label == "no" else head
        weights = np.array([3.0 / len(named)] * len(named) + [1.0] * (len(head) - len(named) + len(text)))
        assert (head + text)[-1] == end
        total, weight = total + float((weights * nll).sum()), weight + weights.sum()
    answer = await reviser.train(ReviserTrainRequest(examples=EXAMPLES))
    assert answer.loss == pytest.approx(total / weight, rel=1e-5)
    assert (answer.learnt, answer.too_long, answer.version) == (3, 0, 1)


async def test_it_learns_labels_and_texts(reviser: ReviserService) -> None:
    for _ in range(40):
        answer = await reviser.train(ReviserTrainRequest(examples=EXAMPLES))
    assert answer.loss < 0.05
    revisions = (await reviser.revise(a_request(GOOD, WEAK, BAD))).revisions
    assert [one.label for one in revisions] == ["no", "minor", "major"]
    assert [one.text for one in revisions] == [GOOD, GOOD, "It is Paris."]
    assert [one.decoded_tokens > 0 for one in revisions] == [False, True, True]
    assert revisions[0].finish_reason is None
    assert {one.version for one in revisions} == {40}
    # Streamed, it is the same.
    assert await streamed(reviser, a_request(GOOD, WEAK, BAD)) == [(one.label, one.text) for one in revisions]
    labels = (await reviser.revise(a_request(GOOD, WEAK, BAD, labels_only=True))).revisions
    assert [(one.label, one.text) for one in labels] == [("no", GOOD), ("minor", WEAK), ("major", BAD)]
    assert [one.label_probs for one in labels] == [one.label_probs for one in revisions]


async def streamed(reviser: ReviserService, request: ReviseRequest) -> list[tuple[str | None, str]]:
    labels: dict[int, str | None] = {}
    texts: dict[int, str] = {}
    async for delta in reviser.stream(request):
        labels.setdefault(delta.index, delta.label)
        texts[delta.index] = texts.get(delta.index, "") + delta.text
    return [(labels[i], texts[i]) for i in range(len(request.items))]


async def test_nobody_is_answered_by_samplers_that_are_behind(
    policy: PolicyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviser = ReviserActor(ReviserConfig.model_validate(BRIEF), policy)
    await reviser.setup()
    began, go_on, published, behind = asyncio.Event(), asyncio.Event(), [0], [0]
    publish, score = policy.publish, policy.score

    async def slowly(request: Empty) -> PublishResponse:
        began.set()
        await go_on.wait()
        response = await publish(request)
        published.append(response.version)
        return response

    async def scored(request: ScoreRequest) -> ScoreResponse:
        behind.append(published[-1])
        return await score(request)

    monkeypatch.setattr(policy, "publish", slowly)
    monkeypatch.setattr(policy, "score", scored)
    await reviser.train(ReviserTrainRequest(examples=EXAMPLES))
    asking = [asyncio.ensure_future(reviser.revise(a_request(WEAK, labels_only=True))) for _ in range(2)]
    await began.wait()
    # A step amid the publication, which may have come too late for it.
    await reviser.train(ReviserTrainRequest(examples=EXAMPLES))
    go_on.set()
    await asyncio.gather(*asking)
    assert len(published) == 3 and behind == [0, 2, 2]
    await reviser.revise(a_request(WEAK, labels_only=True))
    assert len(published) == 3


async def test_steps_do_not_mix(reviser: ReviserService) -> None:
    """Of two callers each has a step of its own."""
    first, second = await asyncio.gather(
        *(reviser.train(ReviserTrainRequest(examples=[one])) for one in EXAMPLES[1:])
    )
    assert (first.version, second.version) == (1, 2)


async def test_what_needs_no_revision_comes_back_as_it_was(reviser: ReviserService) -> None:
    odd = "  tabs\t[major]\r\nand \ud7ff\N{GRINNING FACE} blanks \n\n"
    example = ReviserExample(uid="e", messages=asked(), reply=odd, label="no")
    for _ in range(15):
        await reviser.train(ReviserTrainRequest(examples=[example]))
    (revision,) = (await reviser.revise(a_request(odd))).revisions
    assert revision.label == "no"
    assert revision.text.encode("utf-8") == odd.encode("utf-8")
    assert revision.decoded_tokens == 0


async def test_without_labels_all_is_rewritten(cluster: Cluster, policy: PolicyService) -> None:
    plain = await cluster.reviser(ReviserConfig.model_validate(BRIEF | {"adaptive": False}), policy, name="plain")
    for _ in range(40):
        await plain.train(ReviserTrainRequest(examples=EXAMPLES))
    revisions = (await plain.revise(a_request(GOOD, WEAK, BAD))).revisions
    assert [one.text for one in revisions] == [GOOD, GOOD, "It is Paris."]
    assert all(one.label is None and one.label_probs is None and one.decoded_tokens for one in revisions)


async def test_what_is_too_long_is_said_and_not_cut(policy: PolicyService, reviser: ReviserService) -> None:
    long = "word " * (await policy.info(Empty())).context_length
    fits, too_long = (await reviser.revise(a_request(BAD, long))).revisions
    assert too_long == Revision(uid="1", text=long, too_long=True)
    assert not fits.too_long and fits.label is not None
    example = ReviserExample(uid="long", messages=asked(), reply=BAD, label="major", target=long)
    answer = await reviser.train(ReviserTrainRequest(examples=[*EXAMPLES, example]))
    assert (answer.learnt, answer.too_long) == (3, 1)
    with pytest.raises(BadInput, match="examples: none of 1 fits the policy's context of 2048 tokens"):
        await reviser.train(ReviserTrainRequest(examples=[example]))


async def test_earlier_turns_are_shown(reviser: ReviserService, policy: PolicyService) -> None:
    turns = [
        ChatMessage(role="user", content="Hello."),
        ChatMessage(role="assistant", content="Good day."),
        ChatMessage(role="user", content="What is the capital?"),
    ]
    item = ReviseItem(uid="0", messages=turns, reply=WEAK)
    (one,) = (await reviser.revise(ReviseRequest(items=[item], params=SHORT))).revisions
    spoken = "User: Hello.\n\nAssistant: Good day.\n\nUser: What is the capital?"
    flat = ReviseItem(uid="0", messages=asked(spoken), reply=WEAK)
    assert one == (await reviser.revise(ReviseRequest(items=[flat], params=SHORT))).revisions[0]


# State, and what is refused.


async def test_weights_of_another_prompt_are_refused(
    cluster: Cluster, policy: PolicyService, reviser: ReviserService, tmp_path: Path
) -> None:
    folder = CheckpointRequest(path=str(tmp_path / "saved"))
    await reviser.save(folder)
    assert (await reviser.load(folder)).files == ["state.json"]
    for name, change in {
        "other-prompt": {"prompt": "{prompt} / {reply}"},
        "other-names": {"names": {"no": "none", "minor": "some", "major": "all"}},
        "plain": {"adaptive": False},
    }.items():
        other = await cluster.reviser(ReviserConfig.model_validate(BRIEF | change), policy, name=name)
        with pytest.raises(Corrupt, match="it was trained with another `prompt`, `names` or `adaptive`"):
            await other.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "{prompt}"}, r"expected the places \{prompt\} and \{reply\}"),
        ({"prompt": "{prompt} {reply} {answer}"}, "none but"),
        ({"prompt": "{prompt:{labels}} {reply}"}, "none but"),
        ({"prompt": "{prompt!r} {reply}"}, "none but"),
        ({"prompt": "{prompt} {reply} {"}, "write a brace that is text twice"),
        ({"names": {"no": "no", "minor": "minor"}}, "one line of text for each of no, minor, major"),
        ({"names": {"no": "m", "minor": "minor", "major": "major"}}, "none begins with another"),
        ({"names": {"no": "a", "minor": "a", "major": "b"}}, "none begins with another"),
        ({"label_weight": 0}, "label_weight"),
        ({"resources": {"replicas": 2}}, "a reviser has one"),
    ],
)
def test_configurations_that_cannot_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReviserConfig.model_validate(change)


async def test_a_frozen_policy_does_not_learn(cluster: Cluster) -> None:
    config = PolicyConfig.model_validate({"device": "cpu", "threads": 1, "trainer": None})
    reviser = await cluster.reviser(ReviserConfig(), await cluster.policy(config, name="frozen"))
    with pytest.raises(Stale, match="frozen"):
        await reviser.train(ReviserTrainRequest(examples=EXAMPLES))


def test_a_target_is_missing() -> None:
    with pytest.raises(ValueError, match="example 'e': expected a target for the label minor"):
        ReviserExample(uid="e", messages=asked(), reply="r", label="minor")
