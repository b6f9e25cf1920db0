"""The map: each distinct question is asked once, answers are kept in one file, and nothing kept is asked again."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from methods.phenotyping_prompts import AFTER_THOUGHT, ANSWERS, MOST_WRITTEN, Answer, PromptConfig
from methods.phenotyping_sample import Asked, written
from protocols.endings import ending_logprobs
from protocols.errors import BadInput, Corrupt
from protocols.messages import ChatMessage, FinishReason, Prompt, SamplingParams
from protocols.policy import PolicyService, SampleRequest, TokenizeRequest
from protocols.tensor import Tensor

Ids = NDArray[np.int32]
LOCKED_S = 60.0
"""How long to wait for another run that writes to the same file."""
KEYS_AT_ONCE = 500
SURE: dict[Answer, tuple[float, float, float]] = {"yes": (1, 0, 0), "no": (0, 1, 0), "uncertain": (0.5, 0, 0.5)}
"""What a written answer counts as (specification 2.6)."""
COLUMNS = "key, yes, no, uncertain, tokens, decoded, asked_for, answer, status, quote_start, quote_end, seconds"


@dataclass(frozen=True)
class Question:
    """What is asked, under its name."""

    key: str
    messages: list[ChatMessage]
    snippet: str = ""
    """The text that it is about, as it is shown; a written answer quotes from it."""
    phenotype: str = ""
    """Questions about the same one begin with the same words, and are asked together."""


@dataclass(frozen=True)
class Said:
    """The policy's answer."""

    probs: tuple[float, float, float] | None
    """Of yes, no and uncertain, among the three; None: the question exceeds the policy's context."""
    tokens: int
    """Tokens of the prompt, and of a second one where the first answer could not be used."""
    decoded: int = 0
    """Tokens that were sampled."""
    asked_for: str = ""
    """The run, and which of its buckets."""
    answer: Answer | Literal["failed"] = "failed"
    """The most likely one, or the one that was written."""
    status: str = ""
    """Of a written answer: present, history, negated, ...; empty where none could be used."""
    quote: tuple[int, int] | None = None
    """Of a written answer: first character and the place behind the last in the snippet as it is shown."""
    seconds: float = 0.0
    """Its share of the time that its call took."""


class AnswerStore:
    """Answers by question, in an SQLite file. Each batch of them is there as a whole or not at all."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._base = sqlite3.connect(file, timeout=LOCKED_S)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=FULL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, yes REAL, no REAL, uncertain REAL,"
                " tokens INTEGER NOT NULL, decoded INTEGER NOT NULL, asked_for TEXT NOT NULL, answer TEXT NOT NULL,"
                " status TEXT NOT NULL, quote_start INTEGER, quote_end INTEGER, seconds REAL NOT NULL) WITHOUT ROWID"
            )
            # A table of another version is told now, and not after the first answers.
            self._base.execute(f"SELECT {COLUMNS} FROM answers LIMIT 0")
        except sqlite3.Error as error:
            raise BadInput(f"answers: {file} cannot be used: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def known(self, keys: Sequence[str]) -> dict[str, Said]:
        """The answers that are there."""
        found: dict[str, Said] = {}
        for start in range(0, len(keys), KEYS_AT_ONCE):
            piece = keys[start : start + KEYS_AT_ONCE]
            marks = ",".join("?" * len(piece))
            rows = self._base.execute(f"SELECT {COLUMNS} FROM answers WHERE key IN ({marks})", piece)
            for key, yes, no, uncertain, tokens, decoded, asked_for, answer, status, start, end, seconds in rows:
                probs = None if yes is None else (yes, no, uncertain)
                quote = None if start is None else (start, end)
                found[key] = Said(probs, tokens, decoded, asked_for, answer, status, quote, seconds)
        return found

    def add(self, answers: dict[str, Said]) -> None:
        """Keep them; of one that is there already the first counts."""
        rows = [
            (
                *(key, *(one.probs or (None, None, None)), one.tokens, one.decoded, one.asked_for),
                *(one.answer, one.status, *(one.quote or (None, None)), one.seconds),
            )
            for key, one in answers.items()
        ]
        marks = ",".join("?" * len(COLUMNS.split(",")))
        with self._base:
            self._base.executemany(f"INSERT OR IGNORE INTO answers ({COLUMNS}) VALUES ({marks})", rows)


@dataclass(frozen=True)
class Asker:
    """A policy, and what it is asked with."""

    policy: PolicyService
    prompt: PromptConfig
    heads: list[Ids]
    """Tokens of the three answers, and of what leads from a thought to them."""
    context: int
    """Longest sequence of the policy."""
    per_call: int
    """Questions in one call."""
    at_once: int
    """Calls under way at once."""
    structured: bool = False
    """Whether the policy can be held to the form of a written answer."""

    @property
    def room(self) -> int:
        """Most tokens of a prompt."""
        if self.prompt.answer == "sample":
            return self.context - MOST_WRITTEN
        thought = self.prompt.reasoning_tokens if self.prompt.variant == "reasoning" else 0
        return self.context - max(map(len, self.heads)) - thought


async def make_asker(
    policy: PolicyService,
    prompt: PromptConfig,
    context: int,
    per_call: int,
    at_once: int,
    *,
    structured: bool = False,
) -> Asker:
    """Raises BadInput if the policy's tokenizer does not tell the answers apart."""
    lead = AFTER_THOUGHT if prompt.variant == "reasoning" else ""
    texts = [Prompt(text=f"{lead}{prompt.labels[one]}", uid=f"prompt.labels.{one}") for one in ANSWERS]
    told = (await policy.tokenize(TokenizeRequest(prompts=texts, continues=True))).tokens
    heads = [one.array.astype(np.int32) for one in told]
    if len({tuple(head.tolist()) for head in heads}) < len(heads) or not all(len(head) for head in heads):
        raise BadInput(
            f"prompt.labels: got {prompt.labels}, which are not three texts to the policy's tokenizer; expected words"
            " that it knows"
        )
    return Asker(policy, prompt, heads, context, per_call, at_once, structured)


async def ask(
    asker: Asker, questions: Sequence[Question], store: AnswerStore, asked_for: str, show: Callable[[int, int], None]
) -> dict[str, Said]:
    """Answers by key. What the store holds is not asked again.

    Calls are cut the same way however often the run is stopped: what was asked for other buckets is left out, what
    was asked for this one is not.
    """
    distinct = {one.key: one for one in questions}
    known = store.known(list(distinct))
    mine = [one for key, one in distinct.items() if key not in known or known[key].asked_for == asked_for]
    mine.sort(key=lambda one: (one.phenotype, sum(len(turn.content) for turn in one.messages), one.key))
    calls = [mine[start : start + asker.per_call] for start in range(0, len(mine), asker.per_call)]
    left = [call for call in calls if not all(one.key in known for one in call)]
    done, waiting = sum(map(len, calls)) - sum(map(len, left)), iter(left)

    async def work() -> None:
        nonlocal done
        for call in waiting:
            said = await answered(asker, call, asked_for)
            store.add(said)
            # Where another run was first, its answer counts.
            known.update(store.known(list(said)))
            done += len(call)
            show(done, len(mine))

    tasks = [asyncio.ensure_future(work()) for _ in range(asker.at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return known


async def answered(asker: Asker, questions: Sequence[Question], asked_for: str) -> dict[str, Said]:
    """One call's worth."""
    begun = time.monotonic()
    tokens = await tokens_of(asker, questions)
    found = {one.key: Said(None, len(ids), 0, asked_for) for one, ids in zip(questions, tokens, strict=True)}
    fitting = [(one, ids) for one, ids in zip(questions, tokens, strict=True) if len(ids) <= asker.room]
    told = await (in_writing if asker.prompt.answer == "sample" else by_labels)(asker, fitting)
    seconds = (time.monotonic() - begun) / max(1, len(fitting))
    for (one, _), said in zip(fitting, told, strict=True):
        found[one.key] = replace(said, asked_for=asked_for, seconds=seconds)
    return found


async def tokens_of(asker: Asker, questions: Sequence[Question]) -> list[Ids]:
    """What the policy would read."""
    if not questions:
        return []
    asked = [Prompt(messages=one.messages, uid=one.key) for one in questions]
    told = (await asker.policy.tokenize(TokenizeRequest(prompts=asked))).tokens
    return [one.array.astype(np.int32) for one in told]


async def in_writing(asker: Asker, asked: Sequence[tuple[Question, Ids]]) -> list[Said]:
    """Answers in the policy's own words."""
    texts = [Asked(one.messages, ids, one.snippet) for one, ids in asked]
    found = await written(asker.policy, asker.prompt, asker.context, texts, structured=asker.structured)
    return [Said(SURE[one.answer], one.tokens, one.decoded, "", one.answer, one.status, one.quote) for one in found]


async def by_labels(asker: Asker, asked: Sequence[tuple[Question, Ids]]) -> list[Said]:
    """Probabilities of the answers, of which none is written."""
    prompts, decoded = [ids for _, ids in asked], [0] * len(asked)
    if asker.prompt.variant == "reasoning" and prompts:
        prompts, decoded = await reasoned(asker, prompts)
    return [
        Said(probs, len(ids), count, "", ANSWERS[probs.index(max(probs))])
        for (_, ids), probs, count in zip(asked, await label_probs(asker, prompts), decoded, strict=True)
    ]


async def reasoned(asker: Asker, prompts: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """The prompts with what the policy says before it answers, and how many tokens that is."""
    params = SamplingParams(temperature=0.0, max_tokens=asker.prompt.reasoning_tokens, stop=["\n"])
    request = SampleRequest(prompts=[Prompt(tokens=Tensor(ids)) for ids in prompts], params=params)
    said = [one.completions[0] for one in (await asker.policy.sample(request)).results]
    # The answer follows what was said, and not the end of it.
    thoughts = [one.tokens.array[: -1 if one.finish_reason is FinishReason.STOP else None] for one in said]
    longer = [np.concatenate([ids, more]).astype(np.int32) for ids, more in zip(prompts, thoughts, strict=True)]
    return longer, [len(one.tokens) for one in said]


async def label_probs(asker: Asker, prompts: Sequence[Ids]) -> list[tuple[float, float, float]]:
    """Of each prompt p(yes), p(no), p(uncertain) among the three: softmax over summed log-probs of their tokens."""
    if not prompts:
        return []
    logits_BA, _ = await ending_logprobs(asker.policy, prompts, asker.heads)
    return [softmax(logits) for logits in logits_BA.tolist()]


def softmax(logits: Sequence[float]) -> tuple[float, float, float]:
    """exp(z) / sum exp(z). Raises Corrupt for what is no number."""
    z = np.asarray(logits, np.float64)
    if not np.isfinite(z).all():
        raise Corrupt("the policy's log-probs are not numbers")
    shares = np.exp(z - z.max())
    yes, no, uncertain = (shares / shares.sum()).tolist()
    return yes, no, uncertain
