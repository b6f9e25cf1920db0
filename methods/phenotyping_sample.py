"""Answers that are written: an object with a quote that has to stand in the snippet (specification 2.5)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from methods.phenotyping_prompts import (
    ANSWERS,
    MOST_QUOTED,
    MOST_REASONED,
    MOST_WRITTEN,
    REVISE,
    STATUSES,
    WRONG_OBJECT,
    WRONG_QUOTE,
    Answer,
    PromptConfig,
    pieces,
)
from methods.phenotyping_scan import Finding
from protocols.messages import ChatMessage, Prompt, SamplingParams, Structure
from protocols.policy import PolicyService, SampleRequest, TokenizeRequest
from protocols.tensor import Tensor

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Asked:
    """What is to be answered in writing."""

    messages: Sequence[ChatMessage]
    tokens: Ids
    """Of these."""
    snippet: str
    """As it is shown."""


@dataclass(frozen=True)
class Written:
    """What became of it."""

    answer: Answer = "uncertain"
    """Uncertain too where nothing usable was written."""
    status: str = ""
    """One of STATUSES, or empty."""
    quote: tuple[int, int] | None = None
    """Place in the snippet as it is shown."""
    tokens: int = 0
    """Of all prompts."""
    decoded: int = 0
    """Tokens that were written."""


def schema_of(prompt: PromptConfig) -> str:
    """JSON schema of an answer."""
    fields: dict[str, Any] = {
        "answer": {"enum": [prompt.labels[one] for one in ANSWERS]},
        "status": {"enum": list(STATUSES)},
        "quote": {"type": "string", "maxLength": MOST_QUOTED},
        "reason": {"type": "string", "maxLength": MOST_REASONED},
    }
    told = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return json.dumps(told)


async def written(
    policy: PolicyService, prompt: PromptConfig, context: int, asked: Sequence[Asked], *, structured: bool
) -> list[Written]:
    """All answers, asked for at once, and then once more those that cannot be used."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=MOST_WRITTEN,
        structure=Structure(json_schema=schema_of(prompt)) if structured else None,
    )
    told = await drawn(policy, [one.tokens for one in asked], params)
    read = [read_answer(text, one.snippet, prompt) for one, (text, _) in zip(asked, told, strict=True)]
    found = [
        replace(Written() if isinstance(own, str) else own, tokens=len(one.tokens), decoded=count)
        for one, own, (_, count) in zip(asked, read, told, strict=True)
    ]
    wrong = [(i, own) for i, own in enumerate(read) if isinstance(own, str)]
    turns = [Prompt(messages=revision(asked[i].messages, told[i][0], own)) for i, own in wrong]
    tokens = (await policy.tokenize(TokenizeRequest(prompts=turns))).tokens if turns else []
    # Where what was written leaves no room to ask again, the answer stays uncertain.
    room = context - MOST_WRITTEN
    again = [(i, ids.array) for (i, _), ids in zip(wrong, tokens, strict=True) if len(ids) <= room]
    for (i, ids), (text, count) in zip(again, await drawn(policy, [ids for _, ids in again], params), strict=True):
        second, first = read_answer(text, asked[i].snippet, prompt), found[i]
        usable = first if isinstance(second, str) else second
        found[i] = replace(usable, tokens=first.tokens + len(ids), decoded=first.decoded + count)
    return found


async def drawn(policy: PolicyService, prompts: Sequence[Ids], params: SamplingParams) -> list[tuple[str, int]]:
    """The text that each prompt is continued with, and how many tokens that is."""
    if not prompts:
        return []
    request = SampleRequest(prompts=[Prompt(tokens=Tensor(ids)) for ids in prompts], params=params)
    said = [one.completions[0] for one in (await policy.sample(request)).results]
    return [(one.text, len(one.tokens)) for one in said]


def revision(messages: Sequence[ChatMessage], text: str, wrong: str) -> list[ChatMessage]:
    """The question, what was answered, and what is wrong with that."""
    # Chat templates may refuse a turn that says nothing.
    said = ChatMessage(role="assistant", content=text.strip() or "-")
    return [*messages, said, ChatMessage(role="user", content=REVISE.format(wrong=wrong))]


def read_answer(text: str, snippet: str, prompt: PromptConfig) -> Written | str:
    """An answer, or what is wrong with it."""
    value = first_object(text)
    if value is None:
        return WRONG_OBJECT
    labels: dict[str, Answer] = {prompt.labels[one].strip().casefold(): one for one in ANSWERS}
    answer, status, quote = (value.get(name) for name in ("answer", "status", "quote"))
    known = labels.get(answer.strip().casefold()) if isinstance(answer, str) else None
    if known is None:
        return f"answer: expected one of {', '.join(prompt.labels[one] for one in ANSWERS)}."
    if not isinstance(status, str) or status not in STATUSES:
        return f"status: expected one of {', '.join(STATUSES)}."
    place = find_quote(quote, snippet) if isinstance(quote, str) else None
    return WRONG_QUOTE if place is None else Written(known, status, place)


def first_object(text: str) -> Mapping[str, Any] | None:
    """The first JSON object in a text, whatever stands around it."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value: Mapping[str, Any] = decoder.raw_decode(text, at)[0]
            return value
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
    return None


def find_quote(quote: str, text: str) -> tuple[int, int] | None:
    """Where it first stands in a text, white space of any length being one blank; None where it says nothing or is
    not there."""
    wanted, letters, places = " ".join(quote.split()), "", []
    for place, letter in enumerate(text):
        if not letter.isspace():
            places.append(place)
            letters += letter
        elif not letters.endswith(" "):
            places.append(place)
            letters += " "
    at = letters.find(wanted) if wanted else -1
    return None if at < 0 else (places[at], places[at + len(wanted) - 1] + 1)


def in_note(finding: Finding, place: tuple[int, int], *, mask: bool) -> tuple[int, int]:
    """Where a part of the snippet as it is shown stands in the note."""
    spans = [(start, end) for piece, start, end in pieces(finding, mask=mask) for _ in piece]
    return spans[place[0]][0], spans[place[1] - 1][1]
