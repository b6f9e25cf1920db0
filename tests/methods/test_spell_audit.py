import json
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.spell_audit import Examiner, Judge, fallen, gate, pass_rates, without_middle
from methods.spell_config import AuditConfig
from methods.spell_report import summary
from protocols.questions import GoldQuestion, Task
from protocols.verifier import VerifierConfig

CLUSTERS = 12


def world_of(toys: SimpleNamespace, knows: bool = True, **options: Any) -> Any:
    return toys.World([toys.cluster(f"c{i}", 6, **options) for i in range(CLUSTERS)], knows=knows)


async def examiner_of(toys: SimpleNamespace, policy: Any, world: Any, judge: Any = None, **values: Any) -> Examiner:
    config = toys.config(**values)
    cast = await toys.cast(policy, config.questioner, config.verifier)
    if judge is None:
        return Examiner(cast, world, config)
    other = await toys.cast(judge, verifier=VerifierConfig(mode="both"))
    return Examiner(cast, world, config, Judge(other.policy, other.verifier))


# The start gate


@pytest.mark.parametrize(("right", "opens"), [(1.0, True), (0.75, True), (0.7499, False), (0.0, False), (None, True)])
def test_the_gate_opens_for_enough_right_references(toys: SimpleNamespace, right: float | None, opens: bool) -> None:
    metrics = {"audit/audited": 100.0} | ({} if right is None else {"audit/right": right})
    reason = gate(metrics, toys.config())
    assert (reason == "") == opens
    assert opens or f"only {right:.0%} of 100 audited reference answers are right, 75% are needed" in reason
    assert gate(metrics, toys.config(proposals="gold")) == ""
    assert gate(metrics, toys.config(audit={"least_right": 0.0})) == ""


async def test_a_spoiled_base_is_not_trained(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer(wrong_references=0.6))
    config = toys.config(steps=3, audit={"proposals": 40}, questioner={"require_support": False})
    company = await run_spell(config, world_of(toys), policy=policy)
    assert [row["step"] for row in company.metrics()] == [0]
    assert policy.version == 0 and not policy.trained
    assert company.finished().startswith("start gate: only")
    kept = json.loads((company.directory.path / "summary.json").read_text())
    assert company.finished() in kept["notes"]


async def test_the_gate_only_reports_if_it_is_not_enforced(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer(wrong_references=0.6))
    config = toys.config(steps=2, audit={"proposals": 40, "enforce": False}, questioner={"require_support": False})
    company = await run_spell(config, world_of(toys), policy=policy)
    assert [row["step"] for row in company.metrics()] == [0, 1, 2]
    assert policy.version == 2
    kept = json.loads((company.directory.path / "summary.json").read_text())
    assert any(note.startswith("not enforced: start gate") for note in kept["notes"])


async def test_the_gate_lets_a_run_on_given_questions_pass(toys: SimpleNamespace, run_spell: Any) -> None:
    policy = toys.Policy(toys.writer(wrong_references=1.0))
    config = toys.config(steps=2, proposals="gold", questioner={"require_support": False})
    company = await run_spell(config, world_of(toys), policy=policy)
    assert company.finished() == ""
    assert policy.version == 2
    rows = company.metrics()
    assert rows[1]["batch/responder"] == 16 and rows[1]["batch/questioner"] == 0
    kept = json.loads((company.directory.path / "summary.json").read_text())
    assert not any("gate" in note for note in kept["notes"])


# The re-audit


@pytest.mark.parametrize(
    ("course", "stops"),
    [
        ([0.6, 0.7, 0.8], None),
        ([0.8, 0.7], None),
        ([0.8, 0.7, 0.7], 2),
        ([0.8, 0.7, 0.76, 0.7], None),
        ([0.8, 0.7, 0.75, 0.7, 0.7], 4),
        ([0.8, 0.75, 0.75, 0.75], None),
        ([0.3, 0.9, 0.84, 0.84], 3),
        ([0.0, 0.0, 0.0], None),
    ],
)
def test_two_falls_in_a_row_end_a_run(course: list[float], stops: int | None) -> None:
    best, falls, found = 0.0, 0, None
    for i, accuracy in enumerate(course):
        best, falls, reason = fallen(accuracy, best, falls, AuditConfig())
        if reason and found is None:
            found = i
            assert f"gold accuracy {accuracy:.3f} is more than 0.05 below its best" in reason
    assert found == stops
    assert best == max(course)


async def test_a_run_whose_accuracy_falls_ends_itself(toys: SimpleNamespace, run_spell: Any) -> None:
    able, lost = toys.writer(right=1.0), toys.writer(right=0.0)
    usual = toys.writer(right=0.5)

    def write(call: Any) -> Any:
        if call.kind == "answer" and "heldx" in call.text:
            return (able if policy.version < 2 else lost)(call)
        return usual(call)

    policy = toys.Policy(write)
    company = await run_spell(toys.config(steps=9, test_every=1), world_of(toys), policy=policy)
    rows = company.metrics()
    assert [row["eval/gold"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert company.finished().startswith("re-audit: gold accuracy 0.000")
    # Coming back to a run that ended itself does not go on.
    again = await run_spell(toys.config(steps=9, test_every=1), world_of(toys), policy=toys.Policy(write))
    assert again.metrics() == rows


# The audit


async def test_audited_shares(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer(wrong_references=0.25))
    values = {"audit": {"proposals": 200}, "questioner": {"require_support": False}}
    examiner = await examiner_of(toys, policy, world_of(toys), **values)
    metrics = await examiner.audit(seed=1, documents=3)
    assert metrics["audit/usable"] == 1.0
    assert 200 <= metrics["audit/audited"] < 200 + CLUSTERS
    assert metrics["audit/right"] == pytest.approx(0.75, abs=0.1)
    assert metrics["audit/right"] + metrics["audit/wrong"] == pytest.approx(1)
    assert metrics == await examiner.audit(seed=1, documents=3)
    assert metrics != await examiner.audit(seed=2, documents=3)
    assert {len(re.findall(r"The code of", call.text)) for call in policy.asked("question")} == {3}
    # Questions of an audit are only looked at.
    assert {call.kind for call in policy.calls} == {"question"}


async def test_few_usable_proposals(toys: SimpleNamespace) -> None:
    usual = toys.writer()
    rare = toys.Policy(lambda call: usual(call) if call.rng.random() < 0.1 else "no")
    metrics = await (await examiner_of(toys, rare, world_of(toys), audit={"proposals": 50})).audit(0, 2)
    assert 0 < metrics["audit/audited"] < 50
    assert len(rare.calls) >= 250
    mute = toys.Policy(lambda call: "no")
    metrics = await (await examiner_of(toys, mute, world_of(toys), audit={"proposals": 50})).audit(0, 2)
    assert metrics == {"audit/usable": 0.0, "audit/audited": 0.0}
    assert 50 <= len(mute.calls) < 50 + CLUSTERS


async def test_where_no_truth_is_known_no_more_is_asked_than_wanted(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer())
    metrics = await (await examiner_of(toys, policy, world_of(toys, knows=False), audit={"proposals": 24})).audit(
        0, 2
    )
    assert metrics == {"audit/usable": 1.0, "audit/audited": 0.0}
    assert len(policy.calls) == 24
    text = summary([{"step": 0, **metrics}], world_of(toys), toys.config(), "")
    assert any("No reference could be audited" in note for note in text.notes)


# A judge


def judge_writer(toys: SimpleNamespace, right: int) -> Any:
    """Answers right so many times of five; as a voter it knows that `seven` is 7."""
    truthful = toys.writer(right=1.0)

    def write(call: Any) -> Any:
        if call.kind == "vote":
            said, reference = re.findall(r"Answer [12]: (.*)", call.text)
            return "[[YES]]" if {"seven": "7"}.get(said, said) == reference else "[[NO]]"
        return truthful(call) if call.index < right else toys.reply("0")

    return write


@pytest.mark.parametrize(("right", "wrong_references", "found"), [(3, 0, 1.0), (2, 0, 0.0), (5, 1, 0.0)])
async def test_a_judge_audits_where_the_truth_is_not_known(
    toys: SimpleNamespace, right: int, wrong_references: float, found: float
) -> None:
    judge = toys.Policy(judge_writer(toys, right))
    policy = toys.Policy(toys.writer(wrong_references=wrong_references))
    values = {"audit": {"proposals": 12}, "questioner": {"require_support": False}}
    examiner = await examiner_of(toys, policy, world_of(toys, knows=False), judge, **values)
    metrics = await examiner.audit(0, documents=2)
    assert (metrics["audit/right"], metrics["audit/audited"]) == (found, 12)
    answers = judge.asked("answer")
    assert len(answers) == 12 * 5
    # It reads what the questioner read, not more.
    assert {len(re.findall(r"The code of", call.text)) for call in answers} == {2}


async def test_known_truth_needs_no_judge(toys: SimpleNamespace) -> None:
    judge = toys.Policy(judge_writer(toys, 0))
    examiner = await examiner_of(toys, toys.Policy(toys.writer()), world_of(toys), judge)
    assert (await examiner.audit(0, 2))["audit/right"] == 1.0
    assert not judge.calls


async def test_gold_answers_count_if_rule_or_judge_accepts_them(toys: SimpleNamespace) -> None:
    """Score of the paper's evaluation: the larger of the rule and a judge at temperature 0; letters by rule only."""
    judge = toys.Policy(judge_writer(toys, 0))
    replies = {"q0": "7", "q1": "seven", "q2": "eight", "q3": "B"}
    policy = toys.Policy(lambda call: toys.reply(replies[call.uid]))
    world = world_of(toys)
    free = [
        GoldQuestion(id=f"q{i}", question_id="held", task=Task.GENERAL, question="Q?", answer="7") for i in range(3)
    ]
    letter = GoldQuestion(
        id="q3", question_id="held", task=Task.CHOICE, question="Q?", options=list("abcd"), answer="A", hops=2
    )
    world.gold = lambda clusters: [*free, letter]
    alone = await (await examiner_of(toys, policy, world)).gold_accuracy()
    assert alone == {
        "eval/gold": 0.25,
        "eval/gold_1hop": pytest.approx(1 / 3),
        "eval/gold_2hop": 0.0,
        "eval/gold_doc_general_qa": pytest.approx(1 / 3),
        "eval/gold_doc_mc": 0.0,
    }
    judged = await (await examiner_of(toys, policy, world, judge)).gold_accuracy()
    assert judged["eval/gold"] == 0.5
    assert judged["eval/gold_doc_mc"] == 0.0
    assert {request.params.temperature for request in judge.requests} == {0.0}
    assert {call.uid for call in judge.calls} == {"0/0", "1/0", "2/0"}


async def test_a_judge_is_a_model_of_its_own(toys: SimpleNamespace, run_spell: Any) -> None:
    """The whole way from the configuration: audit.judge names it, it is frozen, and its word decides the gate."""
    policy, judge = toys.Policy(toys.writer()), toys.Policy(judge_writer(toys, 1))
    config = toys.config(steps=2, audit={"judge": "some/model", "proposals": 12}, policy={"dtype": "bfloat16"})
    company = await run_spell(config, world_of(toys, knows=False), policy=policy, judge=judge)
    assert company.finished().startswith("start gate: only 0% of 12")
    named = company.configs["judge"]
    assert (named.model, named.trainer, named.dtype) == ("some/model", None, "bfloat16")
    assert not policy.trained


async def test_a_long_prompt_of_the_judge_loses_its_middle(toys: SimpleNamespace) -> None:
    judge = toys.Policy(judge_writer(toys, 5), context=200)
    policy = toys.Policy(toys.writer())
    examiner = await examiner_of(toys, policy, world_of(toys, knows=False, words=150), judge, audit={"proposals": 2})
    await examiner.audit(0, documents=2)
    assert judge.calls
    assert {len(call.text.split()) for call in judge.asked("answer")} == {200 - 64}


# Gold accuracy


async def test_the_same_questions_are_asked_in_the_same_way_each_time(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer(right=0.5))
    world = world_of(toys)
    world.heldout = [toys.cluster("h1"), toys.cluster("h2")]
    examiner = await examiner_of(toys, policy, world, test_questions=7, test_samples=3)
    first = await examiner.gold_accuracy()
    calls, policy.calls = policy.calls, []
    assert await examiner.gold_accuracy() == first
    assert policy.calls == calls
    assert len(calls) == 21
    assert len({call.uid for call in calls}) == len({call.seed for call in calls}) == 7
    other = await examiner_of(toys, policy, world, test_questions=7, seed=1)
    policy.calls = []
    await other.gold_accuracy()
    assert {call.uid for call in policy.calls} != {call.uid for call in calls}


async def test_more_questions_than_one_call_takes(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer(right=1.0))
    world = world_of(toys)
    world.heldout = [toys.cluster(f"h{i}", 10) for i in range(15)]
    assert (await (await examiner_of(toys, policy, world)).gold_accuracy())["eval/gold"] == 1.0
    assert sorted(Counter(len(request.prompts) for request in policy.requests).items()) == [(22, 1), (64, 2)]


async def test_aliases_are_as_right(toys: SimpleNamespace) -> None:
    world = world_of(toys)
    question = GoldQuestion(
        id="q", question_id="held", task=Task.GENERAL, question="Q?", answer="Paris", aliases=["Lutetia"]
    )
    world.gold = lambda clusters: [question]
    for said, score in (("Paris", 1.0), ("Lutetia", 1.0), ("Rome", 0.0)):
        policy = toys.Policy(lambda call, said=said: toys.reply(said))
        assert (await (await examiner_of(toys, policy, world)).gold_accuracy())["eval/gold"] == score


async def test_gold_questions_over_their_evidence_alone(toys: SimpleNamespace) -> None:
    for alone in (False, True):
        policy = toys.Policy(toys.writer(right=1.0))
        text = {"documents": "toy", "gold_on_evidence": alone}
        metrics = await (await examiner_of(toys, policy, world_of(toys), text=text)).gold_accuracy()
        assert metrics["eval/gold"] == 1.0
        assert {len(re.findall(r"The code of", call.text)) for call in policy.calls} == {1 if alone else 6}


async def test_a_long_gold_prompt_loses_its_middle(toys: SimpleNamespace) -> None:
    policy = toys.Policy(toys.writer(right=1.0))
    world = world_of(toys)
    world.heldout = [toys.cluster("held", 6, words=50)]
    metrics = await (await examiner_of(toys, policy, world, max_input_tokens=200)).gold_accuracy()
    assert {len(call.text.split()) for call in policy.calls} == {200}
    # The first documents and the question are there, what lies between is not.
    assert all("heldx0 is" in call.text and "What is the code of" in call.text for call in policy.calls)
    assert not any("heldx3 is" in call.text for call in policy.calls)
    assert 0 < metrics["eval/gold"] < 1


@given(st.integers(0, 60), st.integers(1, 60))
def test_without_middle(length: int, limit: int) -> None:
    tokens = np.arange(length, dtype=np.int32)
    kept = without_middle(tokens, limit)
    assert len(kept) == min(length, limit)
    assert (np.diff(kept) > 0).all()
    if length > limit:
        assert kept[: limit // 2].tolist() == list(range(limit // 2))
        assert kept[limit // 2 :].tolist() == list(range(length - (limit - limit // 2), length))


def test_pass_rates() -> None:
    assert pass_rates([3 / 8, 1 / 8], 8) == {
        "eval/pass_at_2": pytest.approx((1 - 10 / 28 + 0.25) / 2),
        "eval/pass_at_4": pytest.approx((0.928571 + 0.5) / 2, abs=1e-6),
        "eval/pass_at_8": 1.0,
    }
    assert pass_rates([0.0, 1.0], 1) == pass_rates([], 8) == {}


async def test_pass_rates_are_measured_with_several_samples(toys: SimpleNamespace) -> None:
    once = toys.Policy(lambda call: toys.writer(right=1.0 if call.index == 2 else 0.0)(call))
    metrics = await (await examiner_of(toys, once, world_of(toys), test_samples=4)).gold_accuracy()
    assert metrics["eval/gold"] == 0.25
    assert (metrics["eval/pass_at_2"], metrics["eval/pass_at_4"]) == (0.5, 1.0)


async def test_verifier_accuracy_is_balanced(toys: SimpleNamespace) -> None:
    agreeable = toys.Policy(lambda call: "[[YES]]")
    assert await (await examiner_of(toys, agreeable, world_of(toys))).verifier_accuracy() == {"eval/verifier": 0.5}
    unreadable = toys.Policy(lambda call: "[[YES]]" if call.index else "hm")
    metrics = await (await examiner_of(toys, unreadable, world_of(toys))).verifier_accuracy()
    assert metrics == {"eval/verifier": 0.375}
    by_rule = await examiner_of(toys, agreeable, world_of(toys), verifier={"mode": "rules"})
    assert await by_rule.verifier_accuracy() == {}
    world = world_of(toys)
    world.verdict_pairs = lambda: []
    assert await (await examiner_of(toys, agreeable, world)).verifier_accuracy() == {}
