"""Every method of every service gives the same over gRPC as in the process, and from a stock client too."""

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_tools import protoc

from cluster.cluster import Cluster
from cluster.config import MethodConfig
from methods.worlds.ledger import vocabulary, write_skeleton
from protocols import codegen
from protocols.client import connect
from protocols.errors import RepertoryError
from protocols.handle import service_of
from protocols.losses import GRPOLoss, SFTLoss
from protocols.messages import ChatMessage, Prompt, SamplingParams
from protocols.policy import (
    DetokenizeRequest,
    EmbedRequest,
    PolicyConfig,
    PolicyService,
    SampleRequest,
    ScoreRequest,
    TokenizeRequest,
)
from protocols.questioner import HistoryRequest, ProposeRequest, QuestionerConfig, QuestionerService, RememberRequest
from protocols.questions import Cluster as Documents
from protocols.questions import Proposal, ProposalStatus, Question, Task
from protocols.retriever import (
    Document,
    IndexRequest,
    Pattern,
    PatternSet,
    RetrieverConfig,
    RetrieverService,
    SearchRequest,
    SnippetsRequest,
)
from protocols.reviser import (
    Label,
    ReviseItem,
    ReviserConfig,
    ReviseRequest,
    ReviserExample,
    ReviserService,
    ReviserTrainRequest,
)
from protocols.reward_model import (
    LabelledReply,
    LearnRequest,
    Preference,
    Reply,
    RewardModelConfig,
    RewardModelService,
    RewardRequest,
)
from protocols.router import (
    RouteEvaluateRequest,
    RouteOptions,
    RouterConfig,
    RouteRequest,
    RouteRow,
    RouterService,
    RouteTrainRequest,
)
from protocols.service import CheckpointRequest, Empty, HealthRequest, Message, Service
from protocols.tensor import Tensor
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow
from protocols.verifier import ComparedItem, CompareRequest, JudgeItem, JudgeRequest, VerifierConfig, VerifierService

WORDS = " ".join(vocabulary()[40:44])
ROW = TrainRow(
    row_id="r",
    tokens=np.arange(3, 12),
    terms={"a": np.r_[np.zeros(4), np.ones(5)], "b": np.r_[np.zeros(5), np.ones(4)]},
    advantages=np.linspace(-1, 1, 9),
)
DOCUMENTS = Documents(question_id="q", task=Task.MATH, paragraphs=["ada lent 12 to bo.", "bo lent 30 to cy."])
PROPOSAL = Proposal(
    uid="u", question_id="q", task=Task.MATH, evidence=[0], fresh=[0], status=ProposalStatus.OK,
    question="how much did ada lend?", answer="12",
)  # fmt: skip
JUDGED = JudgeItem(
    uid="u",
    question=Question(task=Task.MATH, question="how much?"),
    reply="the answer is 12",
    reference="12",
    seed=4,
)
SHORT = SamplingParams(max_tokens=6)
SAMPLE = SampleRequest(prompts=[Prompt(tokens=[5, 6, 7], seed=1), Prompt(text=WORDS, seed=2)], n=2, params=SHORT)
BETTER = Reply(uid="better", prompt=Prompt(tokens=[5, 6, 7]), tokens=[8, 9, 10])
WORSE = Reply(uid="worse", prompt=Prompt(tokens=[5, 6, 7]), text=WORDS)
REWARD = RewardRequest(replies=[BETTER, WORSE.model_copy(update={"ends": Tensor([1, 2, len(WORDS)], "int32")})])
EQUAL = Preference(uid="equal", chosen=BETTER, rejected=BETTER)
PREFERENCES = LearnRequest(pairs=[Preference(uid="pair", chosen=BETTER, rejected=WORSE), EQUAL], learning_rate=0.01)
QUERY = Prompt(uid="query", text=WORDS)
ROUTE = RouteRequest(prompts=[QUERY], options=RouteOptions(price_weight=0.5, prices={"two": 3.0}))
ROUTED = RouteRow(uid="row", prompt=QUERY, answers=[WORDS, "12"], scores=[1.0, 0.25], group="g")
NAMES: dict[Label, str] = {"no": "W0", "minor": "W1", "major": "W2"}
REVISE = ReviseRequest(
    items=[ReviseItem(uid="u", messages=[ChatMessage(role="user", content=WORDS)], reply="12", seed=1)], params=SHORT
)
EXAMPLE = ReviserExample(uid="e", messages=REVISE.items[0].messages, reply="12", label="minor", target=WORDS)
COMPARE = CompareRequest(items=[ComparedItem(uid="u", messages=REVISE.items[0].messages, one="12", other=WORDS)])
NOTE = Document(id="note", text="PLAN: no café smoker. COPD\n😀 copd", metadata={"kind": "note"})
LETTER = Document(id="letter", text="Dear Ada, the kettle is on.")
LUNGS = PatternSet(
    id="lungs", include=[Pattern(expression=r"\bcopd\b"), Pattern(expression="CAFÉ", case_sensitive=True)]
)
SNIPPETS = SnippetsRequest(documents=[NOTE, LETTER], sets=[LUNGS])
NO_PATTERN = PatternSet(id="none", include=[Pattern(expression="a*")])
SERVICES = (
    PolicyService,
    VerifierService,
    QuestionerService,
    ReviserService,
    RewardModelService,
    RouterService,
    RetrieverService,
)
# In order: later calls see what earlier ones changed.
CALLS: list[tuple[type[Service], str, Message]] = [
    *((service, "health", HealthRequest()) for service in SERVICES),
    (PolicyService, "info", Empty()),
    (PolicyService, "tokenize", TokenizeRequest(prompts=[Prompt(text=WORDS), Prompt(tokens=[3])])),
    (PolicyService, "detokenize", DetokenizeRequest(tokens=[[5, 6, 7]])),
    (PolicyService, "sample", SAMPLE),
    (PolicyService, "stream", SAMPLE),
    (PolicyService, "embed", EmbedRequest(prompts=[Prompt(text=WORDS), Prompt(tokens=[3])])),
    (PolicyService, "score", ScoreRequest(sequences=[np.arange(1, 20)], temperature=0.7)),
    (
        PolicyService,
        "forward_backward",
        ForwardBackwardRequest(rows=[ROW], losses={"a": SFTLoss(), "b": GRPOLoss(entropy_coef=0.1)}),
    ),
    (PolicyService, "optim_step", OptimStepRequest(learning_rate=0.01)),
    (PolicyService, "publish", Empty()),
    (PolicyService, "sample", SAMPLE),
    (VerifierService, "judge", JudgeRequest(items=[JUDGED], votes=2, params=SHORT)),
    (VerifierService, "compare", COMPARE),
    (QuestionerService, "propose", ProposeRequest(clusters=[DOCUMENTS], uids=["u"], seed=3, params=SHORT)),
    (QuestionerService, "remember", RememberRequest(proposals=[PROPOSAL])),
    (QuestionerService, "history", HistoryRequest(question_id="q", task=Task.MATH)),
    (ReviserService, "revise", REVISE),
    (ReviserService, "train", ReviserTrainRequest(examples=[EXAMPLE], learning_rate=0.01)),
    (ReviserService, "stream", REVISE),
    (RewardModelService, "info", Empty()),
    (RewardModelService, "score", REWARD),
    (RewardModelService, "train", PREFERENCES),
    (RewardModelService, "score", REWARD),
    (RouterService, "info", Empty()),
    (RouterService, "route", ROUTE),
    (RouterService, "train", RouteTrainRequest(rows=[ROUTED])),
    (RouterService, "evaluate", RouteEvaluateRequest(rows=[ROUTED], options=[RouteOptions(), ROUTE.options])),
    (RetrieverService, "index", IndexRequest(documents=[NOTE, LETTER])),
    (RetrieverService, "info", Empty()),
    (RetrieverService, "search", SearchRequest(queries=["kettle (COPD", "café"], where={"kind": ["note"]})),
    (RetrieverService, "snippets", SNIPPETS),
    *((service, "save", CheckpointRequest(path=service.kind)) for service in SERVICES),
    (RewardModelService, "train", PREFERENCES),
    *((service, "load", CheckpointRequest(path=service.kind)) for service in SERVICES),
    (PolicyService, "info", Empty()),
    (RewardModelService, "health", HealthRequest()),
    (RewardModelService, "score", REWARD),
    (RouterService, "route", ROUTE),
    (RetrieverService, "index", IndexRequest(remove=["note", "nobody"])),
    (RetrieverService, "search", SearchRequest(queries=["kettle COPD"])),
    # What goes wrong, too.
    (PolicyService, "sample", SampleRequest(prompts=[Prompt(tokens=[10**6])])),
    (PolicyService, "tokenize", TokenizeRequest(prompts=[Prompt(text="")])),
    (PolicyService, "load", CheckpointRequest(path="nowhere")),
    (PolicyService, "optim_step", OptimStepRequest()),
    (VerifierService, "compare", COMPARE),
    (QuestionerService, "propose", ProposeRequest(clusters=[DOCUMENTS], uids=[], seed=0)),
    (RewardModelService, "score", RewardRequest(replies=[WORSE.model_copy(update={"text": "", "ended": False})])),
    (RewardModelService, "train", LearnRequest(pairs=[EQUAL])),
    (RewardModelService, "train", LearnRequest(replies=[LabelledReply(reply=BETTER, right=True)])),
    (RouterService, "route", RouteRequest(prompts=[QUERY], options=RouteOptions(exclude=["three"]))),
    (RouterService, "train", RouteTrainRequest(rows=[ROUTED.model_copy(update={"scores": [1.0]})])),
    (RetrieverService, "search", SearchRequest(queries=["kettle"], kind="dense")),
    (RetrieverService, "snippets", SNIPPETS.model_copy(update={"sets": [NO_PATTERN]})),
    *((service, "drain", Empty()) for service in reversed(SERVICES)),
    (PolicyService, "sample", SAMPLE),
]


async def outcome(handle: Service, method: str, request: Message, base: Path | None) -> Any:
    """What comes back, or is raised. Inside of the cluster paths are whole ones: `base` is put before them."""
    if base is not None and isinstance(request, CheckpointRequest):
        request = CheckpointRequest(path=str(base / request.path))
    try:
        answer = getattr(handle, method)(request)
        if type(handle).methods()[method].streaming:
            return [item async for item in answer]
        return await answer
    except RepertoryError as error:
        return type(error), error.message.replace(str(base), "BASE") if base else error.message


async def a_company(
    folder: Path, model: Path, gateway: dict[str, Any] | None
) -> tuple[Cluster, dict[type[Service], Service]]:
    config = MethodConfig.model_validate({"runs_dir": str(folder), "gateway": gateway})
    given = {"model": str(model), "init": "random", "threads": 1, "device": "cpu"}
    cluster = await Cluster(config, method="test", run="one").__aenter__()
    if cluster._gateway is not None:
        cluster._gateway.admission.checkpoints = cluster.directory.path / "remote"
    policy = await cluster.policy(PolicyConfig.model_validate(given))
    verifier = await cluster.verifier(VerifierConfig(names=("W0", "W1")), policy)
    questioner = await cluster.questioner(QuestionerConfig(), policy)
    reward_model = await cluster.reward_model(RewardModelConfig.model_validate(given))
    reviser = await cluster.reviser(ReviserConfig(prompt="{prompt} {reply}", names=NAMES), policy)
    router = await cluster.router(
        RouterConfig.model_validate(given | {"candidates": [{"name": "one"}, {"name": "two"}]})
    )
    retriever = await cluster.retriever(RetrieverConfig())
    company = (policy, verifier, questioner, reviser, reward_model, router, retriever)
    return cluster, {service_of(one): one for one in company}


@pytest.fixture
async def companies(tmp_path: Path) -> AsyncIterator[tuple[Cluster, dict[type[Service], Service], Cluster]]:
    """The same actors twice: asked in the process, and behind a gateway."""
    model = tmp_path / "model"
    write_skeleton(model)
    inside, handles = await a_company(tmp_path / "inside", model, None)
    outside, _ = await a_company(tmp_path / "outside", model, {"address": "127.0.0.1:0"})
    yield inside, handles, outside
    await inside.__aexit__()
    await outside.__aexit__()


async def test_every_method_gives_the_same(companies: Any) -> None:
    inside, handles, outside = companies
    address = outside._gateway.address
    asked = {(service, method) for service, method, _ in CALLS}
    assert asked == {(service, name) for service in codegen.services() for name in service.methods()}
    failures = 0
    for service, method, request in CALLS:
        base = inside.directory.path
        expected = await outcome(handles[service], method, request, base)
        remote = connect(address, service, tries=1)
        found = await outcome(remote, method, request, None)
        if isinstance(found, tuple):
            failures += 1
            found = found[0], found[1].replace(str(outside.directory.path / "remote"), "BASE")
        assert found == expected, (service, method)
    assert failures == 13


async def test_a_loop_trains_a_policy_behind_a_gateway(companies: Any) -> None:
    """The same three lines as over a local actor."""
    _, handles, outside = companies
    losses = []
    row = ROW.model_copy(update={"terms": {"a": ROW.terms["a"]}})
    for policy in (handles[PolicyService], connect(outside._gateway.address, PolicyService)):
        for _ in range(3):
            report = await policy.forward_backward(ForwardBackwardRequest(rows=[row], losses={"a": SFTLoss()}))
            await policy.optim_step(OptimStepRequest(learning_rate=0.01))
            losses.append(report.loss)
    assert losses[:3] == losses[3:]
    assert losses[2] < losses[0]


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Modules that protoc makes of the checked-in files, as a stranger would."""
    out = tmp_path_factory.mktemp("stubs")
    files = [path.name for path in codegen.FOLDER.glob("*.proto")]
    arguments = [f"-I{codegen.FOLDER}", f"--python_out={out}", f"--grpc_python_out={out}", *files]
    assert protoc.main(["protoc", *arguments]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(out))
        yield importlib.import_module


async def test_a_client_made_of_the_proto_files_alone(companies: Any, stubs: Callable[[str], Any]) -> None:
    messages, policy, services = (stubs(name) for name in ("messages_pb2", "policy_pb2", "policy_pb2_grpc"))
    _, handles, outside = companies
    expected = await handles[PolicyService].sample(SAMPLE)

    def ask() -> tuple[Any, list[Any]]:
        with grpc.insecure_channel(outside._gateway.address.removeprefix("grpc://")) as channel:
            stub = services.PolicyServiceStub(channel)
            tokens = np.asarray([5, 6, 7], "<i4").tobytes()
            first = messages.Prompt(seed=1, tokens=stubs("tensor_pb2").Tensor(dtype="int32", shape=[3], data=tokens))
            request = policy.SampleRequest(
                prompts=[first, messages.Prompt(text=WORDS, seed=2)],
                n=2,
                params=messages.SamplingParams(max_tokens=6),
            )
            return stub.Sample(request), list(stub.Stream(request))

    answer, deltas = await asyncio.to_thread(ask)
    texts = [[one.text for one in result.completions] for result in answer.results]
    assert texts == [[one.text for one in result.completions] for result in expected.results]
    logprobs = np.frombuffer(answer.results[0].completions[0].logprobs.data, "<f4")
    assert logprobs.tolist() == expected.results[0].completions[0].logprobs.tolist()
    assert len(deltas) == sum(len(one.tokens) for result in expected.results for one in result.completions)
