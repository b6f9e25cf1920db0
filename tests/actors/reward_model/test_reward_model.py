"""The reward model actor: what its scores mean, what it learns from, and what it leaves on disk."""

import asyncio
import math
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from actors.actor import answer, start
from actors.policy.chat import vocabulary_digest
from actors.policy.loading import Loaded
from actors.reward_model.align import values_at
from actors.reward_model.reward_model import RewardModelActor, judged
from protocols.errors import BadInput, Corrupt, Stale
from protocols.reward_model import (
    LearnRequest,
    LearnResponse,
    Reply,
    ReplyScore,
    RewardModelConfig,
    RewardModelInfo,
    RewardRequest,
)
from protocols.service import CheckpointRequest, Empty, HealthRequest
from protocols.tensor import Tensor

MakeModel = Callable[..., Awaitable[RewardModelActor]]
TRAINER = {"learning_rate": 1e-2, "weight_decay": 0.0, "micro_batch_tokens": 40}
KINDS = ["q_function", "outcome", "implicit", "implicit_outcome", "gated", "steps", "value"]
PROMPT = {"tokens": [3, 9, 27]}
TEXT = "the thesis is 日 of éé themes"


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A small language model over bytes and a few merges; neither it nor its tokenizer has a token for padding."""
    directory = tmp_path_factory.mktemp("bytes")
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(shape).save_pretrained(directory)
    byte_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def scalar_model(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The byte model with a scalar head, as a trained reward model has it."""
    directory = tmp_path_factory.mktemp("scalar")
    AutoModelForSequenceClassification.from_pretrained(byte_model, num_labels=1).save_pretrained(directory)
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(directory)
    return directory


@pytest.fixture
async def make(byte_model: Path, scalar_model: Path) -> AsyncIterator[MakeModel]:
    """Start reward models, by default over the byte model, with a head of its own if they do not learn."""
    actors: list[RewardModelActor] = []

    async def make(kind: str = "q_function", **options: Any) -> RewardModelActor:
        frozen = options.get("trainer", TRAINER) is None and "implicit" not in kind
        model = scalar_model if frozen else byte_model
        defaults = {"model": str(model), "threads": 1, "device": "cpu", "trainer": TRAINER}
        actor = RewardModelActor(RewardModelConfig.model_validate(defaults | {"kind": kind} | options))
        actors.append(actor)
        await start(actor)
        return actor

    yield make
    for actor in actors:
        await actor.close()


def a_reply(uid: str = "r", **fields: Any) -> dict[str, Any]:
    return {"uid": uid, "prompt": PROMPT} | fields


async def scores(actor: RewardModelActor, *replies: dict[str, Any]) -> list[ReplyScore]:
    response = await answer(actor, "score", RewardRequest.model_validate({"replies": replies}))
    return response.scores


async def score(actor: RewardModelActor, **fields: Any) -> ReplyScore:
    return (await scores(actor, a_reply(**fields)))[0]


def tokens_of(scored: ReplyScore) -> np.ndarray:
    assert scored.tokens is not None
    return scored.tokens.array


def loaded_of(actor: RewardModelActor) -> Loaded:
    return actor._own[0]._loaded


def raw(actor: RewardModelActor, ids: Sequence[int]) -> np.ndarray:
    """What the model says of every token of a sequence, from its whole output."""
    found = []
    for part in actor._own:
        with torch.no_grad():
            logits = part._loaded.model(input_ids=torch.tensor([ids])).logits[0]
        if logits.shape[-1] == 1:
            return logits[:, 0].numpy().astype(np.float64)
        table = torch.log_softmax(logits, -1)
        found.append(np.asarray([0.0] + [table[t - 1, ids[t]].item() for t in range(1, len(ids))]))
    trained, reference = found
    return trained - reference


PAIRS = [
    {"uid": "p0", "chosen": a_reply("c0", tokens=[5, 6, 7, 8]), "rejected": a_reply("r0", tokens=[11, 12])},
    {"uid": "p1", "chosen": a_reply("c1", tokens=[40, 41]), "rejected": a_reply("r1", tokens=[42, 43, 44, 45, 46])},
    {"uid": "p2", "chosen": a_reply("c2", text="the theme"), "rejected": a_reply("r2", text="éé", ended=False)},
]
RIGHT = [
    {"reply": a_reply("a", tokens=[5, 6, 7, 8]), "right": True},
    {"reply": a_reply("b", tokens=[11, 12]), "right": False},
    {"reply": a_reply("c", text="the theme"), "right": True},
]
TARGETS = [
    {
        "reply": a_reply("a", tokens=[5, 6, 7, 8]),
        "targets": [math.nan, 1.0, math.nan, -1.0],
        "old_values": [0.3, 0.1, 0.2, -0.5],
    },
    {"reply": a_reply("b", tokens=[11, 12]), "targets": [0.5, 0.0], "old_values": [0.0, 0.1]},
]


def lesson(kind: str, **fields: Any) -> LearnRequest:
    given: dict[str, Any] = {"replies": RIGHT if kind == "implicit_outcome" else TARGETS}
    if kind in ("q_function", "outcome", "implicit", "gated"):
        given = {"pairs": PAIRS}
    return LearnRequest.model_validate(given | fields)


async def train(actor: RewardModelActor, steps: int = 1, **fields: Any) -> list[LearnResponse]:
    request = lesson(actor._config.kind, **fields)
    return [await answer(actor, "train", request) for _ in range(steps)]


# What scores mean.


@pytest.mark.parametrize("kind", KINDS)
async def test_scores_of_a_kind(kind: str, make: MakeModel) -> None:
    actor = await make(kind)
    await train(actor, 2)
    reply = [5, 6, 7, 8, 11]
    scored = await score(actor, tokens=reply)
    whole = raw(actor, [*PROMPT["tokens"], *reply])
    own, before = whole[3:], whole[2:-1]
    tokens, value = {
        "q_function": (own, own.mean()),
        "outcome": (own, own[-1]),
        "implicit": (0.1 * own, 0.1 * own.sum()),
        "implicit_outcome": (own, own.sum()),
        "gated": (1 / (1 + np.exp(-own)), (1 / (1 + np.exp(-own))).mean()),
        "steps": (np.tanh(own), np.tanh(own[-1])),
        "value": (before, before[0]),
    }[kind]
    np.testing.assert_allclose(tokens_of(scored), tokens, atol=1e-5)
    assert scored.score == pytest.approx(value, abs=1e-5)
    assert (scored.uid, scored.ends, scored.truncated, scored.answer) == ("r", None, False, None)


@pytest.mark.parametrize("kind", ["implicit", "implicit_outcome"])
async def test_log_ratios_are_times_beta(kind: str, make: MakeModel) -> None:
    actor = await make(kind, beta=0.3)
    assert not tokens_of(await score(actor, tokens=[5, 6])).any(), "before it has learnt anything"
    await train(actor)
    # The loss of implicit_outcome has no beta (Yuan et al. 2024), so its scores have none.
    expected = (0.3 if kind == "implicit" else 1.0) * raw(actor, [*PROMPT["tokens"], 5, 6])[3:]
    np.testing.assert_allclose(tokens_of(await score(actor, tokens=[5, 6])), expected, atol=1e-6)
    assert abs(expected).max() > 1e-3


def judge(values: Sequence[float], **config: Any) -> tuple[list[float], float]:
    tokens, whole = judged(RewardModelConfig.model_validate(config), np.asarray(values, np.float64))
    return tokens.tolist(), whole


def test_the_worked_numbers_of_the_specification() -> None:
    # Q-RM's specification, section 5.4.
    log_ratios = np.asarray([-1, -0.5]) - np.asarray([-1.2, -0.9])
    tokens, whole = judge(log_ratios, kind="implicit")
    assert tokens == pytest.approx([0.02, 0.04]) and whole == pytest.approx(0.06)
    tokens, whole = judge(log_ratios, kind="implicit_outcome")
    assert tokens == pytest.approx([0.2, 0.4]) and whole == pytest.approx(0.6)
    better, worse = judge([1, -1, 0.5], kind="gated"), judge([0, -2], kind="gated")
    assert (3 + 2) / 2 * (better[1] - worse[1]) == pytest.approx(0.578046, abs=1e-6)
    steps, last = judge([0.2, -1.5, 3], kind="steps")
    assert np.square(np.asarray(steps) - [1, -1, 1]).mean() == pytest.approx(0.217743, abs=1e-6)
    assert last == steps[-1]


@pytest.mark.filterwarnings("error")
def test_a_gate_far_from_zero() -> None:
    assert judge([-1e4, 0, 1e4], kind="gated") == ([0, 0.5, 1], 0.5)


async def test_text_and_its_tokens_score_alike(make: MakeModel) -> None:
    actor = await make()
    tokenizer = loaded_of(actor).tokenizer
    ids = tokenizer(TEXT)["input_ids"]
    for ended, more in ((True, [tokenizer.eos_token_id]), (False, [])):
        by_text, by_tokens = await scores(
            actor, a_reply(text=TEXT, ended=ended), a_reply(tokens=[*ids, *more], text="not looked at")
        )
        np.testing.assert_allclose(tokens_of(by_text), tokens_of(by_tokens), atol=1e-6)
        assert by_text.score == pytest.approx(by_tokens.score, abs=1e-6)
        assert by_text.ends is not None and by_tokens.ends is None
        offsets = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
        assert by_text.ends.tolist() == [end for _, end in offsets] + [len(TEXT)] * len(more)


async def test_an_order_and_neighbours_do_not_matter(make: MakeModel) -> None:
    actor = await make(trainer=TRAINER | {"micro_batch_tokens": 20})
    replies = [a_reply(str(i), tokens=list(range(5, 6 + i))) for i in (3, 9, 0, 25, 3)]
    together = await scores(actor, *replies)
    assert [one.uid for one in together] == ["3", "9", "0", "25", "3"]
    for one, reply in zip(together, replies, strict=True):
        np.testing.assert_allclose(tokens_of(one), tokens_of((await scores(actor, reply))[0]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
async def test_scores_do_not_depend_on_later_tokens(kind: str, make: MakeModel) -> None:
    actor = await make(kind)
    await train(actor, 2)
    one, other = await scores(actor, a_reply(tokens=[5, 6, 7, 8, 11]), a_reply(tokens=[5, 6, 7, 90, 91, 92, 93]))
    known = 4 if kind == "value" else 3
    np.testing.assert_allclose(tokens_of(one)[:known], tokens_of(other)[:known], atol=1e-6)
    assert abs(tokens_of(one)[known] - tokens_of(other)[known]) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
async def test_what_exceeds_the_limit_is_cut_off(kind: str, make: MakeModel) -> None:
    actor = await make(kind, max_tokens=7)
    await train(actor)
    long, kept = await scores(actor, a_reply(tokens=[5, 6, 7, 8, 11, 12]), a_reply(tokens=[5, 6, 7, 8]))
    assert (long.truncated, kept.truncated) == (True, False)
    np.testing.assert_allclose(tokens_of(long), tokens_of(kept), atol=1e-6)
    assert long.score == pytest.approx(kept.score, abs=1e-6)
    by_text = await score(actor, text=TEXT)
    assert by_text.truncated and by_text.ends is not None
    assert len(by_text.ends) == len(tokens_of(by_text)) == 4


# Tokens of another tokenizer.


def ends_by(*words: str) -> list[int]:
    return np.cumsum([len(word) for word in words]).tolist()


CUTS = {
    "characters": ends_by(*TEXT),
    "words": ends_by("the", " thesis", " is", " 日", " of", " éé", " themes"),
    "with an end token": ends_by("the thesis is ", "日 of é", "é themes", ""),
    "one": [len(TEXT)],
}


def spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("cut", CUTS)
async def test_values_for_tokens_of_another_tokenizer(cut: str, ended: bool, make: MakeModel) -> None:
    actor = await make()
    own, other = await scores(actor, a_reply(text=TEXT, ended=ended), a_reply(text=TEXT, ended=ended, ends=CUTS[cut]))
    offsets = loaded_of(actor).tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    scored = [*offsets, (len(TEXT), len(TEXT))][: len(tokens_of(own))]
    expected = values_at(spans(CUTS[cut]), scored, tokens_of(own).astype(np.float64))
    np.testing.assert_allclose(tokens_of(other), expected, atol=1e-6)
    assert other.score == pytest.approx(own.score, abs=1e-6), "of the tokens that the model read"
    assert other.ends is None


@pytest.mark.parametrize("kind", ["implicit", "implicit_outcome"])
@pytest.mark.parametrize("cut", CUTS)
async def test_sums_for_tokens_of_another_tokenizer(cut: str, kind: str, make: MakeModel) -> None:
    actor = await make(kind)
    await train(actor, 2)
    own, other = await scores(actor, a_reply(text=TEXT), a_reply(text=TEXT, ends=CUTS[cut]))
    assert len(tokens_of(other)) == len(CUTS[cut])
    assert tokens_of(other).sum() == pytest.approx(tokens_of(own).sum(), abs=1e-5)
    assert other.score == pytest.approx(tokens_of(other).sum(), abs=1e-5)
    assert abs(own.score) > 1e-2


async def test_the_models_own_ends_change_nothing(make: MakeModel) -> None:
    actor = await make()
    own = await score(actor, text="the theme of this")
    assert own.ends is not None
    again = await score(actor, text="the theme of this", ends=own.ends.tolist())
    np.testing.assert_allclose(tokens_of(again), tokens_of(own), atol=1e-6)


async def test_tokens_after_a_cut_have_the_last_score(make: MakeModel) -> None:
    actor = await make(max_tokens=7)
    own, other = await scores(actor, a_reply(text=TEXT), a_reply(text=TEXT, ends=CUTS["characters"]))
    assert own.ends is not None and own.truncated and other.truncated
    assert set(tokens_of(other)[own.ends.tolist()[-1] :].tolist()) == {tokens_of(other)[-1]}
    assert tokens_of(other)[-1] == pytest.approx(tokens_of(own)[-1], abs=1e-6)


@pytest.mark.parametrize("ends", [[], [3, 2], [-1, 2], [2, len(TEXT) + 1]])
async def test_ends_that_are_none(ends: list[int], make: MakeModel) -> None:
    with pytest.raises(BadInput, match=r"reply 'r': ends: expected one place per token, rising from 0 to at most 28"):
        await score(await make(), text=TEXT, ends=Tensor(ends, "int32"))


async def test_a_critic_reads_its_own_tokens(make: MakeModel) -> None:
    with pytest.raises(BadInput, match="reply 'r': a critic reads tokens of its own tokenizer"):
        await score(await make("value"), text=TEXT, ends=CUTS["words"])


def test_tokens_and_ends_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="reply 'r': expected tokens of the model's tokenizer or ends"):
        Reply.model_validate(a_reply(tokens=[5], text="t", ends=[1]))


# What cannot be scored.


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"tokens": []}, "reply 'r': expected at least one token, got none"),
        ({"text": "", "ended": False}, "reply 'r': expected at least one token, got none"),
        ({"tokens": [5], "prompt": {"tokens": [4] * 7}}, "reply 'r': its prompt has 7 tokens, 7 leave no room"),
        ({"tokens": [5, 320]}, "reply 'r': got token ids 3 to 320, expected 0 to 319"),
        ({"tokens": [5], "prompt": {"text": "", "uid": "q"}}, "prompt 'q': expected at least one token"),
    ],
)
async def test_replies_that_cannot_be_scored(reply: dict[str, Any], message: str, make: MakeModel) -> None:
    actor = await make(max_tokens=7)
    with pytest.raises(BadInput, match=message) as raised:
        await scores(actor, a_reply("good", tokens=[5]), a_reply(**reply))
    assert type(raised.value) is BadInput, "which every caller knows"


@pytest.mark.parametrize("kind", ["q_function", "implicit"])
async def test_scores_that_are_not_numbers_are_corrupt(kind: str, make: MakeModel) -> None:
    actor = await make(kind)
    with torch.no_grad():
        loaded_of(actor).model.get_input_embeddings().weight[7] = math.nan
    assert np.isfinite(tokens_of(await score(actor, tokens=[5, 6]))).all()
    with pytest.raises(Corrupt, match="reply 'bad': the reward model's scores are not numbers"):
        await scores(actor, a_reply("good", tokens=[6, 5]), a_reply("bad", tokens=[5, 7, 6]))
    with pytest.raises(Corrupt, match="the gradient at weight version 0 has norm nan"):
        await train(actor)
    assert (await actor.health(HealthRequest())).version == 0


# Learning.


async def loss_by_scores(actor: RewardModelActor) -> float:
    """What the lesson's loss must be, from what `score` says."""
    kind = actor._config.kind

    async def of(reply: dict[str, Any]) -> tuple[np.ndarray, float]:
        (scored,) = await scores(actor, reply)
        return tokens_of(scored).astype(np.float64), scored.score

    def minus_log_sigmoid(x: float) -> float:
        return float(np.logaddexp(0, -x))

    losses: list[float] = []
    request = lesson(kind).model_dump(mode="json", exclude_none=True)
    for pair in request["pairs"]:
        (one, better), (other, worse) = await of(pair["chosen"]), await of(pair["rejected"])
        factor = {"q_function": 0.2, "gated": (len(one) + len(other)) / 2}.get(kind, 1.0)
        losses.append(minus_log_sigmoid(factor * (better - worse) - (2.0 if kind == "q_function" else 0.0)))
    for labelled in RIGHT if kind == "implicit_outcome" else []:
        _, logit = await of(labelled["reply"])
        losses.append(minus_log_sigmoid(logit if labelled["right"] else -logit))
    for labelled in TARGETS if kind in ("steps", "value") else []:
        tokens, _ = await of(labelled["reply"])
        errors = np.square(tokens - labelled["targets"])
        known = errors[~np.isnan(errors)].tolist()
        losses += known if kind == "value" else [float(np.mean(known))]
    return float(np.mean(losses))


@pytest.mark.parametrize("kind", KINDS)
async def test_the_loss_is_that_of_the_scores(kind: str, make: MakeModel) -> None:
    actor = await make(kind)
    for version in range(3):
        expected = await loss_by_scores(actor)
        (step,) = await train(actor)
        assert step.loss == pytest.approx(expected, abs=1e-5)
        assert (step.version, step.learnt, step.dropped) == (version + 1, 2 + (kind not in ("steps", "value")), {})
        assert (await actor.health(HealthRequest())).version == version + 1
        assert step.grad_norm > 0 and step.learning_rate == 0.01


@pytest.mark.parametrize("kind", KINDS)
async def test_training_lowers_the_loss(kind: str, make: MakeModel) -> None:
    steps = await train(await make(kind), 12)
    assert steps[-1].loss < 0.6 * steps[0].loss
    assert steps[-1].metrics.get("accuracy", 1.0) == 1.0


async def test_metrics_of_pairs(make: MakeModel) -> None:
    actor = await make()
    found = [await scores(actor, pair["chosen"], pair["rejected"]) for pair in PAIRS]
    margins = [better.score - worse.score for better, worse in found]
    (step,) = await train(actor)
    assert step.metrics == {
        "margin": pytest.approx(np.mean(margins), abs=1e-5),
        "accuracy": pytest.approx(np.mean([margin > 0 for margin in margins])),
    }


@pytest.mark.parametrize(("options", "loss"), [({"beta": 0.7}, "beta"), ({"gamma": 0.0}, "gamma")])
async def test_settings_of_the_loss(options: dict[str, float], loss: str, make: MakeModel) -> None:
    actor = await make(**options)
    found = [await scores(actor, pair["chosen"], pair["rejected"]) for pair in PAIRS]
    logits = [options.get("beta", 0.2) * (a.score - b.score) - options.get("gamma", 2.0) for a, b in found]
    (step,) = await train(actor)
    assert step.loss == pytest.approx(np.logaddexp(0, -np.asarray(logits)).mean(), abs=1e-5)


async def test_a_critic_may_be_clipped(make: MakeModel) -> None:
    actor = await make("value", clip=0.05)
    old = [labelled["old_values"] for labelled in TARGETS]
    values = [tokens_of((await scores(actor, labelled["reply"]))[0]) for labelled in TARGETS]
    errors = []
    for value_T, old_T, labelled in zip(values, old, TARGETS, strict=True):
        clipped_T = np.clip(value_T, np.asarray(old_T) - 0.05, np.asarray(old_T) + 0.05)
        errors.append(np.maximum(*(np.square(v - labelled["targets"]) for v in (value_T, clipped_T))))
    (step,) = await train(actor)
    assert step.loss == pytest.approx(np.nanmean(np.concatenate(errors)), abs=1e-5)
    without = [{name: value for name, value in labelled.items() if name != "old_values"} for labelled in TARGETS]
    with pytest.raises(BadInput, match=r"row 'a': .* needs old_scores"):
        await answer(actor, "train", LearnRequest.model_validate({"replies": without}))


async def test_targets_of_what_is_cut_off_are_left_out(make: MakeModel) -> None:
    for kind in ("value", "steps"):
        actor = await make(kind, max_tokens=5)
        reply = a_reply("a", tokens=[5, 6, 7, 8])
        kept = tokens_of((await scores(actor, reply))[0])
        replies = [{"reply": reply, "targets": [1.0, 0.5, 77.0, 77.0]}]
        step = await answer(actor, "train", LearnRequest.model_validate({"replies": replies}))
        assert step.loss == pytest.approx(np.square(kept - [1, 0.5]).mean(), abs=1e-5)


async def test_a_learning_rate_for_one_step(make: MakeModel) -> None:
    actor = await make(trainer=TRAINER | {"schedule": "linear", "total_steps": 4})
    rates = [(await train(actor, learning_rate=given))[0].learning_rate for given in (None, 0.5, None)]
    assert rates == pytest.approx([0.01, 0.5, 0.005])


DROPPED = [
    ("empty reply", a_reply("x", tokens=[5]), a_reply("y", tokens=[])),
    ("empty reply", a_reply("x", text="", ended=False), a_reply("y", tokens=[5])),
    (
        "no room after the prompt",
        *(a_reply(uid, tokens=[i], prompt={"tokens": [4] * 20}) for i, uid in enumerate("xy")),
    ),
    ("chosen equals rejected", a_reply("x", tokens=[5, 6]), a_reply("y", tokens=[5, 6])),
    # What tells them apart is cut off.
    ("chosen equals rejected", a_reply("x", tokens=[5] * 20), a_reply("y", tokens=[*[5] * 19, 6])),
]


@pytest.mark.parametrize(("reason", "chosen", "rejected"), DROPPED)
async def test_pairs_that_say_nothing_are_dropped_and_counted(
    reason: str, chosen: dict[str, Any], rejected: dict[str, Any], make: MakeModel
) -> None:
    silent = [{"uid": uid, "chosen": chosen, "rejected": rejected} for uid in "st"]
    actor, same = await make(max_tokens=20), await make(max_tokens=20)
    step = await answer(actor, "train", LearnRequest.model_validate({"pairs": [silent[0], *PAIRS, silent[1]]}))
    assert (step.learnt, set(step.dropped)) == (3, {reason})
    assert step.dropped[reason] >= 2
    assert (await train(same))[0].loss == pytest.approx(step.loss, abs=1e-6)
    with pytest.raises(BadInput, match=f"no pair or reply is left to learn from .*{reason}"):
        await answer(actor, "train", LearnRequest.model_validate({"pairs": silent}))
    assert (await actor.info(Empty())).version == 1


async def test_labelled_replies_are_dropped_too(make: MakeModel) -> None:
    actor = await make("implicit_outcome", max_tokens=20)
    empty = {"reply": a_reply("x", text="", ended=False), "right": True}
    cramped = {"reply": a_reply("y", tokens=[5], prompt={"tokens": [4] * 20}), "right": False}
    step = await answer(actor, "train", LearnRequest.model_validate({"replies": [*RIGHT, empty, cramped]}))
    assert (step.learnt, step.dropped) == (3, {"empty reply": 1, "no room after the prompt": 1})


async def test_a_pair_that_is_wrong_is_not_dropped(make: MakeModel) -> None:
    bad = {"uid": "p", "chosen": a_reply("c", tokens=[999]), "rejected": a_reply("d", tokens=[5])}
    with pytest.raises(BadInput, match="reply 'c': got token ids 3 to 999"):
        await answer(await make(), "train", LearnRequest.model_validate({"pairs": [*PAIRS, bad]}))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_kind_learns_from_pairs_or_from_replies(kind: str, make: MakeModel) -> None:
    actor = await make(kind)
    right, wrong = ("replies", "pairs") if not lesson(kind).pairs else ("pairs", "replies")
    other = {"pairs": PAIRS} if wrong == "pairs" else {"replies": RIGHT}
    for request in (other, {}, lesson(kind).model_dump() | other):
        with pytest.raises(BadInput, match=rf"(pairs|replies): a reward model of kind {kind} learns from {right}"):
            await answer(actor, "train", LearnRequest.model_validate(request))


@pytest.mark.parametrize(
    ("kind", "labelled", "message"),
    [
        ("implicit_outcome", {}, "reply 'r': right: expected true or false"),
        ("value", {"right": True}, "reply 'r': expected tokens, and targets of the same length"),
        ("steps", {"targets": [1.0]}, "reply 'r': expected tokens, and targets of the same length"),
        ("value", {"targets": [1, 2], "old_values": [1]}, "reply 'r': old_values has 1 entries for 2 tokens"),
        (
            "steps",
            {"reply": a_reply(text="ab"), "targets": [1, 2]},
            "reply 'r': expected tokens, and targets of the same length",
        ),
    ],
)
async def test_labels_that_a_kind_cannot_use(
    kind: str, labelled: dict[str, Any], message: str, make: MakeModel
) -> None:
    request = LearnRequest.model_validate({"replies": [{"reply": a_reply(tokens=[5, 6])} | labelled]})
    with pytest.raises(BadInput, match=message):
        await answer(await make(kind), "train", request)


@pytest.mark.parametrize("kind", ["q_function", "implicit"])
async def test_a_frozen_model_scores_and_does_not_learn(kind: str, make: MakeModel, byte_model: Path) -> None:
    actor = await make(kind, trainer=None, reference=str(byte_model))
    await score(actor, tokens=[5])
    with pytest.raises(Stale, match="train: this reward model is frozen"):
        await train(actor)
    assert (await actor.info(Empty())).trainable_parameters == 0


async def test_scores_and_steps_take_turns(make: MakeModel) -> None:
    actor, twin = await make("implicit"), await make("implicit")
    request = RewardRequest.model_validate({"replies": [a_reply(tokens=[5, 6, 7])]})
    before = (await twin.score(request)).scores
    await train(twin)
    after = (await twin.score(request)).scores
    first, _, second = await asyncio.gather(actor.score(request), train(actor), actor.score(request))
    assert (first.version, first.scores) == (0, before)
    assert (second.version, second.scores) == (1, after)


# Facts.


@pytest.mark.parametrize("kind", KINDS)
async def test_facts(kind: str, make: MakeModel, byte_model: Path, byte_tokenizer: Any) -> None:
    actor = await make(kind, max_tokens=500)
    total = sum(p.numel() for p in loaded_of(actor).model.parameters())
    assert await actor.info(Empty()) == RewardModelInfo(
        kind=kind,
        model=str(byte_model),
        parameters=total,
        trainable_parameters=total,
        tokenizer=vocabulary_digest(byte_tokenizer),
        max_tokens=128,
        version=0,
    )


async def test_a_new_head_depends_on_the_seed_alone(make: MakeModel) -> None:
    one, same, other = [await make(seed=seed) for seed in (1, 1, 2)]
    heads = [loaded_of(actor).model.score.weight for actor in (one, same, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


async def test_a_model_without_a_plain_head_is_refused(make: MakeModel, byte_tokenizer: Any, tmp_path: Path) -> None:
    shape = CONFIG_MAPPING["ctrl"](vocab_size=320, n_embd=8, dff=8, n_layer=1, n_head=2, n_positions=16)
    shape.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"model: cannot load .* has no linear head named `score`"):
        await make(model=str(tmp_path), init="random")


# Saving and loading.


def where(directory: Path, training_state: bool = True) -> CheckpointRequest:
    return CheckpointRequest(path=str(directory), training_state=training_state)


@pytest.mark.parametrize("kind", ["q_function", "outcome", "gated", "steps"])
async def test_a_checkpoint_is_a_sequence_classifier_of_transformers(
    kind: str, make: MakeModel, tmp_path: Path
) -> None:
    actor = await make(kind)
    await train(actor, 2)
    saved = await answer(actor, "save", where(tmp_path))
    assert {"config.json", "model.safetensors", "tokenizer.json", "trainer.pt"} <= set(saved.files)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    for reply in ([5, 6, 7, 8], [11], [40, 41, 42, 43, 44, 45]):
        ids = [*PROMPT["tokens"], *reply]
        with torch.no_grad():
            pooled = model(torch.tensor([ids])).logits.item()
        # A token's score is of the state that has read it: its own place, not the one before.
        assert raw(actor, ids)[-1] == pytest.approx(pooled, abs=1e-6)
        last = {"gated": 1 / (1 + math.exp(-pooled)), "steps": math.tanh(pooled)}.get(kind, pooled)
        assert tokens_of(await score(actor, tokens=reply))[-1] == pytest.approx(last, abs=1e-6)


async def test_whoever_loads_a_checkpoint_can_score_batches(
    make: MakeModel, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "without"
    shutil.copytree(model_dirs["llama"], directory)
    shape = LlamaConfig.from_pretrained(directory)
    shape.pad_token_id = None
    shape.save_pretrained(directory)
    actor = await make(model=str(directory))
    await answer(actor, "save", where(tmp_path / "saved"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert model.config.pad_token_id == loaded_of(actor).tokenizer.pad_token_id is not None
    rows = [[3, 9, 27, 5, 6, 7, 8], [3, 9, 27, 11]]
    padded = torch.tensor([rows[0], rows[1] + [model.config.pad_token_id] * 3])
    with torch.no_grad():
        pooled = model(padded, attention_mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3])).logits[:, 0].tolist()
    found = await scores(actor, *(a_reply(tokens=row[3:]) for row in rows))
    assert [tokens_of(one)[-1] for one in found] == pytest.approx(pooled, abs=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"lora": {"rank": 2, "dropout": 0.2}},
    "half precision": {"dtype": "bfloat16"},
}
SCHEDULED = TRAINER | {"schedule": "cosine", "warmup_steps": 1, "total_steps": 20}
ASKED = [a_reply(tokens=[5, 6, 7, 8]), a_reply(text=TEXT)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["q_function", "implicit", "value"])
async def test_training_goes_on_as_if_it_had_not_stopped(
    kind: str, options: str, make: MakeModel, tmp_path: Path
) -> None:
    first = await make(kind, trainer=SCHEDULED, **OPTIONS[options])
    await train(first, 3)
    at_three = await scores(first, *ASKED)
    await answer(first, "save", where(tmp_path))
    expected = await train(first, 3)
    second = await make(kind, trainer=SCHEDULED, **OPTIONS[options])
    assert await scores(second, *ASKED) != at_three
    await answer(second, "load", where(tmp_path))
    assert (await second.health(HealthRequest())).version == (await second.info(Empty())).version == 3
    assert await scores(second, *ASKED) == at_three
    assert await train(second, 3) == expected
    assert await scores(second, *ASKED) == await scores(first, *ASKED)


@pytest.mark.parametrize("kind", ["q_function", "implicit"])
async def test_weights_alone_are_enough_to_score(
    kind: str, make: MakeModel, byte_model: Path, tmp_path: Path
) -> None:
    actor = await make(kind)
    await train(actor, 2)
    saved = await answer(actor, "save", where(tmp_path, training_state=False))
    assert "trainer.pt" not in saved.files
    frozen = await make(kind, trainer=None, reference=str(byte_model))
    await answer(frozen, "load", where(tmp_path))
    assert await scores(frozen, *ASKED) == await scores(actor, *ASKED)
    # Log-ratios are to the model that was there before, not to the one that is loaded.
    started = await make(kind, trainer=None, model=str(tmp_path), reference=str(byte_model))
    assert await scores(started, *ASKED) == await scores(actor, *ASKED)


async def test_a_model_without_a_head_does_not_score_untrained(make: MakeModel, byte_model: Path) -> None:
    with pytest.raises(BadInput, match=r"model: cannot load .* the first is score\.weight"):
        await make(trainer=None, model=str(byte_model))


def test_log_ratios_of_a_trained_model_need_the_untrained_one() -> None:
    with pytest.raises(ValueError, match="reference: expected the untrained model for implicit without a trainer"):
        RewardModelConfig(kind="implicit", trainer=None)


async def test_a_saved_model_may_be_another_ones_start(make: MakeModel, tmp_path: Path) -> None:
    actor = await make()
    await train(actor, 2)
    await answer(actor, "save", where(tmp_path, training_state=False))
    critic = await make("value", model=str(tmp_path))
    ids = [*PROMPT["tokens"], 5, 6, 7]
    np.testing.assert_allclose(raw(critic, ids), raw(actor, ids), atol=1e-5)


async def test_only_adapter_and_head_learn(make: MakeModel, tmp_path: Path) -> None:
    actor = await make(lora={"rank": 2})
    before = {name: p.detach().clone() for name, p in loaded_of(actor).model.named_parameters()}
    info = await actor.info(Empty())
    await train(actor, 2)
    after = dict(loaded_of(actor).model.named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert all("lora_" in name or "score.modules_to_save" in name for name in changed)
    assert any("lora_" in name for name in changed) and any("score" in name for name in changed)
    assert info.trainable_parameters == sum(before[name].numel() for name, p in after.items() if p.requires_grad)
    assert info.trainable_parameters < info.parameters / 4
    await answer(actor, "save", where(tmp_path, training_state=False))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        pooled = model(torch.tensor([[*PROMPT["tokens"], 5, 6, 7]])).logits.item()
    assert tokens_of(await score(actor, tokens=[5, 6, 7]))[-1] == pytest.approx(pooled, abs=1e-5)


async def test_foreign_checkpoints_are_corrupt(
    make: MakeModel, byte_model: Path, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    actor = await make()
    for directory in (tmp_path / "nowhere", byte_model, model_dirs["gpt2"]):
        with pytest.raises(Corrupt, match="does not hold the weights of this model"):
            await answer(actor, "load", where(directory))
