"""The map: each distinct question is asked once, answers are kept in one file, and nothing kept is asked again."""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from methods.phenotyping_prompts import ANSWERS, PromptConfig
from protocols.errors import BadInput, Corrupt
from protocols.messages import ChatMessage, Prompt, SamplingParams
from protocols.policy import PolicyService, SampleRequest, ScoreRequest, TokenizeRequest
from protocols.tensor import Tensor

Ids = NDArray[np.int32]
KEYS_AT_ONCE = 500


@dataclass(frozen=True)
class Question:
    """What is asked, under its name."""

    key: str
    messages: list[ChatMessage]


@dataclass(frozen=True)
class Said:
    """The policy's answer."""

    probs: tuple[float, float, float] | None
    """Of yes, no and uncertain, among the three; None: the question exceeds the policy's context."""
    tokens: int
    """Tokens of the prompt."""
    decoded: int = 0
    """Tokens that were sampled."""
    bucket: int = 0
    """Whose patients it was asked for."""


class AnswerStore:
    """Answers by question, in an SQLite file. Each batch of them is there as a whole or not at all."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._base = sqlite3.connect(file)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=FULL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, yes REAL, no REAL, uncertain REAL,"
                " tokens INTEGER NOT NULL, decoded INTEGER NOT NULL, bucket INTEGER NOT NULL) WITHOUT ROWID"
            )
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
            rows = self._base.execute(f"SELECT * FROM answers WHERE key IN ({marks})", piece)
            for key, yes, no, uncertain, tokens, decoded, bucket in rows:
                probs = None if yes is None else (yes, no, uncertain)
                found[key] = Said(probs, tokens, decoded, bucket)
        return found

    def add(self, answers: dict[str, Said]) -> None:
        """Keep them; of one that is there already the first counts."""
        rows = [
            (key, *(one.probs or (None, None, None)), one.tokens, one.decoded, one.bucket)
            for key, one in answers.items()
        ]
        with self._base:
            self._base.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


@dataclass(frozen=True)
class Asker:
    """A policy, and what it is asked with."""

    policy: PolicyService
    prompt: PromptConfig
    heads: list[Ids]
    """Tokens of the three answers."""
    context: int
    """Longest sequence of the policy."""
    per_call: int
    """Questions in one call."""
    at_once: int
    """Calls under way at once."""


async def make_asker(policy: PolicyService, prompt: PromptConfig, context: int, per_call: int, at_once: int) -> Asker:
    """Raises BadInput if the policy's tokenizer does not tell the answers apart."""
    texts = [Prompt(text=prompt.labels[one], uid=f"prompt.labels.{one}") for one in ANSWERS]
    told = (await policy.tokenize(TokenizeRequest(prompts=texts, continues=True))).tokens
    heads = [one.array.astype(np.int32) for one in told]
    if len({tuple(head.tolist()) for head in heads}) < len(heads) or not all(len(head) for head in heads):
        raise BadInput(
            f"prompt.labels: got {prompt.labels}, which are not three texts to the policy's tokenizer; expected words"
            " that it knows"
        )
    return Asker(policy, prompt, heads, context, per_call, at_once)


async def ask(
    asker: Asker, questions: Sequence[Question], store: AnswerStore, bucket: int, show: Callable[[int, int], None]
) -> dict[str, Said]:
    """Answers by key. What the store holds is not asked again.

    Calls are cut the same way however often the run is stopped: what was asked for other buckets is left out, what
    was asked for this one is not.
    """
    distinct = {one.key: one for one in questions}
    known = store.known(list(distinct))
    mine = [one for key, one in distinct.items() if key not in known or known[key].bucket == bucket]
    mine.sort(key=lambda one: (sum(len(turn.content) for turn in one.messages), one.key))
    calls = [mine[start : start + asker.per_call] for start in range(0, len(mine), asker.per_call)]
    left = [call for call in calls if not all(one.key in known for one in call)]
    done, waiting = sum(map(len, calls)) - sum(map(len, left)), iter(left)

    async def work() -> None:
        nonlocal done
        for call in waiting:
            said = await answered(asker, call, bucket)
            store.add(said)
            known.update(said)
            done += len(call)
            show(done, len(mine))

    tasks = [asyncio.ensure_future(work()) for _ in range(asker.at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return known


async def answered(asker: Asker, questions: Sequence[Question], bucket: int) -> dict[str, Said]:
    """One call's worth."""
    asked = [Prompt(messages=one.messages, uid=one.key) for one in questions]
    tokens = [
        one.array.astype(np.int32) for one in (await asker.policy.tokenize(TokenizeRequest(prompts=asked))).tokens
    ]
    longest = max(map(len, asker.heads))
    thinks = asker.prompt.variant == "reasoning"
    room = asker.context - longest - (asker.prompt.reasoning_tokens if thinks else 0)
    fitting = [i for i, ids in enumerate(tokens) if len(ids) <= room]
    prompts = [tokens[i] for i in fitting]
    decoded = [0] * len(prompts)
    if thinks and prompts:
        prompts, decoded = await reasoned(asker, prompts)
    probs = await label_probs(asker, prompts)
    found = {one.key: Said(None, len(ids), 0, bucket) for one, ids in zip(questions, tokens, strict=True)}
    for i, own, count in zip(fitting, probs, decoded, strict=True):
        found[questions[i].key] = Said(own, len(tokens[i]), count, bucket)
    return found


async def reasoned(asker: Asker, prompts: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """The prompts with what the policy says before it answers, and how many tokens that is."""
    params = SamplingParams(temperature=0.0, max_tokens=asker.prompt.reasoning_tokens, stop=["\n"])
    request = SampleRequest(prompts=[Prompt(tokens=Tensor(ids)) for ids in prompts], params=params)
    said = [one.completions[0].tokens.array for one in (await asker.policy.sample(request)).results]
    return [np.concatenate([ids, more]).astype(np.int32) for ids, more in zip(prompts, said, strict=True)], [
        len(more) for more in said
    ]


async def label_probs(asker: Asker, prompts: Sequence[Ids]) -> list[tuple[float, float, float]]:
    """Of each prompt p(yes), p(no), p(uncertain) among the three: softmax over summed log-probs of their tokens."""
    if not prompts:
        return []
    sequences = [Tensor(np.concatenate([ids, head])) for ids in prompts for head in asker.heads]
    response = await asker.policy.score(ScoreRequest(sequences=sequences))
    totals = [
        float(logprobs.array[-len(asker.heads[i % len(asker.heads)]) :].astype(np.float64).sum())
        for i, logprobs in enumerate(response.logprobs)
    ]
    return [softmax(totals[start : start + len(ANSWERS)]) for start in range(0, len(totals), len(ANSWERS))]


def softmax(logits: Sequence[float]) -> tuple[float, float, float]:
    """exp(z) / sum exp(z). Raises Corrupt for what is no number."""
    z = np.asarray(logits, np.float64)
    if not np.isfinite(z).all():
        raise Corrupt("the policy's log-probs are not numbers")
    shares = np.exp(z - z.max())
    yes, no, uncertain = (shares / shares.sum()).tolist()
    return yes, no, uncertain
