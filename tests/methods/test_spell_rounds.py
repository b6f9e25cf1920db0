import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from methods.spell import is_remembered
from methods.spell_config import Config
from methods.spell_rounds import Cast, ClusterSource, Fate, Round, given, play, propose
from protocols.errors import BadInput
from protocols.messages import FinishReason
from protocols.prompts import NO_DOCUMENTS
from protocols.questioner import RememberRequest
from protocols.questions import LETTERS, Cluster, GoldQuestion, ProposalStatus, Task
from protocols.verifier import JudgeItem, JudgeRequest, VerifierConfig

GENERAL, MATH, CHOICE = Task.GENERAL, Task.MATH, Task.CHOICE


async def ask(cast: Cast, config: Config, clusters: list[Cluster], documents: int = 2, seed: int = 0) -> list[Round]:
    uids = [cluster.question_id for cluster in clusters]
    return await play(cast, config, await propose(cast, config, clusters, uids, seed, documents), seed)


# Fates


FATES = {
    "good": (Fate.GOOD, "ok"),
    "nobody": (Fate.ZERO_VARIANCE, "ok"),
    "everybody": (Fate.ZERO_VARIANCE, "ok"),
    "ungrounded": (Fate.BAD_GROUND, "ok"),
    "prose": (Fate.BAD_FORMAT, "bad_format"),
    "silent": (Fate.BAD_FORMAT, "bad_format"),
    "wordy": (Fate.BAD_ANSWER, "bad_answer"),
    "thinking": (Fate.TRUNCATED, "truncated"),
    "again": (Fate.DUPLICATE, "duplicate"),
    "made-up": (Fate.UNSUPPORTED, "unsupported"),
    "long": (Fate.OVERLONG, "ok"),
    "endless": (Fate.OVERLONG, "overlong"),
}


def fate_writer(toys: SimpleNamespace) -> Any:
    """Every cluster's name says what becomes of its question."""

    def question(name: str) -> Any:
        answer = toys.code(name, 0)
        written = {
            "prose": "I cannot think of a question.",
            "silent": toys.Written("", [0, 0, 0]),
            "wordy": toys.proposal("What?", " ".join(["many"] * 41)),
            "thinking": toys.Written("<think>Let me see", [5, 6], FinishReason.LENGTH),
            "again": toys.proposal("What did I ask?", answer),
            "made-up": toys.proposal("What is new?", "nowhere"),
        }
        return written.get(name, toys.proposal(f"What is the code of {name}x0?", answer))

    def write(call: Any) -> Any:
        name = call.uid.split("/")[0]
        right = toys.reply(toys.code(name, 0))
        if call.kind == "question":
            return question(name)
        if call.kind == "probe":
            return right if name == "ungrounded" and call.index < 2 else toys.reply("no idea")
        if call.kind == "vote":
            return "[[NO]]"
        wrong = {"good": call.index > 0, "nobody": True}
        return toys.reply("7") if wrong.get(name, False) else right

    return write


async def test_every_fate_of_a_question(toys: SimpleNamespace) -> None:
    config = toys.config(grounding={"enabled": True}, max_input_tokens=120, questioner={"max_prompt_tokens": 300})
    policy = toys.Policy(fate_writer(toys))
    cast = await toys.cast(policy, config.questioner)
    remembered = toys.round("x").proposal.model_copy(
        update={"task": GENERAL, "question_id": "again", "question": "What did I ask?", "answer": "5"}
    )
    await cast.questioner.remember(RememberRequest(proposals=[remembered]))
    clusters = [toys.cluster(name, 3) for name in FATES if name not in ("long", "endless")]
    clusters += [toys.cluster("long", 3, words=30), toys.cluster("endless", 3, words=400)]
    rounds = {round_.cluster.question_id: round_ for round_ in await ask(cast, config, clusters, documents=3)}
    assert {name: (round_.fate, round_.proposal.status) for name, round_ in rounds.items()} == {
        name: (fate, ProposalStatus(status)) for name, (fate, status) in FATES.items()
    }
    assert set(Fate) == {fate for fate, _ in FATES.values()}
    rewards = {name: round_.questioner_reward(config) for name, round_ in rounds.items()}
    assert rewards == pytest.approx(
        {
            **dict.fromkeys(FATES, 0.0),
            "good": 0.324652,
            "ungrounded": -0.5,
            "made-up": -0.5,
            "prose": -1.0,
            "silent": -1.0,
        },
        abs=1e-5,
    )
    # What fails a stage costs no more: no probe for a bad proposal, no answers for an ungrounded one.
    asked = {kind: {call.uid.split("/")[0] for call in policy.asked(kind)} for kind in ("probe", "answer", "vote")}
    assert asked["probe"] == {"good", "nobody", "everybody", "ungrounded", "long"}
    assert asked["answer"] == asked["vote"] == {"good", "nobody", "everybody"}
    assert rounds["good"].rewards == [1, 0, 0, 0]
    assert "endless" not in {call.uid for call in policy.asked("question")}
    assert all(round_.proposal.reason for round_ in rounds.values() if round_.proposal.status != "ok")


@pytest.mark.parametrize(
    ("fate", "reward"),
    [
        (Fate.BAD_FORMAT, -1.0),
        (Fate.BAD_GROUND, -0.5),
        (Fate.UNSUPPORTED, -0.5),
        (Fate.DUPLICATE, 0.0),
        (Fate.ZERO_VARIANCE, 0.0),
    ],
)
def test_rewards_of_rejected_questions(toys: SimpleNamespace, fate: Fate, reward: float) -> None:
    # With combine=mean all answers may have 0.5; such a question is no better for it.
    made = toys.round("a", [0.5, 0.5], fate=fate)
    assert made.questioner_reward(toys.config()) == reward


# Grounding


@pytest.mark.parametrize(
    ("task", "hits", "rejected"),
    [
        (GENERAL, 1, False),
        (GENERAL, 2, True),
        (MATH, 1, False),
        (MATH, 2, True),
        (CHOICE, 2, False),
        (CHOICE, 3, True),
    ],
)
async def test_grounding_filter(toys: SimpleNamespace, task: Task, hits: int, rejected: bool) -> None:
    truthful = toys.writer(right=1.0)

    def write(call: Any) -> Any:
        if call.kind != "probe":
            return truthful(call)
        options = dict(re.findall(r"\(([A-D])\) (\w+)", call.text))
        # The wrong options are longer.
        right = min(options, key=lambda letter: len(options[letter]), default=toys.code("a", 0))
        wrong = next((letter for letter in LETTERS if letter != right), "7") if options else "7"
        return toys.reply(right if call.index < hits else wrong)

    policy = toys.Policy(write)
    config = toys.config(grounding={"enabled": True})
    (round_,) = await ask(await toys.cast(policy), config, [toys.cluster("a", 1, task)])
    assert round_.probe_hits == hits
    assert (round_.fate is Fate.BAD_GROUND) == rejected
    probes = policy.asked("probe")
    assert len(probes) == 4
    assert all(NO_DOCUMENTS in call.text and "The code of" not in call.text for call in probes)
    assert round_.probe_tokens == sum(len(toys.reply("7").split()) + 1 for _ in probes)


async def test_without_the_filter_nobody_probes(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer())
    await ask(await toys.cast(policy), toys.config(), [toys.cluster("a")])
    assert not policy.asked("probe")


# Answers and votes


async def test_answers_are_over_all_documents_in_order(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer())
    cluster = toys.cluster("a", 6)
    (round_,) = await ask(await toys.cast(policy), toys.config(), [cluster], documents=2)
    answers = policy.asked("answer")
    assert len(answers) == 4
    assert "\n".join(cluster.paragraphs) in answers[0].text
    (question,) = policy.asked("question")
    shown = [i for i, text in enumerate(cluster.paragraphs) if text in question.text]
    assert shown == round_.proposal.evidence == sorted(shown)
    assert len(shown) == 2
    assert all("The code of" not in call.text.replace("What is the code of", "") for call in policy.asked("vote"))


@pytest.mark.parametrize(
    ("combine", "yes", "no"), [("max", 1.0, 0.0), ("mean", 0.5, 0.0), ("min", 0.0, 0.0), ("sum", 0.5, 0.0)]
)
async def test_votes_combine_with_the_rule(toys: SimpleNamespace, combine: str, yes: float, no: float) -> None:
    """Four answers: right; wrong and voted in; wrong and tied; without an answer."""
    replies = [toys.reply(toys.code("a", 0)), toys.reply("8"), toys.reply("9"), "I do not know."]
    wrong = toys.writer()

    def write(call: Any) -> Any:
        if call.kind == "answer":
            return replies[call.index]
        if call.kind == "vote":
            number = int(call.uid.split("/")[1])
            return ["[[YES]]", "[[YES]]", "[[NO]]" if call.index % 2 else "[[YES]]", "[[YES]]"][number]
        return wrong(call)

    policy = toys.Policy(write)
    config = toys.config(rewards={"combine": combine})
    (round_,) = await ask(await toys.cast(policy), config, [toys.cluster("a", 1)])
    assert [judgement.rule_score for judgement in round_.judgements] == [1, 0, 0, 0]
    assert [judgement.majority for judgement in round_.judgements] == [1, 1, None, None]
    assert [len(judgement.votes) for judgement in round_.judgements] == [4, 4, 4, 0]
    assert round_.rewards == [1.0, yes, no, 0.0]
    assert len({call.seed for call in policy.asked("vote")}) == 3


@pytest.mark.parametrize(("mode", "rewards"), [("rules", [1, 0]), ("votes", [0, 1]), ("both", [1, 1])])
async def test_modes_of_the_verifier(toys: SimpleNamespace, mode: str, rewards: list[float]) -> None:
    """The vote is always for the wrong answer."""

    def write(call: Any) -> Any:
        if call.kind == "answer":
            return toys.reply(toys.code("a", 0) if call.index == 0 else "8")
        if call.kind == "vote":
            return "[[YES]]" if call.uid.endswith("/1") else "[[NO]]"
        return toys.writer()(call)

    config = toys.config(verifier={"mode": mode}, group_size=2)
    cast = await toys.cast(toys.Policy(write), config.questioner, config.verifier)
    (round_,) = await ask(cast, config, [toys.cluster("a", 1)])
    assert round_.rewards == rewards


async def test_letters_without_votes_go_by_the_rule_alone(toys: SimpleNamespace) -> None:
    config = toys.config(rewards={"combine": "mean"})
    (round_,) = await ask(
        await toys.cast(toys.Policy(toys.writer(right=1.0))), config, [toys.cluster("a", 3, CHOICE)]
    )
    assert round_.rewards == [1.0] * 4


@pytest.mark.parametrize("asked_for", [False, True])
async def test_votes_on_letters_only_if_asked_for(toys: SimpleNamespace, asked_for: bool) -> None:
    policy = toys.Policy(toys.writer(right=0.5))
    config = toys.config(verifier={"vote_on_choice": asked_for})
    cast = await toys.cast(policy, config.questioner, config.verifier)
    rounds = await ask(cast, config, [toys.cluster("a", 3, CHOICE), toys.cluster("b", 3)])
    voted = {call.uid.split("/")[0] for call in policy.asked("vote")}
    assert voted == ({"a", "b"} if asked_for else {"b"})
    assert all(round_.rewards for round_ in rounds)


async def test_a_verifier_without_a_policy_only_goes_by_rules(toys: SimpleNamespace) -> None:
    from actors.verifier import VerifierActor
    from protocols.verifier import VerifierService

    verifier = await toys.serve(VerifierService, VerifierActor(VerifierConfig(mode="rules"), None))
    question = GoldQuestion(task=GENERAL, question="Q?", id="1", question_id="c", answer="5")
    item = JudgeItem(uid="1", question=question, reply=toys.reply("5"), reference="5")
    (judgement,) = (await verifier.judge(JudgeRequest(items=[item], votes=8))).judgements
    assert (judgement.score, judgement.votes) == (1.0, [])
    with pytest.raises(BadInput, match="needs a policy"):
        await toys.serve(VerifierService, VerifierActor(VerifierConfig(mode="votes"), None))


async def test_no_valid_proposal_and_no_readable_answer(toys: SimpleNamespace) -> None:
    """Bug 8 of the reference: both crashed there."""
    config = toys.config(grounding={"enabled": True})
    clusters = [toys.cluster("a"), toys.cluster("b")]
    rounds = await ask(await toys.cast(toys.Policy(lambda call: "nothing")), config, clusters)
    assert [round_.fate for round_ in rounds] == [Fate.BAD_FORMAT] * 2
    for silence in ("", "no answer", toys.Written("", []), toys.Written("", [0, 0, 0]), "<think>"):
        talkative = toys.writer()
        policy = toys.Policy(lambda call, s=silence, t=talkative: t(call) if call.kind == "question" else s)
        rounds = await ask(await toys.cast(policy), config, clusters)
        assert [round_.fate for round_ in rounds] == [Fate.ZERO_VARIANCE] * 2
        assert not policy.asked("vote")
    assert await play(await toys.cast(policy), config, [], 0) == []


# Given questions


async def test_given_questions_are_only_answered(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer())
    config = toys.config(proposals="gold", grounding={"enabled": True})
    cluster = toys.cluster("a")
    gold = toys.World([cluster]).gold([cluster])[2]
    (round_,) = await play(await toys.cast(policy), config, [given(cluster, gold, "a")], 0)
    assert {call.kind for call in policy.calls} == {"answer"}
    assert round_.proposal.answer == gold.answer
    assert not is_remembered(round_, config)


# Dealing out clusters


def source(toys: SimpleNamespace, counts: dict[Task, int], drawn: dict[str, int], **weights: float) -> ClusterSource:
    clusters = [toys.cluster(f"{task.value}-{i}", 1, task) for task, n in counts.items() for i in range(n)]
    shares = {task: weights.get(task.name, 1.0) for task in Task}
    return ClusterSource(clusters, shares, 0, drawn)


def names(clusters: list[Cluster]) -> list[str]:
    return [cluster.question_id for cluster in clusters]


def test_tasks_get_equal_shares_and_every_cluster_its_turn(toys: SimpleNamespace) -> None:
    drawn: dict[str, int] = {}
    dealt = source(toys, dict.fromkeys(Task, 10), drawn).draw(30, set())
    assert Counter(cluster.task for cluster in dealt) == dict.fromkeys(Task, 10)
    assert len(set(names(dealt))) == 30
    assert drawn == {task.value: 10 for task in Task}
    assert Counter(cluster.task for cluster in dealt[:9]) == dict.fromkeys(Task, 3)


def test_weights_are_shares(toys: SimpleNamespace) -> None:
    dealt = source(toys, dict.fromkeys(Task, 40), {}, GENERAL=2.0, MATH=1.0, CHOICE=0.0).draw(30, set())
    assert Counter(cluster.task for cluster in dealt) == {GENERAL: 20, MATH: 10}


def test_every_epoch_has_its_order_and_continues_where_it_was(toys: SimpleNamespace) -> None:
    drawn: dict[str, int] = {}
    one = source(toys, {GENERAL: 7}, drawn)
    epochs = [[names(one.draw(1, set()))[0] for _ in range(7)] for _ in range(3)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    middle: dict[str, int] = {GENERAL: 10}
    assert names(source(toys, {GENERAL: 7}, middle).draw(1, set())) == epochs[1][3:4]


def test_a_busy_cluster_is_waited_for_while_other_tasks_go_on(toys: SimpleNamespace) -> None:
    drawn: dict[str, int] = {}
    one = source(toys, {MATH: 1, GENERAL: 20}, drawn)
    first = one.draw(4, set())
    assert Counter(cluster.task for cluster in first) == {MATH: 1, GENERAL: 3}
    second = one.draw(4, set(names(first)))
    assert Counter(cluster.task for cluster in second) == {GENERAL: 4}
    assert not set(names(first)) & set(names(second))
    # When it is free again, its task is the first to be served.
    assert names(one.draw(1, set(names(second)))) == ["docmath_qa-0"]
    alone = source(toys, {GENERAL: 1}, {})
    assert len(alone.draw(8, set())) == 1
    assert alone.draw(8, {"doc_general_qa-0"}) == []


def test_without_a_cluster_to_learn_from(toys: SimpleNamespace) -> None:
    with pytest.raises(BadInput, match="task_weights: the clusters to learn from serve docmath_qa"):
        source(toys, {MATH: 2}, {}, MATH=0.0)
    with pytest.raises(BadInput, match="no task"):
        source(toys, {}, {})
