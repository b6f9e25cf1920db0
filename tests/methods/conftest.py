import asyncio
import json
import random
import re
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.actor import Actor, start
from actors.questioner import QuestionerActor
from actors.verifier import VerifierActor
from cluster.cluster import Cluster as Company
from cluster.inline import InlineTransport
from methods.spell_config import Config
from methods.spell_rounds import Cast, Fate, Round
from protocols.handle import make_handle
from protocols.messages import Completion, FinishReason, Prompt, SamplingParams
from protocols.policy import (
    DetokenizeRequest,
    DetokenizeResponse,
    EmbedRequest,
    EmbedResponse,
    PolicyConfig,
    PolicyInfo,
    PolicyService,
    PublishResponse,
    Sampled,
    SampleRequest,
    SampleResponse,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from protocols.prompts import NO_DOCUMENTS
from protocols.questioner import QuestionerConfig, QuestionerService
from protocols.questions import LETTERS, Cluster, GoldQuestion, Proposal, ProposalStatus, Question, Task
from protocols.service import Empty
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
    TermReport,
)
from protocols.verifier import Judgement, VerifierConfig, VerifierService

END, PAD = 1, 0


@dataclass(frozen=True)
class Call:
    """One completion that is asked of a scripted policy."""

    kind: str
    """question, probe, answer or vote."""
    uid: str
    text: str
    """The prompt."""
    index: int
    seed: int | None

    @property
    def rng(self) -> random.Random:
        """The same for the same prompt seed and sample, whatever was asked before."""
        return random.Random(f"{self.seed}/{self.index}")

    @property
    def question(self) -> str:
        """What is asked in an answer or vote prompt."""
        return self.text.rpartition("Question: " if self.kind != "vote" else "\0")[2].split("\n")[0]


@dataclass(frozen=True)
class Written:
    """A completion with tokens of its own."""

    text: str
    tokens: list[int]
    finish: FinishReason = FinishReason.STOP


Write = Callable[[Call], "str | Written"]


class ScriptedPolicy(Actor, PolicyService):
    """A policy whose words are canned. A token is a word; what it was asked to do is kept."""

    def __init__(self, write: Write, context: int = 1 << 20) -> None:
        super().__init__()
        self.write = write
        self.context = context
        self.version = 0
        self.calls: list[Call] = []
        self.requests: list[SampleRequest] = []
        self.trained: list[ForwardBackwardRequest] = []
        self.scored: list[ScoreRequest] = []
        self.before: Callable[[str], Awaitable[None]] | None = None
        self._words = {PAD: "<pad>", END: "<end>"}
        self._texts: dict[bytes, str] = {}

    def ids(self, text: str) -> list[int]:
        """A word's token does not depend on what was said before."""
        named = [(2 + zlib.crc32(word.encode()) % (1 << 30), word) for word in text.split()]
        self._words.update(named)
        return [token for token, _ in named]

    def _encode(self, prompt: Prompt) -> np.ndarray:
        if prompt.tokens is not None:
            return prompt.tokens.array
        text = prompt.text if prompt.text is not None else "\n".join(turn.content for turn in prompt.messages)
        tokens = np.asarray(self.ids(text), np.int32)
        self._texts[tokens.tobytes()] = text
        return tokens

    def _decode(self, tokens: np.ndarray) -> str:
        return self._texts.get(tokens.tobytes()) or " ".join(self._words.get(i, "?") for i in tokens.tolist())

    def asked(self, kind: str) -> list[Call]:
        return [call for call in self.calls if call.kind == kind]

    async def sample(self, request: SampleRequest) -> SampleResponse:
        tokens = [self._encode(prompt) for prompt in request.prompts]
        self.requests.append(request)
        version = self.version
        if self.before:
            await self.before(kind_of(self._decode(tokens[0])))
        results = []
        for prompt, ids in zip(request.prompts, tokens, strict=True):
            assert len(ids) < self.context, f"{prompt.uid}: a prompt of {len(ids)} words"
            text = self._decode(ids)
            calls = [Call(kind_of(text), prompt.uid, text, i, prompt.seed) for i in range(request.n)]
            self.calls += calls
            completions = [self._completion(self.write(call), version) for call in calls]
            results.append(Sampled(prompt_tokens=ids, completions=completions))
        return SampleResponse(results=results)

    def _completion(self, written: "str | Written", version: int) -> Completion:
        if isinstance(written, str):
            written = Written(written, [*self.ids(written), END])
        return completion(written.text, written.tokens, version, written.finish)

    async def info(self, request: Empty) -> PolicyInfo:
        return PolicyInfo(
            model="scripted", parameters=1, trainable_parameters=1, vocab_size=1 << 20, context_length=self.context,
            eos_token_ids=[END], version=self.version,
        )  # fmt: skip

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        return TokenizeResponse(tokens=[self._encode(prompt) for prompt in request.prompts])

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        return DetokenizeResponse(texts=[self._decode(tokens.array) for tokens in request.tokens])

    def stream(self, request: SampleRequest) -> Any:
        raise NotImplementedError

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        self.scored.append(request)
        logprobs = [np.full(len(tokens), -0.5, np.float32) for tokens in request.sequences]
        return ScoreResponse(logprobs=logprobs, version=self.version)

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        raise NotImplementedError

    async def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        self.trained.append(request)
        terms = {name: TermReport(loss=0.0, count=1.0, metrics={"entropy": 0.0}) for name in request.losses}
        return ForwardBackwardResponse(loss=0.0, terms=terms, tokens=1, micro_batches=1)

    async def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        self.version += 1
        return OptimStepResponse(version=self.version, grad_norm=0.0, learning_rate=0.0)

    async def publish(self, request: Empty) -> PublishResponse:
        return PublishResponse(version=self.version)


def kind_of(prompt: str) -> str:
    """Which role a prompt asks for."""
    if "[[YES]] or [[NO]]" in prompt:
        return "vote"
    if "Write one hard" in prompt:
        return "question"
    return "probe" if NO_DOCUMENTS in prompt else "answer"


def completion(
    text: str, tokens: Sequence[int], version: int = 0, finish: FinishReason = FinishReason.STOP
) -> Completion:
    return Completion(
        tokens=np.asarray(tokens, np.int32),
        text=text,
        logprobs=np.full(len(tokens), -0.25, np.float32),
        versions=np.full(len(tokens), version, np.int32),
        finish_reason=finish,
    )


async def cast_of(
    policy: ScriptedPolicy,
    questioner: QuestionerConfig | None = None,
    verifier: VerifierConfig | None = None,
) -> Cast:
    """The real questioner and verifier over a scripted policy, behind inline handles."""
    handle = await serve(PolicyService, policy)
    return Cast(
        handle,
        await serve(QuestionerService, QuestionerActor(questioner or QuestionerConfig(), handle)),
        await serve(VerifierService, VerifierActor(verifier or VerifierConfig(), handle)),
    )


async def serve(service: Any, actor: Actor) -> Any:
    await start(actor)
    return make_handle(service, InlineTransport(actor.kind, actor))


# A toy world. Every paragraph states one code, so truth is a look-up.


def paragraph(cluster: str, number: int, words: int = 0) -> str:
    filler = f" filler{cluster}{number}" * words
    return f"The code of {cluster}x{number} is {code(cluster, number)}.{filler}"


def code(cluster: str, number: int) -> str:
    return str(100 + int.from_bytes(f"{cluster}/{number}".encode()) % 7919)


def toy_cluster(name: str, documents: int = 6, task: Task = Task.GENERAL, words: int = 0) -> Cluster:
    paragraphs = [paragraph(name, i, words) for i in range(documents)]
    return Cluster(question_id=name, task=task, data_source="toy", paragraphs=paragraphs)


def stated(text: str) -> dict[str, str]:
    """All codes that a text states, by item."""
    return dict(re.findall(r"The code of (\w+) is (\d+)\.", text))


def proposal(question: str, answer: Any, options: Sequence[str] = ()) -> str:
    fields: dict[str, Any] = {"question": question, "answer": answer}
    if options:
        fields["options"] = dict(zip(LETTERS, options, strict=True))
    return f"It follows.\n```json\n{json.dumps(fields)}\n```"


def reply(answer: str) -> str:
    return f"The correct answer is {answer}."


def toy_writer(right: float = 0.5, vote_right: float = 0.9, wrong_references: float = 0.0) -> Write:
    """Plays all roles in the toy world, with the given shares of right answers and votes."""

    def write(call: Call) -> str:
        rng = call.rng
        facts = stated(call.text)
        if call.kind == "question":
            asked = re.findall(r"Question: What is the code of (\w+)\?", call.text)
            item = rng.choice([item for item in facts if item not in asked] or list(facts))
            answer = "wrong" if rng.random() < wrong_references else facts[item]
            question = f"What is the code of {item}?"
            if "multiple choice" in call.text:
                letter = re.search(r"The right option is ([A-D])", call.text)
                place = LETTERS.index(letter[1]) if letter else 0
                options = [f"{answer}{i}" for i in range(3)]
                return proposal(question, LETTERS[place], [*options[:place], answer, *options[place:]])
            return proposal(question, answer)
        if call.kind == "vote":
            first, second = re.findall(r"Answer [12]: (.*)", call.text)
            return "[[YES]]" if (first == second) == (rng.random() < vote_right) else "[[NO]]"
        item = re.findall(r"What is the code of (\w+)\?", call.text)[-1]
        truth = facts.get(item, "0")
        options = dict(re.findall(r"\(([A-D])\) (\w+)", call.text))
        if options:
            best = next((letter for letter, text in options.items() if text == truth), "A")
            return reply(best if rng.random() < right else rng.choice(sorted(options)))
        return reply(truth if rng.random() < right else "9")

    return write


@dataclass
class ToyWorld:
    """Some clusters, all of known truth."""

    training: list[Cluster]
    heldout: list[Cluster] = field(default_factory=lambda: [toy_cluster("held")])
    knows: bool = True

    def gold(self, clusters: Sequence[Cluster]) -> list[GoldQuestion]:
        return [
            GoldQuestion(
                id=f"{cluster.question_id}-{item}",
                question_id=cluster.question_id,
                task=Task.GENERAL,
                question=f"What is the code of {item}?",
                answer=number,
                evidence=[i],
                hops=1 + i % 2,
            )
            for cluster in clusters
            for i, (item, number) in enumerate(stated(" ".join(cluster.paragraphs)).items())
        ]

    def verdict_pairs(self) -> list[tuple[Question, str, str, bool]]:
        question = Question(task=Task.GENERAL, question="What is the code of K?")
        return [(question, reply("5"), "5", True), (question, reply("5"), "6", False)]

    def audit(self, cluster: Cluster, proposal: Proposal) -> bool | None:
        if not self.knows:
            return None
        item = re.findall(r"code of (\w+)\?", proposal.question)
        answer = proposal.options[LETTERS.index(proposal.answer)] if proposal.options else proposal.answer
        return bool(item) and stated(" ".join(cluster.paragraphs)).get(item[0]) == answer

    def same(self, answer: str, reference: str) -> bool | None:
        return answer == reference if self.knows else None

    def hops(self, question: str) -> int | None:
        return 1 if self.knows else None

    def notes(self) -> list[str]:
        return ["a toy world"]


SHORT = SamplingParams(max_tokens=64, temperature=0.7, top_p=0.95)


def spell_config(**values: Any) -> Config:
    """A configuration at the size of the toy world."""
    defaults: dict[str, Any] = {
        "text": {"documents": "toy"},
        "questions_per_step": 4,
        "generation_batch": 8,
        "chunk": 2,
        "chunks_in_flight": 2,
        "most_batches": 3,
        "group_size": 4,
        "votes": 4,
        "wandb": "disabled",
        "question_sampling": SHORT,
        "answer_sampling": SHORT,
        "vote_sampling": SHORT,
        "questioner": {"documents": 2},
        "grounding": {"enabled": False},
        "audit": {"proposals": 4},
    }
    for name, value in values.items():
        both = isinstance(value, dict) and isinstance(defaults.get(name), dict)
        defaults[name] = {**defaults[name], **value} if both else value
    return Config.model_validate(defaults)


def made_round(
    uid: str,
    rewards: Sequence[float] = (),
    *,
    fate: Fate | None = None,
    task: Task = Task.GENERAL,
    votes: Sequence[Sequence[int]] = (),
    tokens: int = 2,
) -> Round:
    """A round as if it had been played. Votes are those on its first answers."""
    status = ProposalStatus(fate.value) if fate and fate.value in set(ProposalStatus) else ProposalStatus.OK
    texts = completion("text", [5] * tokens)
    asked = Proposal(
        uid=uid, question_id=f"c{uid}", task=task, evidence=[0, 1], fresh=[1], status=status, question=f"Q {uid}?",
        options=list("abcd") if task is Task.CHOICE else [], answer="A", prompt_tokens=np.asarray([3, 4], np.int32),
        completion=texts,
    )  # fmt: skip
    made = Round(Cluster(question_id=f"c{uid}", task=task, data_source="toy", paragraphs=["p", "q"]), asked, fate)
    if rewards:
        made.answers = Sampled(prompt_tokens=np.asarray([3], np.int32), completions=[texts] * len(rewards))
        made.rewards = list(rewards)
        made.judgements = [
            judged(f"{uid}/{i}", reward, votes[i] if i < len(votes) else ()) for i, reward in enumerate(rewards)
        ]
        made.fate = fate or (Fate.GOOD if max(rewards) > min(rewards) else Fate.ZERO_VARIANCE)
    return made


def judged(uid: str, rule: float, votes: Sequence[int]) -> Judgement:
    from actors.votes import majority

    winner, share = majority(votes)
    return Judgement(
        uid=uid,
        parsed="A",
        score=rule,
        rule_score=rule,
        votes=list(votes),
        majority=winner,
        agree_share=share,
        prompt_tokens=np.asarray([6], np.int32) if votes else None,
        completions=[completion("[[YES]]", [7]) for _ in votes],
    )


class ScriptedCompany(Company):
    """A cluster whose policies are scripted."""

    def __init__(self, config: Config, policies: dict[str, ScriptedPolicy]) -> None:
        super().__init__(config, method="spell", run=config.run or "test")
        self.policies = policies
        self.configs: dict[str, PolicyConfig] = {}

    async def policy(self, config: PolicyConfig, *, name: str = "policy") -> PolicyService:
        self.configs[name] = config
        return await self._spawn(PolicyService, name, lambda: self.policies[name], config.resources, commit=False)


@pytest.fixture
def run_spell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[Any]]:
    """Run the whole method in the toy world with scripted policies; gives back the cluster."""
    import methods.spell

    async def run(config: Config, world: ToyWorld, **policies: ScriptedPolicy) -> ScriptedCompany:
        monkeypatch.setattr(methods.spell, "make_world", lambda _: world)
        config = config.model_copy(update={"runs_dir": str(tmp_path)})
        async with ScriptedCompany(config, policies) as company:
            await methods.spell.run(company, config)
        return company

    return run


@pytest.fixture(scope="session")
def toys() -> SimpleNamespace:
    """What tests of SPELL are written with."""
    return SimpleNamespace(
        Written=Written,
        Policy=ScriptedPolicy,
        World=ToyWorld,
        cast=cast_of,
        serve=serve,
        cluster=toy_cluster,
        code=code,
        config=spell_config,
        proposal=proposal,
        reply=reply,
        writer=toy_writer,
        round=made_round,
        completion=completion,
    )


@pytest.fixture
def restless() -> Callable[[int], Callable[[str], Awaitable[None]]]:
    """Lets calls end in an order that a seed decides: each waits for other work to go on a few times."""

    def make(seed: int) -> Callable[[str], Awaitable[None]]:
        rng = random.Random(seed)

        async def wait(kind: str) -> None:
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)

        return wait

    return make
