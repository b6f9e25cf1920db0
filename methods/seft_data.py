"""What SEFT learns from and is tested on: annotated prompts, prompts alone, and tasks with something to compare
with."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from cluster.seeds import derive_seed
from methods.chat_data import Candidate, Conversation, Judged, read_conversations, read_judged
from methods.seft_config import OWN, Config
from methods.seft_revisions import judged_by_people, read_revisions, triple_of
from methods.seft_triples import Triple, edit_distance
from methods.worlds import sorting
from protocols.errors import BadInput
from protocols.messages import ChatMessage, Prompt
from protocols.policy import PolicyService, TokenizeRequest
from protocols.service import Message

PER_CALL = 1024
Row = TypeVar("Row", Judged, Conversation)


class Task(Message):
    """A prompt of a test."""

    id: str
    """Its name."""
    messages: list[ChatMessage]
    """The conversation."""
    reference: str = ""
    """A good reply, where one is known."""


@dataclass
class Data:
    """All prompts of a run, no two alike in different parts."""

    annotated: list[Judged]
    held_out: list[Judged]
    """Annotated too; reviser and rounds do not learn from them (the desk's first policy has, from all four
    answers)."""
    prompts: list[Conversation]
    dev: list[Task]
    """What tells the rounds apart."""
    test: list[Task]
    dropped: Counter[str] = field(default_factory=Counter)
    revisions: list[Triple] = field(default_factory=list)
    """Judged by people, for the reviser to learn from."""
    revisions_held_out: list[Triple] = field(default_factory=list)
    """Of other documents, to test it."""


def data_of(config: Config) -> Data:
    """Read, or drawn by the world. Raises BadInput where a part is empty that the run needs."""
    found = drawn(config) if config.world else read(config)
    if config.world and not config.revises:
        # Held out for the reviser alone: the world has other prompts to tell rounds apart.
        found.annotated, found.held_out = found.annotated + found.held_out, []
    if not found.annotated:
        raise BadInput("held_out: nothing is left to learn from; expected a smaller share")
    if config.algorithm in OWN and not found.prompts:
        raise BadInput(f"prompts: none is left to learn from; left out were {dict(found.dropped) or 'none'}")
    return found


def drawn(config: Config) -> Data:
    """The sorting desk. Truth is known, so the rounds are told apart by prompts without annotation."""
    size, seed = config.sorting, config.seed_of_world
    counts = [size.dev_prompts, size.test_prompts, size.annotated, size.prompts]
    prompts = iter(sorting.draw(np.random.default_rng(derive_seed(seed, "sorting prompts")), sum(counts)))
    dev, test, labelled, alone = ([next(prompts) for _ in range(count)] for count in counts)
    items = sorting.annotated(np.random.default_rng(derive_seed(seed, "damages")), labelled)
    held_out = items[: max(1, round(config.held_out * len(items)))]
    return Data(
        annotated=items[len(held_out) :],
        held_out=held_out,
        prompts=[Conversation(id=text, messages=[ChatMessage(role="user", content=text)]) for text in alone],
        dev=[sorting_task(text) for text in dev],
        test=[sorting_task(text) for text in test],
    )


def sorting_task(prompt: str) -> Task:
    """A prompt of the sorting desk with its right answer."""
    messages = [ChatMessage(role="user", content=prompt)]
    return Task(id=prompt, messages=messages, reference=sorting.answer(prompt))


def read(config: Config) -> Data:
    """From files. Prompts of the tests are in no other part, annotated ones not among those without annotation."""
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    test = list(fresh(read_conversations(config.test_prompts), seen, dropped, "test_prompts"))
    judged = list(fresh(read_judged(config.preferences), seen, dropped, "preferences"))
    alone = list(fresh(read_conversations(config.prompts), seen, dropped, "prompts"))
    held_out = [item for item in judged if is_held_out(item, config.held_out)]
    annotated = [item for item in judged if not is_held_out(item, config.held_out)]
    for name, part in (("annotated prompts to learn from", annotated), ("annotated prompts held out", held_out)):
        if not part:
            raise BadInput(f"preferences: no {name} among {len(judged)}; expected more of them, or another held_out")
    tested = [Task(id=one.id, messages=one.messages, reference=one.reply) for one in test]
    dev = [Task(id=item.id, messages=item.messages, reference=best_of(item)) for item in held_out]
    dev = [task for task in dev if task.reference.strip()]
    if not dev:
        raise BadInput(
            "preferences: the best reply to each prompt that is held out is empty; expected some with text"
        )
    revised = list(judged_by_people(read_revisions(config.revisions), dropped))
    apart = {row.doc_id for row in revised if falls_below(config.held_out, hashed(row.doc_id))}
    learnt = [triple_of(row) for row in revised if row.doc_id not in apart]
    kept = [triple_of(row) for row in revised if row.doc_id in apart]
    return Data(annotated, held_out, alone, dev, tested, dropped, learnt, kept)


def fresh(rows: Iterable[Row], seen: set[str], dropped: Counter[str], what: str) -> Iterator[Row]:
    """Rows whose prompt was not met before, case and blanks apart; the others are counted. Ids become unique."""
    ids: set[str] = set()
    for row in rows:
        key = prompt_key(row.messages)
        if key in seen:
            dropped[f"{what}: prompt met before"] += 1
        else:
            seen.add(key)
            # Several files may each count their rows from 0.
            name = f"{row.id}-{key[:8]}" if row.id in ids else row.id
            ids.add(name)
            yield row.model_copy(update={"id": name})


async def fitting(data: Data, policy: PolicyService, context: int) -> Data:
    """The same without prompts that leave a policy no token to reply with, which are counted."""
    for name in ("annotated", "held_out", "prompts", "dev", "test"):
        kept: list[Any] = []
        rows = getattr(data, name)
        for start in range(0, len(rows), PER_CALL):
            piece = rows[start : start + PER_CALL]
            prompts = [Prompt(messages=row.messages, uid=row.id) for row in piece]
            tokens = (await policy.tokenize(TokenizeRequest(prompts=prompts))).tokens
            kept += [row for row, ids in zip(piece, tokens, strict=True) if len(ids) < context]
        if len(kept) < len(rows):
            data.dropped[f"{name}: prompt too long for the policy"] += len(rows) - len(kept)
        setattr(data, name, kept)
    return data


def prompt_key(messages: Sequence[ChatMessage]) -> str:
    """A conversation by its words, equal where only case and blanks differ."""
    text = "\n".join(f"{turn.role} {' '.join(turn.content.casefold().split())}" for turn in messages)
    return hashed(text)


def hashed(text: str) -> str:
    """The digest of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_held_out(item: Judged, share: float) -> bool:
    """Whether nothing may learn from it: by its prompt alone, so that it stays so when data are added."""
    return falls_below(share, prompt_key(item.messages))


def falls_below(share: float, digest: str) -> bool:
    """Whether a digest is of the first so many of all."""
    return int(digest[:8], 16) < share * 2**32


def best_reply(item: Judged) -> Candidate:
    """The reply with the highest score, or the first rank."""
    return max(item.replies, key=lambda one: one.score if one.score is not None else -(one.rank or 1.0))


def best_of(item: Judged) -> str:
    """The text of the best of its replies."""
    return best_reply(item).text


def closeness(config: Config, task: Task, reply: str) -> float:
    """How near a reply is to the reference, 0 to 1: the world's quality, or 1 - normalised edit distance of words."""
    if config.world:
        return sorting.quality(task.messages[0].content, reply)
    return 1.0 - edit_distance(reply, task.reference)[1]


def of_round(prompts: Sequence[Conversation], turn: int, count: int, seed: int) -> list[Conversation]:
    """The prompts of a round, counted from 1: fresh ones as long as there are some; all of them if `count` is 0."""
    if not count or count >= len(prompts):
        return list(prompts)
    order = np.random.default_rng(derive_seed(seed, "prompts")).permutation(len(prompts))
    places = np.arange((turn - 1) * count, turn * count) % len(prompts)
    return [prompts[int(i)] for i in order[places]]
