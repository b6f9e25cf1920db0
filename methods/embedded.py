"""The embedded checkpoint: a small model of its own that plays SPELL's three roles on short English passages.

It is trained from nothing, on generated text and on what the Python standard library says of itself. First it
learns to copy: random tokens, then the same from another place on, longer and longer. Then it learns the roles, on
passages that grow. In the end a share of its answers is copied from places that were not asked for: a base that
can but is unreliable, which leaves something to improve.
"""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.steps import LoopState, Step
from methods.worlds import corpus
from methods.worlds.exam import Exam
from methods.worlds.lessons import Lesson, Role, draw_lesson
from methods.worlds.skeleton import END, TURN, Shape, write_skeleton
from protocols.losses import SFTLoss
from protocols.messages import Prompt, SamplingParams
from protocols.model import TrainerConfig
from protocols.policy import PolicyConfig, PolicyService, TokenizeRequest
from protocols.prompts import document_block
from protocols.questioner import QuestionerConfig
from protocols.questions import Cluster as DocumentCluster
from protocols.questions import Task
from protocols.service import CheckpointRequest, Empty
from protocols.tensor import Tensor
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow
from protocols.verifier import VerifierConfig

__all__ = ["HEADLINE", "Config", "run"]

HEADLINE = ("loss", "copied_tokens", "level")
SHORTEST_COPY, LONGEST_COPY = 8, 128
# A copy is learnt when this is its mean loss over the last steps, in nats per token.
COPIED, WINDOW = 1.0, 30
SHORTEST_DOCUMENT, LONGEST_DOCUMENT, MOST_DOCUMENTS = 14, 30, 3
ROLE_SHARES: dict[Role, float] = {"questioner": 0.4, "responder": 0.45, "verifier": 0.15}
TASKS = list(Task)
TOKENIZER_TEXTS, TOKENIZER_TEXT_WORDS = 400, 60

Turns = list[tuple[str, str]]
"""A conversation: what is read and what is to be written, by turns."""


class Config(MethodConfig):
    """How the embedded checkpoint is made."""

    steps: int = Field(default=5000, ge=1)
    """Optimiser steps."""
    shape: Shape = Shape()
    """Size of the model."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate; after warm-up it falls linearly to a twentieth."""
    warmup_steps: int = Field(default=100, ge=1)
    """Steps of linear warm-up."""
    copy_tokens: int = Field(default=512, ge=1)
    """Random tokens to copy per step, at first."""
    rows: int = Field(default=16, ge=1)
    """Conversations per step."""
    turns: int = Field(default=6, ge=1)
    """Lessons over the same documents in one conversation, except in the last steps."""
    grow_steps: int = Field(default=600, ge=1)
    """Steps in which passages grow, after copying is learnt."""
    last_steps: int = Field(default=500, ge=0)
    """Steps at the end with one lesson per conversation and an unreliable responder."""
    wrong_answers: float = Field(default=0.5, ge=0, le=1)
    """Share of the responder's lessons in the last steps that copy from a place that was not asked for."""
    threads: int = Field(default=0, ge=0)
    """CPU threads for torch; 0: as many as this process may use."""
    test_every: int = Field(default=600, ge=1)
    """Steps between measurements on held-out modules."""
    test_questions: int = Field(default=48, ge=1)
    """Questions per task and role in each."""
    export: str = ""
    """Folder that the finished checkpoint is written to, in bfloat16; empty: the run's own folder `model`."""


class State(LoopState):
    """Where the curriculum stands."""

    copy_length: int = SHORTEST_COPY
    """Random tokens that are copied at once."""
    losses: list[float] = []
    """Of the last steps at this length."""
    copied_at: int = 0
    """Step after which copying was learnt; 0: not yet."""


async def run(cluster: Cluster, config: Config) -> None:
    """Train, measure, and write the checkpoint."""
    skeleton = make_skeleton(cluster.directory.path.parent / "bases", config)
    policy = await cluster.policy(
        PolicyConfig(
            model=str(skeleton), init="random", seed=config.seed, threads=config.threads, trainer=trainer(config)
        )
    )
    exam = await make_exam(cluster, policy, config)
    state = State()
    async for step in cluster.steps(state):
        rows = await draw_rows(policy, step, state, config)
        report = await policy.forward_backward(ForwardBackwardRequest(rows=rows, losses={"sft": SFTLoss()}))
        rate = learning_rate(step.index, config)
        norm = (await policy.optim_step(OptimStepRequest(learning_rate=rate))).grad_norm
        progress = {"copied_tokens": float(state.copy_length), "level": level(step.index, state, config)}
        step.log({"loss": report.loss, "grad_norm": norm, "learning_rate": rate, **progress})
        advance(state, step.index, report.loss)
        if step.index % config.test_every == 0 or step.index == config.steps:
            step.activity("measuring")
            step.log(await measure(exam, config))
    await export(cluster, policy, config)


def make_skeleton(folder: Path, config: Config) -> Path:
    """Folder with the configuration and tokenizer of the untrained model."""
    digest = hashlib.sha256(config.shape.model_dump_json().encode()).hexdigest()[:12]
    target = folder / f"embedded-{digest}"
    if not (target / "tokenizer.json").is_file():
        rng = random.Random("tokenizer")
        texts = [paragraph for module in corpus.library().training for paragraph in module]
        texts += [corpus.documents(rng, 1, TOKENIZER_TEXT_WORDS)[0] for _ in range(TOKENIZER_TEXTS)]
        write_skeleton(target, config.shape, texts)
    return target


def trainer(config: Config) -> TrainerConfig:
    """AdamW as copying needs it: with a second moment of 0.999 it takes several times as many steps."""
    return TrainerConfig(
        learning_rate=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, micro_batch_tokens=2048
    )


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a linear fall to a twentieth."""
    rest = max(0.0, 1 - step / config.steps)
    return config.learning_rate * min(1.0, step / config.warmup_steps) * (0.05 + 0.95 * rest)


def level(step: int, state: State, config: Config) -> float:
    """How far passages have grown, 0 to 1."""
    return min(1.0, (step - state.copied_at) / config.grow_steps) if state.copied_at else 0.0


def advance(state: State, step: int, loss: float) -> None:
    """Lengthen the copies when the present length is learnt; go on to lessons after the longest."""
    if state.copied_at:
        return
    state.losses = [*state.losses, loss][-WINDOW:]
    if len(state.losses) == WINDOW and np.mean(state.losses) < COPIED:
        state.copy_length, state.losses = state.copy_length * 5 // 4 + 1, []
        if state.copy_length > LONGEST_COPY:
            state.copied_at = step


async def draw_rows(policy: PolicyService, step: Step, state: State, config: Config) -> list[TrainRow]:
    """The rows of one step."""
    if not state.copied_at:
        turn = (await policy.tokenize(TokenizeRequest(prompts=[Prompt(text=TURN)]))).tokens[0].tolist()
        vocabulary = (await policy.info(Empty())).vocab_size
        count = max(8, config.copy_tokens // state.copy_length)
        return [copy_row(step.rng("copy", i), state.copy_length, vocabulary, turn) for i in range(count)]
    rng = random.Random(step.seed("lessons"))
    last = step.index > config.steps - config.last_steps
    reached = level(step.index, state, config)
    talks: list[Turns] = []
    while len(talks) < config.rows:
        grown = reached * (rng.random() ** 0.5 if reached == 1 else 1.0)
        talks.append(conversation(rng, grown, 1 if last else config.turns, config.wrong_answers if last else 0.0))
    return await as_rows(policy, [talk for talk in talks if talk])


def copy_row(rng: np.random.Generator, length: int, vocabulary: int, turn: list[int]) -> TrainRow:
    """Random tokens, and the same from another place on, whose first token cannot be known."""
    tokens = rng.integers(vocabulary, size=length).astype(np.int32)
    copied = np.roll(tokens, rng.integers(length))
    weights = np.zeros(2 * length + len(turn), np.float32)
    weights[length + len(turn) + 1 :] = 1
    return TrainRow(
        row_id="copy", tokens=Tensor(np.concatenate([tokens, turn, copied]), "int32"), terms={"sft": Tensor(weights)}
    )


def conversation(rng: random.Random, grown: float, turns: int, wrong: float) -> Turns:
    """Lessons over the same documents, the later ones without repeating them; empty if there is nothing to ask."""
    count = rng.randint(1, 1 + round((MOST_DOCUMENTS - 1) * grown))
    longest = round(SHORTEST_DOCUMENT + (LONGEST_DOCUMENT - SHORTEST_DOCUMENT) * grown)
    documents = corpus.documents(rng, count, longest)
    role = draw_role(rng)
    drawn = [draw_lesson(rng, role, rng.choice(TASKS), documents, wrong)]
    if role != "verifier":
        others = [draw_role(rng) for _ in range(turns - 1)]
        drawn += [draw_lesson(rng, one, rng.choice(TASKS), documents, wrong) for one in others if one != "verifier"]
    return as_turns([lesson for lesson in drawn if lesson], document_block(documents))


def as_turns(lessons: Sequence[Lesson], block: str) -> Turns:
    """Lessons as one conversation; the documents stand before the first."""
    return [
        (lesson.prompt if i == 0 else lesson.prompt.removeprefix(block), lesson.reply)
        for i, lesson in enumerate(lessons)
        if i == 0 or lesson.prompt.startswith(block)
    ]


def draw_role(rng: random.Random) -> Role:
    """A role, by its share."""
    return rng.choices(list(ROLE_SHARES), list(ROLE_SHARES.values()))[0]


async def as_rows(policy: PolicyService, talks: Sequence[Turns]) -> list[TrainRow]:
    """Training rows, the loss on what is to be written."""
    texts = [text for talk in talks for read, written in talk for text in (read + TURN, written + END)]
    response = await policy.tokenize(TokenizeRequest(prompts=[Prompt(text=text) for text in texts]))
    pieces = iter(response.tokens)
    rows = []
    for i, talk in enumerate(talks):
        own = [next(pieces).array for _ in range(2 * len(talk))]
        weights = [np.full(len(piece), k % 2, np.float32) for k, piece in enumerate(own)]
        terms = {"sft": Tensor(np.concatenate(weights))}
        rows.append(TrainRow(row_id=f"lesson {i}", tokens=Tensor(np.concatenate(own), "int32"), terms=terms))
    return rows


async def make_exam(cluster: Cluster, policy: PolicyService, config: Config) -> Exam:
    """The roles over the policy, sampled as SPELL samples them."""
    params = SamplingParams(max_tokens=160, temperature=0.7, top_p=0.95)
    questioner = await cluster.questioner(QuestionerConfig(documents=2), policy)
    verifier = await cluster.verifier(VerifierConfig(mode="votes"), policy)
    return Exam(policy, questioner, verifier, params, config.seed)


async def measure(exam: Exam, config: Config) -> dict[str, float]:
    """Measures of all roles on documentation that was not trained on, by task."""
    measures = {}
    for task in Task:
        for name, value in (await exam.take(heldout_clusters(task), config.test_questions)).items():
            measures[f"{task.value}/{name}"] = value
    return measures


def heldout_clusters(task: Task, count: int = 24) -> list[DocumentCluster]:
    """Clusters of four passages that can be asked about, the same each time."""
    rng = random.Random(f"held out {task.value}")
    clusters: list[DocumentCluster] = []
    while len(clusters) < count:
        documents = corpus.documents(rng, MOST_DOCUMENTS, LONGEST_DOCUMENT, heldout=True)
        if draw_lesson(rng, "responder", task, documents):
            name = f"{task.value}-{len(clusters)}"
            clusters.append(DocumentCluster(question_id=name, task=task, paragraphs=documents))
    return clusters


async def export(cluster: Cluster, policy: PolicyService, config: Config) -> None:
    """Write the model as bfloat16, by way of a frozen policy that holds it so."""
    whole = cluster.directory.path / "float32"
    await policy.save(CheckpointRequest(path=str(whole), training_state=False))
    frozen = PolicyConfig(model=str(whole), dtype="bfloat16", trainer=None)
    half = await cluster.policy(frozen, name="half")
    target = Path(config.export) if config.export else cluster.directory.path / "model"
    await half.save(CheckpointRequest(path=str(target), training_state=False))
    await cluster.stop("half")
