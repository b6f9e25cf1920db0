"""A small map policy from labelled mentions of other diseases: sentences with one clinical concept each.

It is a way to try the method without a large model, and says nothing about clinical quality.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cluster.cluster import Cluster
from cluster.seeds import derive_seed
from methods.phenotyping_definition import Definition
from methods.phenotyping_prompts import PLACEHOLDER, Answer
from methods.worlds.bases import base_of
from methods.worlds.teaching import teach
from protocols.errors import BadInput
from protocols.messages import ChatMessage, Prompt
from protocols.policy import PolicyConfig, PolicyService, TokenizeRequest
from protocols.retriever import Document, RetrieverService, SnippetsRequest
from protocols.service import Empty
from protocols.tensor import Tensor
from protocols.training import TrainRow

COLUMNS = ("concept", "sentence", "negation", "temporality", "experiencer")
AROUND = 100
"""Characters of a sentence that are kept on each side of the concept."""
ROWS = 16
INVENTED: dict[Answer, list[str]] = {
    "no": [
        "The risks of surgery, including {c}, bleeding and [it], were explained.",
        "Risks include but are not limited to infection, [it], and {c}.",
        "She was given stockings for [it] prophylaxis.",
        "Heparin was started for prophylaxis of [it].",
        "He received {c} for prevention of [it].",
        "Possible complications such as [it], {c} and death were discussed with the patient.",
        "She understands the risk of [it] and wishes to proceed.",
        "[it] prophylaxis with compression devices.",
        "Screening for [it] was offered.",
        "Call if you have signs of [it] or {c}.",
        "His mother had [it] and {c}.",
        "Family history is positive for [it].",
        "Informed consent was obtained after the risk of {c}, [it] and reaction was reviewed.",
        "Father died of [it] at an old age.",
    ],
    "uncertain": [
        "Rule out [it].",
        "Possible [it].",
        "Concern for [it] versus {c}.",
        "[it] cannot be excluded.",
        "There is a question of [it].",
        "Suspected [it], {c} less likely.",
    ],
    "yes": [
        "Past medical history: {c}, [it], and hypertension.",
        "History of [it], status post {c}.",
        "1. [it].",
        "2. [it], stable on treatment.",
        "The patient has [it] and {c}.",
        "She was admitted with [it].",
        "[it] diagnosed last year.",
        "He takes his medicine for [it].",
        "DIAGNOSIS: [it].",
    ],
}
"""Sentences of our own, of no disease in particular: labelled mentions lack risk counselling and prophylaxis."""
OTHERS = ("pneumonia", "seizure", "anemia", "infection", "stroke", "hematoma", "nerve injury", "gout", "fracture")


class Mention(NamedTuple):
    """A text with its concept hidden, and what it says of it."""

    text: str
    answer: Answer
    sentence: str
    """As it was, with the concept."""


def read_mentions(paths: Sequence[str]) -> list[Mention]:
    """Labelled mentions of .tsv files. Raises BadInput that names the file, line and field."""
    found: list[Mention] = []
    for path in paths:
        try:
            with open(Path(path).expanduser(), encoding="utf-8", newline="") as stream:
                rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
                lacking = [name for name in COLUMNS if name not in (rows.fieldnames or [])]
                if lacking:
                    raise BadInput(f"mentions: {path} has no column {lacking[0]}")
                for row in rows:
                    if (mention := mention_of(row, f"{path}:{rows.line_num}")) is not None:
                        found.append(mention)
        except OSError as error:
            raise BadInput(f"mentions: cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadInput(f"mentions: {path} is not UTF-8 at byte {error.start}") from error
    if not found:
        raise BadInput("mentions: none whose concept is in its sentence")
    return found


def mention_of(row: dict[str, str], place: str) -> Mention | None:
    """A row; None where the concept is not in the sentence."""
    known = {"negation": ("Affirmed", "Negated"), "temporality": ("Recent", "Historical", "Not particular")}
    for name, values in known.items():
        if row[name] not in values:
            raise BadInput(f"mentions: {place}: {name}: got {row[name]!r}, expected one of {', '.join(values)}")
    at = row["sentence"].casefold().find(row["concept"].casefold().strip())
    if at < 0 or not row["concept"].strip():
        return None
    sentence, end = row["sentence"], at + len(row["concept"].strip())
    text = sentence[max(0, at - AROUND) : at] + PLACEHOLDER + sentence[end : end + AROUND]
    so = row["negation"] == "Affirmed" and row["temporality"] != "Not particular" and row["experiencer"] == "Patient"
    # Two blanks stand for the end of a line.
    return Mention(re.sub(r"\s+", " ", text).strip(), "yes" if so else "no", sentence)


def invented() -> Iterator[Mention]:
    """The sentences of our own, each with several other conditions."""
    for answer, texts in INVENTED.items():
        for text in texts:
            for other in OTHERS if "{c}" in text else OTHERS[:3]:
                yield Mention(text.replace("{c}", other), answer, text)


async def unrelated(
    mentions: Sequence[Mention], retriever: RetrieverService, definitions: Sequence[Definition]
) -> list[Mention]:
    """Those whose sentences name none of the diseases, so that the policy is taught on others alone."""
    documents = [Document(id=f"{i}", text=one.sentence) for i, one in enumerate(mentions)]
    request = SnippetsRequest(documents=documents, sets=[one.pattern_set() for one in definitions])
    named = {int(one.document) for one in (await retriever.snippets(request)).snippets}
    return [one for i, one in enumerate(mentions) if i not in named]


async def mention_base(
    company: Cluster,
    policy: PolicyConfig,
    mentions: Sequence[Mention],
    labels: dict[Answer, str],
    steps: int,
    rate: float,
) -> str:
    """Folder of the policy that was taught on the mentions and the invented ones, now if it is not there yet."""
    told = [[one.text, labels[one.answer]] for one in [*mentions, *invented()]]
    recipe = json.dumps([told, steps, rate, ROWS, policy.model, policy.init, policy.seed])
    return await base_of(company, "mentions", recipe, partial(_train, company, policy, told, steps, rate))


async def _train(
    company: Cluster, policy: PolicyConfig, told: Sequence[Sequence[str]], steps: int, rate: float, staging: Path
) -> None:
    reader = await company.policy(policy.model_copy(update={"trainer": None}), name="reader")
    rows = await rows_of(reader, [(f"[SECTION]  [TEXT] {text}", answer) for text, answer in told])
    await company.stop("reader")
    rng = np.random.default_rng(derive_seed(policy.seed, "mentions"))
    batches = ([rows[i] for i in rng.integers(len(rows), size=ROWS)] for _ in range(steps))
    title = "policy that reads mentions of other diseases"
    await teach(
        company, policy, staging, "base", title, batches, steps=steps, rate=rate, seed=policy.seed, model=policy.model
    )


async def rows_of(policy: PolicyService, told: Sequence[tuple[str, str]]) -> list[TrainRow]:
    """Training rows whose loss is on the answer."""
    info = await policy.info(Empty())
    asked = [Prompt(messages=[ChatMessage(role="user", content=text)]) for text, _ in told]
    prompts = (await policy.tokenize(TokenizeRequest(prompts=asked))).tokens
    texts = [Prompt(text=answer) for _, answer in told]
    answers = (await policy.tokenize(TokenizeRequest(prompts=texts, continues=True))).tokens
    rows = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = np.concatenate([prompt.array, answer.array, info.eos_token_ids[:1]]).astype(np.int32)
        weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(answer) + 1)])
        if len(tokens) <= info.context_length:
            terms = {"sft": Tensor(weights, "float32")}
            rows.append(TrainRow(row_id=f"{i}", tokens=Tensor(tokens), terms=terms))
    return rows
