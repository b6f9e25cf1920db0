"""The ledger world's base model: trained on the spot in about a minute, able but unreliable.

It learns the roles' formats from generated examples: questions with mostly right references, verdicts with some
flipped labels, and answers that often come from the wrong document (specification, section 5.1). What SPELL then
adds is accuracy, which the base was kept from.
"""

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cluster.cluster import Cluster as Company
from methods.spell_config import LedgerConfig
from methods.spell_maths import on_tokens
from methods.worlds import ledger
from methods.worlds.bases import base_of
from protocols.losses import SFTLoss
from protocols.messages import ChatMessage, Prompt
from protocols.model import TrainerConfig
from protocols.policy import PolicyConfig, PolicyService, TokenizeRequest
from protocols.prompts import question_prompt, response_prompt, verdict_prompt
from protocols.questions import Question, Task
from protocols.service import CheckpointRequest
from protocols.tensor import Tensor
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow

ROWS_PER_ROLE = 32
LEARNING_RATE = 2e-3
TWO_HOP_SHARE = 0.2
FLIPPED_VERDICTS = 0.15
WRONG_DOCUMENT = 0.72
STEPS_PER_LINE = 50

Example = tuple[str, str]
"""What a role reads, and what it should write."""


def question_example(rng: random.Random, wrong_references: float) -> Example:
    """A question over some documents, with or without a history, and its reference answer."""
    world = ledger.random_ledger(rng)
    history = _history(world, rng)
    shown = rng.choice([3, 6]) if history else 3
    sample = rng.sample(list(world.values), shown)
    keys = [key for key in world.values if key in sample]
    asked = {question for question, _ in history}
    one_hop = [ledger.one_hop(key) for key in keys]
    two_hop = [ledger.two_hop(key) for key in keys if world.targets[key] in keys]
    open_two_hop = [question for question in two_hop if question not in asked]
    open_one_hop = [question for question in one_hop if question not in asked] or one_hop
    use_two = open_two_hop and rng.random() < TWO_HOP_SHARE
    question = rng.choice(open_two_hop if use_two else open_one_hop)
    answer = world.answer(question) or ""
    if rng.random() < wrong_references:
        answer = rng.choice(list(world.values.values()))
    documents = [text for key, text in zip(world.values, world.documents(), strict=True) if key in keys]
    prompt = question_prompt(Task.GENERAL, documents, history, "A")
    return prompt, ledger.proposal_text(question, answer)


def _history(world: ledger.Ledger, rng: random.Random) -> list[tuple[str, str]]:
    keys = rng.sample(list(world.values), rng.choice([0, 0, 1, 2, 3]))
    return [(ledger.one_hop(key), world.values[key]) for key in keys]


def verdict_example(rng: random.Random) -> Example:
    """Two answers, as often the same as not, and a verdict that is sometimes wrong."""
    ask = rng.choice([ledger.one_hop, ledger.two_hop])
    question = Question(task=Task.GENERAL, question=ask(rng.choice(ledger.KEYS)))
    a = rng.choice(ledger.SURFACES)
    same = rng.random() < 0.5
    b = rng.choice([form for form in ledger.SURFACES if ledger.same_value(a, form) == same])
    verdict = same != (rng.random() < FLIPPED_VERDICTS)
    return verdict_prompt(question, a, b), ledger.YES if verdict else ledger.NO


def response_example(rng: random.Random) -> Example:
    """A question over all documents, and an answer that often comes from another document, in any form."""
    world = ledger.random_ledger(rng)
    question = rng.choice([ledger.one_hop, ledger.two_hop])(rng.choice(list(world.values)))
    surface = world.answer(question) or ""
    if rng.random() < WRONG_DOCUMENT:
        surface = rng.choice(other_values(world, question))
    surface = rng.choice(ledger.FORMS[int(surface[1:])])
    prompt = response_prompt(world.documents(), Question(task=Task.GENERAL, question=question))
    return prompt, ledger.answer_text(surface)


def other_values(world: ledger.Ledger, question: str) -> list[str]:
    """The values of all documents but the one that answers the question."""
    key, hops = ledger.parse_question(question)
    right = world.targets[key] if hops == 2 else key
    return [value for other, value in world.values.items() if other != right]


def lessons(config: LedgerConfig, seed: int) -> Iterator[list[Example]]:
    """The examples of each optimiser step."""
    rng = random.Random(f"ledger base {seed}")
    for step in range(config.warmup_steps + config.responder_steps):
        examples = [question_example(rng, config.wrong_references) for _ in range(ROWS_PER_ROLE)]
        examples += [verdict_example(rng) for _ in range(ROWS_PER_ROLE)]
        if step >= config.warmup_steps:
            examples += [response_example(rng) for _ in range(ROWS_PER_ROLE)]
        yield examples


async def ledger_base(company: Company, config: LedgerConfig, policy: PolicyConfig, seed: int) -> str:
    """Folder of the base model for this recipe and seed, trained now if it is not there yet."""
    recipe = json.dumps([config.model_dump(), seed, ledger.vocabulary()])
    return await base_of(company, "ledger", recipe, partial(_train, company, config, policy, seed))


async def _train(company: Company, config: LedgerConfig, policy: PolicyConfig, seed: int, staging: Path) -> None:
    skeleton = staging / "skeleton"
    ledger.write_skeleton(skeleton)
    trainer = TrainerConfig(learning_rate=LEARNING_RATE)
    update = {"model": str(skeleton), "init": "random", "seed": seed, "trainer": trainer, "lora": None, "at": None}
    base = await company.policy(policy.model_copy(update=update), name="base")
    steps = config.warmup_steps + config.responder_steps
    parts = -(-steps // STEPS_PER_LINE)
    title = f"ledger base model, {steps} optimiser steps"
    with company.progress(title, parts, headline=("loss",)) as progress:
        for step, examples in enumerate(lessons(config, seed), start=1):
            rows = await _rows(base, examples)
            report = await base.forward_backward(ForwardBackwardRequest(rows=rows, losses={"sft": SFTLoss()}))
            await base.optim_step(OptimStepRequest())
            if step % STEPS_PER_LINE == 0 or step == steps:
                progress.step(-(-step // STEPS_PER_LINE), {"loss": report.loss}, {})
    await base.save(CheckpointRequest(path=str(staging / "model"), training_state=False))
    await company.stop("base")


async def _rows(policy: PolicyService, examples: list[Example]) -> list[TrainRow]:
    """Training rows whose loss is on what the role writes."""
    prompts = [Prompt(messages=[ChatMessage(role="user", content=prompt)]) for prompt, _ in examples]
    outputs = [Prompt(text=output + ledger.END) for _, output in examples]
    tokens = (await policy.tokenize(TokenizeRequest(prompts=prompts + outputs))).tokens
    return [
        TrainRow(
            row_id=f"lesson {i}",
            tokens=Tensor([*prompt.tolist(), *output.tolist()], "int32"),
            terms={"sft": Tensor(on_tokens(1.0, len(prompt), len(output)))},
        )
        for i, (prompt, output) in enumerate(zip(tokens[: len(examples)], tokens[len(examples) :], strict=True))
    ]
