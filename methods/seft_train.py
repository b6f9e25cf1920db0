"""Training rows of SEFT and its baselines: examples of the reviser, replies, and pairs of replies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from methods.chat_data import Conversation, Judged
from methods.seft_config import Config
from methods.seft_data import Data, best_of, best_reply
from methods.seft_rounds import Cast, PseudoLabel, sampled
from methods.seft_targets import own_score
from methods.seft_triples import Triple, Triples, balanced, edit_distance, triples_of
from protocols.errors import BadInput
from protocols.losses import LossSpec, SFTLoss
from protocols.messages import ChatMessage, FinishReason, Prompt
from protocols.policy import PolicyService, ScoreRequest, TokenizeRequest
from protocols.reviser import Label, ReviserExample
from protocols.reward_model import Preference, Reply
from protocols.tensor import Tensor
from protocols.training import TrainRow

TERM = "seft"
ROWS_PER_CALL = 1024


@dataclass(frozen=True)
class Lesson:
    """A reply to learn: alone, or against a worse one."""

    id: str
    messages: list[ChatMessage]
    better: str
    worse: str | None = None
    weight: float = 1.0


def loss_of(config: Config) -> LossSpec:
    """What the policy's rows are trained with."""
    if config.algorithm == "dpo":
        return config.dpo
    return config.orpo if config.algorithm == "orpo" else SFTLoss()


def from_best(items: Sequence[Judged]) -> list[Lesson]:
    """The best reply to each prompt, where it is not empty."""
    return [Lesson(item.id, item.messages, best_of(item)) for item in items if best_of(item).strip()]


def from_pairs(items: Sequence[Judged]) -> list[Lesson]:
    """The best reply to each prompt against each that is worse, where it is not empty."""
    lessons = []
    for item in items:
        best = best_reply(item)
        for i, one in enumerate(item.replies):
            worse = (one.score, one.rank) != (best.score, best.rank) and one.text != best.text
            if worse and best.text.strip():
                lessons.append(Lesson(f"{item.id}/{i}", item.messages, best.text, one.text))
    return lessons


def from_round(found: Sequence[PseudoLabel], *, by_confidence: bool) -> list[Lesson]:
    """The targets of a round that may be learnt."""
    lessons = []
    for one in found:
        if not one.problem:
            weight = confidence_of(one) if by_confidence else 1.0
            lessons.append(Lesson(one.uid, one.messages, one.target, weight=weight))
    return lessons


def confidence_of(one: PseudoLabel) -> float:
    """How sure the reviser is that the target is right; 1 where it was not asked.

    Of a reply that was kept p(no), also where it was kept against its own revision, after another label; of one that
    was chosen among others the score that it was chosen by; of a revision the probability of the reply's label.
    """
    if one.label_probs is None:
        return 1.0
    if one.source == "kept":
        return one.label_probs.no
    if one.source == "own_best":
        return own_score(one.label_probs)
    return float(max(one.label_probs.model_dump().values()))


def preferences_of(lessons: Sequence[Lesson]) -> list[Preference]:
    """Pairs as a reward model learns from them."""
    return [
        Preference(
            uid=one.id,
            chosen=Reply(uid=one.id, prompt=Prompt(messages=one.messages), text=one.better),
            rejected=Reply(uid=one.id, prompt=Prompt(messages=one.messages), text=one.worse or ""),
        )
        for one in lessons
    ]


async def rows_of(cast: Cast, lessons: Sequence[Lesson]) -> tuple[list[list[TrainRow]], int]:
    """The rows of each lesson, one or two, and how many lessons exceed the context and are left out, never cut."""
    found: list[list[TrainRow]] = []
    for start in range(0, len(lessons), ROWS_PER_CALL):
        piece = lessons[start : start + ROWS_PER_CALL]
        prompts = [Prompt(messages=one.messages, uid=one.id) for one in piece]
        texts = [Prompt(text=one.better, uid=one.id) for one in piece]
        texts += [Prompt(text=one.worse, uid=one.id) for one in piece if one.worse is not None]
        asked = (await cast.policy.tokenize(TokenizeRequest(prompts=prompts))).tokens
        told = iter((await cast.policy.tokenize(TokenizeRequest(prompts=texts, continues=True))).tokens)
        better = [next(told).array for _ in piece]
        for one, prompt, reply in zip(piece, asked, better, strict=True):
            sides = [(reply, one.weight)] if one.worse is None else [(reply, 1.0), (next(told).array, -1.0)]
            found.append([row_of(one.id, prompt.array, text, weight, cast.end) for text, weight in sides])
    fitting = [rows for rows in found if all(len(row.tokens) <= cast.context for row in rows)]
    if cast.reference is not None:
        fitting = await with_reference(cast.reference, fitting)
    return fitting, len(found) - len(fitting)


def row_of(name: str, prompt: np.ndarray, reply: np.ndarray, weight: float, end: int) -> TrainRow:
    """A row whose term is on the reply and its end token."""
    weights = np.concatenate([np.zeros(len(prompt)), np.full(len(reply) + 1, weight)])
    tokens = np.concatenate([prompt, reply, [end]]).astype(np.int32)
    return TrainRow(row_id=name, tokens=Tensor(tokens), terms={TERM: Tensor(weights, "float32")}, pair=name)


async def with_reference(reference: PolicyService, lessons: Sequence[list[TrainRow]]) -> list[list[TrainRow]]:
    """The same rows with their log-probs under the policy before it is trained."""
    found = []
    for start in range(0, len(lessons), ROWS_PER_CALL):
        piece = lessons[start : start + ROWS_PER_CALL]
        scored = await reference.score(ScoreRequest(sequences=[row.tokens for rows in piece for row in rows]))
        known = iter(scored.logprobs)
        found += [[row.model_copy(update={"reference_logprobs": next(known)}) for row in rows] for rows in piece]
    return found


async def reviser_data(cast: Cast, config: Config, data: Data, rng: np.random.Generator) -> Triples:
    """Stage A: labelled replies and revisions, balanced, and if wanted some of the policy's own among them."""
    found = triples_of(data.annotated, config.rule)
    found.kept += data.revisions
    if config.own_replies:
        found.kept += await own_triples(cast, config, data.annotated)
    if config.reviser.adaptive:
        found.kept = balanced(found.kept, rng)
    else:
        # One that has no labels cannot learn to leave a reply alone.
        found.kept = [one for one in found.kept if one.label != "no"]
    if not found.kept:
        raise BadInput(f"preferences: no reply is left to learn revisions from; left out were {dict(found.dropped)}")
    return found


async def own_triples(cast: Cast, config: Config, items: Sequence[Judged]) -> list[Triple]:
    """The policy's own replies to annotated prompts: they are revised into the best annotated one."""
    asked = [Conversation(id=item.id, messages=item.messages) for item in items]
    answers = []
    for start in range(0, len(asked), config.prompts_per_call):
        piece = asked[start : start + config.prompts_per_call]
        answers += await sampled(cast.policy, config, piece, 0, config.own_replies)
    found = []
    for item, completions in zip(items, answers, strict=True):
        best, seen = best_of(item), {reply.text for reply in item.replies}
        for i, one in enumerate(completions):
            if one.finish_reason is FinishReason.LENGTH or one.text in seen or not one.text.strip():
                continue
            seen.add(one.text)
            apart = edit_distance(one.text, best)[1]
            label: Label = "no" if not apart else "major" if apart > config.rule.major_distance else "minor"
            name = f"{item.id}/own {i}"
            found.append(
                Triple(
                    id=name,
                    source_id=item.id,
                    messages=item.messages,
                    reply=one.text,
                    label=label,
                    target=one.text if label == "no" else best,
                )
            )
    return found


def example_of(one: Triple) -> ReviserExample:
    """As the reviser learns it."""
    return ReviserExample(uid=one.id, messages=one.messages, reply=one.reply, label=one.label, target=one.target)
