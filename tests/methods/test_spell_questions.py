"""What the questioner reads, remembers and refuses, with the real actor over a scripted policy."""

import json
import random
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from actors.questioner import choose_documents, repeats, shuffled_options
from actors.rules import parse_answer
from methods.spell import is_remembered
from methods.spell_rounds import Fate
from protocols.errors import BadInput
from protocols.questioner import HistoryEntry, HistoryRequest, ProposeRequest, QuestionerConfig, RememberRequest
from protocols.questions import LETTERS, Cluster, ProposalStatus, Task

GENERAL, MATH, CHOICE = Task.GENERAL, Task.MATH, Task.CHOICE


# History


async def grow(
    toys: SimpleNamespace, stores: str, documents: int, times: int
) -> tuple[list[int], list[int], list[Any]]:
    """Ask one cluster again and again, every question admitted."""
    config = QuestionerConfig(documents=5, history=3, stores=stores)
    policy = toys.Policy(toys.writer())
    cast = await toys.cast(policy, config)
    cluster = toys.cluster("a", documents)
    read, shown = [], []
    for turn in range(times):
        request = ProposeRequest(clusters=[cluster], uids=[f"t{turn}"], seed=turn)
        (made,) = (await cast.questioner.propose(request)).proposals
        assert made.evidence == sorted(made.evidence)
        assert set(made.fresh) <= set(made.evidence)
        await cast.questioner.remember(RememberRequest(proposals=[made]))
        read.append(len(made.evidence))
        shown.append(made.history_used)
    entries = (await cast.questioner.history(HistoryRequest(question_id="a", task=GENERAL))).entries
    return read, shown, entries


async def test_history_growth_of_the_reference_code(toys: SimpleNamespace) -> None:
    read, shown, entries = await grow(toys, "cumulative", documents=20, times=7)
    assert read == [5, 10, 15, 20, 20, 20, 20]
    assert shown == [0, 1, 2, 3, 3, 3, 3]
    assert [len(entry.documents) for entry in entries] == [20, 20, 20]


async def test_history_growth_of_the_paper(toys: SimpleNamespace) -> None:
    read, shown, entries = await grow(toys, "new", documents=20, times=5)
    assert read == [5, 10, 15, 20, 20]
    assert shown == [0, 1, 2, 3, 3]
    assert len(entries) == 3
    # (L + 1) m documents at most, however many there are; the code's way has no such bound.
    assert (await grow(toys, "new", documents=40, times=9))[0] == [5, 10, 15, 20, 20, 20, 20, 20, 20]
    assert (await grow(toys, "cumulative", documents=40, times=9))[0] == [5, 10, 15, 20, 25, 30, 35, 40, 40]


async def test_fewer_documents_than_m(toys: SimpleNamespace) -> None:
    assert (await grow(toys, "new", documents=3, times=4))[0] == [3, 3, 3, 3]
    assert choose_documents(3, [], 5, random.Random(0)) == ([0, 1, 2], [0, 1, 2])


async def test_history_is_shown_and_belongs_to_task_and_cluster(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer())
    cast = await toys.cast(policy, QuestionerConfig(documents=2, history=2))
    cluster = toys.cluster("a", 8)

    async def once(cluster: Cluster, uid: str) -> Any:
        return (await cast.questioner.propose(ProposeRequest(clusters=[cluster], uids=[uid], seed=3))).proposals[0]

    first = await once(cluster, "u0")
    assert "These questions have been asked" not in policy.calls[-1].text
    await cast.questioner.remember(RememberRequest(proposals=[first]))
    second = await once(cluster, "u1")
    assert f"Question: {first.question}\nAnswer: {first.answer}\n" in policy.calls[-1].text
    assert set(first.fresh) <= set(second.evidence)
    await once(toys.cluster("a", 8, MATH), "u2")
    assert "These questions have been asked" not in policy.calls[-1].text
    await once(toys.cluster("b", 8), "u3")
    assert "These questions have been asked" not in policy.calls[-1].text


async def test_history_off(toys: SimpleNamespace) -> None:
    cast = await toys.cast(toys.Policy(toys.writer()), QuestionerConfig(documents=2, history=0))
    request = ProposeRequest(clusters=[toys.cluster("a")], uids=["u"], seed=0)
    made = (await cast.questioner.propose(request)).proposals
    await cast.questioner.remember(RememberRequest(proposals=made))
    assert (await cast.questioner.history(HistoryRequest(question_id="a", task=GENERAL))).entries == []
    assert (await cast.questioner.propose(request)).proposals == made


async def test_memory_keeps_the_answer_in_words(toys: SimpleNamespace) -> None:
    cast = await toys.cast(toys.Policy(toys.writer()), QuestionerConfig(documents=2))
    cluster = toys.cluster("a", 4, CHOICE)
    (made,) = (await cast.questioner.propose(ProposeRequest(clusters=[cluster], uids=["u"], seed=0))).proposals
    await cast.questioner.remember(RememberRequest(proposals=[made]))
    (entry,) = (await cast.questioner.history(HistoryRequest(question_id="a", task=CHOICE))).entries
    assert entry.answer == made.options[LETTERS.index(made.answer)]


async def test_memory_survives_a_restart(toys: SimpleNamespace, tmp_path: Any) -> None:
    from protocols.service import CheckpointRequest

    cast = await toys.cast(toys.Policy(toys.writer()), QuestionerConfig(documents=2))
    request = ProposeRequest(clusters=[toys.cluster("a")], uids=["u"], seed=0)
    made = (await cast.questioner.propose(request)).proposals
    await cast.questioner.remember(RememberRequest(proposals=made))
    await cast.questioner.save(CheckpointRequest(path=str(tmp_path)))
    other = await toys.cast(toys.Policy(toys.writer()), QuestionerConfig(documents=2))
    await other.questioner.load(CheckpointRequest(path=str(tmp_path)))
    wanted = HistoryRequest(question_id="a", task=GENERAL)
    assert await other.questioner.history(wanted) == await cast.questioner.history(wanted)


@pytest.mark.parametrize(
    ("rewards", "frontier", "solvable"),
    [([0, 0], False, False), ([1, 0], True, True), ([1, 1], False, True), ([], False, False)],
)
def test_which_questions_are_remembered(
    toys: SimpleNamespace, rewards: list[float], frontier: bool, solvable: bool
) -> None:
    made = toys.round("a", rewards, fate=None if rewards else Fate.BAD_FORMAT)
    assert is_remembered(made, toys.config()) == frontier
    assert is_remembered(made, toys.config(remember="solvable")) == solvable


# Prompts that are too long


def entry(*documents: int) -> HistoryEntry:
    return HistoryEntry(question=f"What about {documents[0]}?", answer="5", documents=list(documents))


async def packed(
    toys: SimpleNamespace, limit: int, remembered: list[HistoryEntry], documents: int
) -> tuple[Any, Any]:
    """One proposal over documents of about 100 words each."""
    policy = toys.Policy(toys.writer())
    cast = await toys.cast(policy, QuestionerConfig(documents=2, max_prompt_tokens=limit))
    cluster = toys.cluster("a", documents, words=100)
    asked = toys.round("x").proposal
    for one in remembered:
        update = {"question_id": "a", "question": one.question, "answer": one.answer, "fresh": one.documents}
        await cast.questioner.remember(RememberRequest(proposals=[asked.model_copy(update=update)]))
    request = ProposeRequest(clusters=[cluster], uids=["u"], seed=0)
    (made,) = (await cast.questioner.propose(request)).proposals
    return made, policy


async def test_the_oldest_history_goes_first_with_its_documents(toys: SimpleNamespace) -> None:
    remembered = [entry(0, 1), entry(2, 3), entry(4, 5)]
    whole, _ = await packed(toys, 10_000, remembered, 8)
    assert (len(whole.evidence), whole.history_used) == (8, 3)
    assert (whole.dropped_history, whole.dropped_documents) == (0, 0)
    some, policy = await packed(toys, 750, remembered, 8)
    assert some.evidence == [2, 3, 4, 5, 6, 7]
    assert (some.history_used, some.dropped_history, some.dropped_documents) == (2, 1, 2)
    assert "What about 0?" not in policy.calls[-1].text
    assert "What about 2?" in policy.calls[-1].text
    assert some.fresh == [6, 7]
    fewer, _ = await packed(toys, 330, remembered, 8)
    assert fewer.evidence == [6, 7]
    assert (fewer.history_used, fewer.dropped_history, fewer.dropped_documents) == (0, 3, 6)


async def test_documents_go_when_there_is_no_history_left(toys: SimpleNamespace) -> None:
    made, policy = await packed(toys, 220, [entry(0, 1)], 8)
    assert len(made.evidence) == 1
    assert made.fresh == made.evidence
    assert (made.dropped_history, made.dropped_documents) == (1, 3)
    assert len(policy.calls[-1].text.split()) <= 220
    # Where the rest has no new document, those of the last question to go stay.
    known, _ = await packed(toys, 330, [entry(0, 1, 2, 3)], 4)
    assert 1 <= len(known.evidence) < 4
    assert (known.fresh, known.dropped_history) == ([], 1)


async def test_a_document_that_never_fits_is_a_counted_skip(toys: SimpleNamespace) -> None:
    made, policy = await packed(toys, 90, [entry(0, 1)], 4)
    assert made.status is ProposalStatus.OVERLONG
    assert made.completion is None and made.prompt_tokens is None
    assert (made.dropped_history, made.dropped_documents, len(made.evidence)) == (1, 3, 1)
    assert not policy.calls


# What the questioner refuses


@pytest.mark.parametrize(
    ("question", "answer", "duplicate"),
    [
        ("What is the sum of A and B in 2019 for all?", "5", True),
        ("what is THE sum of a and b, in 2019, for all", "999", True),
        ("What is the total of A and B in 2019 for all?", "5", True),
        ("What is the total of A and C in 2018 for all?", "5", False),
        ("Please: what is the sum of A and B in 2019 for all?", "5.", True),
        ("Please: what is the sum of A and B in 2019 for all?", "6", False),
    ],
)
def test_duplicates(question: str, answer: str, duplicate: bool) -> None:
    known = HistoryEntry(question="What is the sum of A and B in 2019 for all?", answer="5", documents=[0])
    assert repeats(question, answer, known, 0.8) == duplicate


async def test_unsupported_references_can_be_let_through(toys: SimpleNamespace) -> None:
    def write(call: Any) -> str:
        return toys.proposal("What is new?", "nowhere to be found")

    request = ProposeRequest(clusters=[toys.cluster("a")], uids=["u"], seed=0)
    for strict, status in ((True, "unsupported"), (False, "ok")):
        cast = await toys.cast(toys.Policy(write), QuestionerConfig(require_support=strict))
        assert (await cast.questioner.propose(request)).proposals[0].status == status


async def test_numbers_must_follow_from_the_shown_documents(toys: SimpleNamespace) -> None:
    paragraphs = ["Revenue was 120 in 2019.", "Revenue was 100 in 2018."]
    cluster = Cluster(question_id="a", task=MATH, data_source="docmath", paragraphs=paragraphs)
    answers = iter([20, 1.2, 20.0, 77777])
    cast = await toys.cast(toys.Policy(lambda call: toys.proposal("How much?", next(answers))))
    statuses = []
    for i in range(4):
        request = ProposeRequest(clusters=[cluster], uids=[f"u{i}"], seed=0)
        statuses.append((await cast.questioner.propose(request)).proposals[0].status)
    assert statuses == ["ok", "ok", "ok", "unsupported"]


async def test_calls_that_make_no_sense_are_bad_input(toys: SimpleNamespace) -> None:
    cast = await toys.cast(toys.Policy(toys.writer()))
    cluster = toys.cluster("a")
    with pytest.raises(BadInput, match="uids: expected 1"):
        await cast.questioner.propose(ProposeRequest(clusters=[cluster], uids=[], seed=0))
    with pytest.raises(BadInput, match="occurs twice"):
        await cast.questioner.propose(ProposeRequest(clusters=[cluster, cluster], uids=["a", "b"], seed=0))


# Multiple choice


async def test_letters_are_balanced_and_options_shuffled(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer())
    cast = await toys.cast(policy)
    clusters = [toys.cluster(f"c{i}", 2, CHOICE) for i in range(400)]
    uids = [cluster.question_id for cluster in clusters]
    made = (await cast.questioner.propose(ProposeRequest(clusters=clusters, uids=uids, seed=0))).proposals
    asked = Counter(re.findall(r"The right option is ([A-D])", call.text)[0] for call in policy.calls)
    shown = Counter(proposal.answer for proposal in made)
    moved = 0
    for count in (*(asked[letter] for letter in LETTERS), *(shown[letter] for letter in LETTERS)):
        # 100 expected, standard deviation 8.7.
        assert 70 < count < 130
    for proposal, call in zip(made, policy.calls, strict=True):
        truth = toys.code(proposal.question_id, int(proposal.question.rstrip("?")[-1]))
        assert proposal.options[LETTERS.index(proposal.answer)] == truth
        moved += re.findall(r"The right option is ([A-D])", call.text)[0] != proposal.answer
    assert 250 < moved < 350


def test_shuffling_follows_the_right_option(toys: SimpleNamespace) -> None:
    from actors.proposals import parse_proposal

    parsed = parse_proposal(CHOICE, toys.proposal("Which?", "C", ["one", "two", "three", "four"]))
    orders = set()
    for seed in range(50):
        options, letter = shuffled_options(parsed, random.Random(seed))
        assert sorted(options) == ["four", "one", "three", "two"]
        assert options[LETTERS.index(letter)] == "three"
        orders.add(tuple(options))
    assert len(orders) > 15
    broken = parse_proposal(CHOICE, "no json")
    assert shuffled_options(broken, random.Random(0)) == ([], "")


async def test_a_proposal_is_read_as_its_prompt_asked(toys: SimpleNamespace) -> None:
    """What the reference reads from a responder's answer to its own question is that question's answer."""
    cast = await toys.cast(toys.Policy(toys.writer()))
    clusters = [toys.cluster(f"c{i}", 2, task) for i, task in enumerate([GENERAL, MATH, CHOICE])]
    uids = [cluster.question_id for cluster in clusters]
    for made in (await cast.questioner.propose(ProposeRequest(clusters=clusters, uids=uids, seed=0))).proposals:
        assert made.status == "ok"
        assert parse_answer(made.task, toys.reply(made.answer)) == made.answer
        assert json.loads(made.model_dump_json())["uid"] == made.uid
