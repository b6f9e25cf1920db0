import json
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from methods.spell import Cursor, lag_of, learn, usual_keep_rate
from methods.spell_batch import Batch, Sample, assemble, dump_row, loss_terms, train_rows
from methods.spell_config import Config, fitted
from methods.spell_report import dumped, log_samples
from methods.spell_rounds import Fate, Round
from protocols.errors import Stale
from protocols.losses import GRPOLoss
from protocols.messages import SamplingParams
from protocols.questions import Task
from protocols.tensor import Tensor

GENERAL, MATH, CHOICE = Task.GENERAL, Task.MATH, Task.CHOICE
SAID = [1, 1, 1, 0]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def rounds_of(toys: SimpleNamespace, good: int, bad: int = 4, votes: Any = (SAID, SAID)) -> list[Round]:
    made = [toys.round(f"g{i}", [1, 1, 0, 0], votes=votes) for i in range(good)]
    return made + [toys.round(f"b{i}", fate=Fate.BAD_FORMAT) for i in range(bad)]


class FakeStep:
    """What `learn` and `log_samples` need of a step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def rng(self, *names: Any) -> np.random.Generator:
        return np.random.default_rng(len(names))

    def activity(self, text: str) -> None:
        pass

    def samples(self, rows: Any) -> None:
        self.rows.extend(rows)


# Who is trained on


def test_only_the_first_n_good_questions_count(toys: SimpleNamespace) -> None:
    batch = assemble(rounds_of(toys, good=6), toys.config(), rng())
    assert (batch.good, batch.surplus) == (4, 2)
    assert list(dict.fromkeys(s.uid.split("/")[0] for s in batch.of("responder"))) == ["g0", "g1", "g2", "g3"]


def test_negatives_are_as_many_per_task_and_none_of_the_blameless(toys: SimpleNamespace) -> None:
    made = [toys.round(f"g{i}", [1, 0, 0, 0], task=task) for i, task in enumerate([GENERAL, GENERAL, MATH, CHOICE])]
    for task in Task:
        for fate in Fate:
            if fate is not Fate.GOOD:
                rewards = [0.0] * 4 if fate is Fate.ZERO_VARIANCE else []
                made += [toys.round(f"{task}-{fate}-{i}", rewards, fate=fate, task=task) for i in range(3)]
    batch = assemble(made, toys.config(), rng())
    negatives = batch.of("questioner")[4:]
    assert Counter(sample.task for sample in negatives) == {GENERAL: 2, MATH: 1, CHOICE: 1}
    allowed = {Fate.BAD_FORMAT, Fate.BAD_GROUND, Fate.ZERO_VARIANCE, Fate.DUPLICATE, Fate.UNSUPPORTED}
    seen = Counter[Fate]()
    for seed in range(40):
        chosen = assemble(made, toys.config(), np.random.default_rng(seed)).of("questioner")[4:]
        seen.update(sample.facts["status"] for sample in chosen)
    assert seen.keys() == allowed
    assert len(assemble(made, toys.config(roles={"negatives_ratio": 0}), rng()).of("questioner")) == 4
    assert len(assemble(made, toys.config(roles={"negatives_ratio": 2}), rng()).of("questioner")) == 12


def test_vote_groups_are_drawn_at_random_or_not_at_all(toys: SimpleNamespace) -> None:
    config = toys.config(roles={"verifier_share": 0.5})
    # 4 questions * 4 answers * 0.5 / 4 votes = 2 groups of the 8 that agree with the rule without being unanimous.
    made = rounds_of(toys, good=4, votes=(SAID, [1, 1, 1, 1], [0, 0, 0, 1], SAID))
    batches = [assemble(made, config, np.random.default_rng(seed)) for seed in range(30)]
    assert all(len(batch.of("verifier")) == 8 for batch in batches)
    groups = {sample.uid.rpartition("/")[0] for batch in batches for sample in batch.of("verifier")}
    assert groups == {f"g{i}/{answer}" for i in range(4) for answer in (0, 2)}
    assert {round(sample.advantage, 6) for sample in batches[0].of("verifier")} == {0.499999, -1.499997}
    # Too few of them: none at all.
    few = rounds_of(toys, good=4, votes=([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]))
    few[0] = toys.round("g0", [1, 1, 0, 0], votes=(SAID,))
    assert assemble(few, config, rng()).of("verifier") == []


@pytest.mark.parametrize(("good", "groups"), [(128, 16), (127, 15), (64, 8), (8, 1), (7, 0), (0, 0)])
def test_number_of_vote_groups(toys: SimpleNamespace, good: int, groups: int) -> None:
    from methods.spell_batch import verifier_samples

    made = rounds_of(toys, good=20, bad=0)
    config = Config(text={"documents": "toy"})
    samples = verifier_samples(made, good, config, rng())
    assert len({sample.uid.rpartition("/")[0] for sample in samples}) == groups


@pytest.mark.parametrize("role", ["questioner", "responder", "verifier"])
def test_every_role_can_be_switched_off(toys: SimpleNamespace, role: str) -> None:
    on = {name: name != role for name in ("questioner", "responder", "verifier")}
    config = toys.config(roles={**on, "verifier_share": 0.5})
    batch = assemble(rounds_of(toys, good=4), config, rng())
    assert {sample.role for sample in batch.samples} == {name for name, wanted in on.items() if wanted}
    assert batch.good == 4


def test_on_given_questions_only_the_responder_learns(toys: SimpleNamespace) -> None:
    batch = assemble(rounds_of(toys, good=4), toys.config(proposals="gold"), rng())
    assert {sample.role for sample in batch.samples} == {"responder"}
    assert len(batch.samples) == 16


def test_one_rare_task_does_not_poison_the_update(toys: SimpleNamespace) -> None:
    """Bug 1 of the reference: one questioner sample of a task made every advantage NaN."""
    made = rounds_of(toys, good=3, bad=3)
    made.append(toys.round("m", [1, 0, 0, 0], task=MATH))
    batch = assemble(made, toys.config(), rng())
    assert sum(sample.task is MATH for sample in batch.of("questioner")) == 1
    rows = train_rows(batch.samples, per_role=False)
    assert all(np.isfinite(row.advantages.array).all() for row in rows)


def test_counts_per_role_and_task(toys: SimpleNamespace) -> None:
    made = [toys.round("g", [1, 0, 0, 0]), toys.round("m", [1, 0, 0, 0], task=MATH)]
    assert assemble(made, toys.config(), rng()).counts() == {
        ("responder", GENERAL): 4, ("responder", MATH): 4, ("questioner", GENERAL): 1, ("questioner", MATH): 1
    }  # fmt: skip


# Rows


def test_a_row_is_prompt_and_completion(toys: SimpleNamespace) -> None:
    sample = Sample(
        "responder",
        "u/1",
        GENERAL,
        toys.round("u").proposal.prompt_tokens,
        toys.completion("a b", [7, 8], 3),
        1.0,
        0.5,
    )
    (row,) = train_rows([sample], per_role=False)
    assert row.row_id == "responder/u/1"
    assert row.tokens.tolist() == [3, 4, 7, 8]
    assert {name: weights.tolist() for name, weights in row.terms.items()} == {"policy": [0, 0, 1, 1]}
    assert row.advantages.tolist() == [0, 0, 0.5, 0.5]
    assert row.versions.tolist() == [-1, -1, 3, 3]
    assert row.sampled_logprobs is None
    (row,) = train_rows([sample], per_role=True)
    assert row.terms.keys() == {"responder"}


def test_empty_and_padded_completions(toys: SimpleNamespace) -> None:
    made = toys.round("g", [1, 0, 0, 0])
    empty, padding = toys.completion("", []), toys.completion("", [0, 0, 0])
    made.answers = made.answers.model_copy(update={"completions": [empty, padding, empty, padding]})
    batch = assemble([made], toys.config(roles={"questioner": False}), rng())
    rows = train_rows(batch.samples, per_role=False)
    assert [row.row_id for row in rows] == ["responder/g/1", "responder/g/3"]
    assert lag_of(rows, 0, 0) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [dump_row(sample, "p")["entropy"] for sample in batch.samples] == [None, 0.25, None, 0.25]


def test_rows_of_older_weights_than_allowed_are_stale(toys: SimpleNamespace) -> None:
    rows = train_rows(assemble(rounds_of(toys, good=1), toys.config(), rng()).samples, per_role=False)
    assert lag_of(rows, 0, 0) == 0
    assert lag_of(rows, 1, 1) == 1
    with pytest.raises(Stale, match=r"responder/g0/0 was sampled under the weights \[0\], now they are 1, and 0 opt"):
        lag_of(rows, 1, 0)
    mixed = toys.completion("a b", [7, 8]).model_copy(update={"versions": np.asarray([0, 1], np.int32)})
    prompt = toys.round("u").proposal.prompt_tokens
    sample = Sample("responder", "u/1", GENERAL, prompt, type(mixed).model_validate(mixed.model_dump()), 1.0)
    rows = train_rows([sample], per_role=False, ratios=True)
    assert rows[0].sampled_logprobs == Tensor(np.r_[np.zeros(2), mixed.logprobs.array], "float32")
    assert lag_of(rows, 1, 1) == 0.5
    for version, most in ((1, 0), (3, 2), (0, 1)):
        with pytest.raises(Stale, match=r"\[0, 1\]"):
            lag_of(rows, version, most)


def test_loss_terms(toys: SimpleNamespace) -> None:
    assert loss_terms(toys.config()) == {"policy": GRPOLoss(temperature=0.7)}
    config = toys.config(roles={"weights": {"questioner": 2.0, "responder": 1.0}}, loss={"coef": 0.5})
    assert {role: term.coef for role, term in loss_terms(config).items()} == {
        "questioner": 1.0, "responder": 0.5, "verifier": 0.0
    }  # fmt: skip
    assert {term.temperature for term in loss_terms(config).values()} == {0.7}


# The update


async def update(toys: SimpleNamespace, good: int = 4, reference: Any = None, **values: Any) -> tuple[Any, Any]:
    policy = toys.Policy(lambda call: "")
    cast = await toys.cast(policy)
    config = toys.config(roles={"verifier_share": 0.5, **values.pop("roles", {})}, **values)
    batch = assemble(rounds_of(toys, good=good), config, rng())
    other = (await toys.cast(reference)).policy if reference else None
    return await learn(cast.policy, other, batch, config, FakeStep()), policy


async def test_one_update_is_one_step_on_everything(toys: SimpleNamespace) -> None:
    metrics, policy = await update(toys)
    (request,) = policy.trained
    assert policy.version == 1
    assert len(request.rows) == 16 + 8 + 8
    assert request.losses == {"policy": GRPOLoss(temperature=0.7)}
    assert all(row.sampled_logprobs is None and row.reference_logprobs is None for row in request.rows)
    assert {"train/loss", "train/grad_norm", "train/lr", "train/policy_entropy"} <= metrics.keys()


async def test_several_steps_use_the_log_probs_before_the_first(toys: SimpleNamespace) -> None:
    _, policy = await update(toys, epochs=2, mini_batches=3)
    assert policy.version == 6
    assert [len(request.rows) for request in policy.trained] == [11, 11, 10] * 2
    (scored,) = policy.scored
    assert (len(scored.sequences), scored.temperature) == (32, 0.7)
    for epoch in (policy.trained[:3], policy.trained[3:]):
        assert len({row.row_id for request in epoch for row in request.rows}) == 32
    assert all(row.sampled_logprobs is not None for request in policy.trained for row in request.rows)


async def test_no_piece_of_a_small_batch_is_empty(toys: SimpleNamespace) -> None:
    _, policy = await update(toys, good=1, mini_batches=50, roles={"questioner": False, "verifier": False})
    assert [len(request.rows) for request in policy.trained] == [1] * 4


async def test_a_kl_needs_the_log_probs_of_the_reference(toys: SimpleNamespace) -> None:
    reference = toys.Policy(lambda call: "")
    _, policy = await update(toys, reference=reference, loss={"kl_coef": 0.1})
    assert [(len(request.sequences), request.temperature) for request in reference.scored] == [(32, 0.7)]
    assert not policy.scored
    (request,) = policy.trained
    assert all(row.reference_logprobs is not None for row in request.rows)
    assert request.losses["policy"].kl_coef == 0.1


async def test_every_role_has_its_term_if_weights_are_given(toys: SimpleNamespace) -> None:
    _, policy = await update(toys, roles={"weights": {"questioner": 1.0, "responder": 1.0, "verifier": 1.0}})
    (request,) = policy.trained
    assert request.losses.keys() == {"questioner", "responder", "verifier"}
    assert all(row.terms.keys() == {row.row_id.split("/")[0]} for row in request.rows)


async def test_without_samples_there_is_no_step(toys: SimpleNamespace) -> None:
    roles = dict.fromkeys(("questioner", "responder", "verifier"), False)
    metrics, policy = await update(toys, roles=roles)
    assert (metrics, policy.version, policy.trained) == ({}, 0, [])


# Samples to look at


NAMES = {
    "input", "output", "role", "uid", "data_source", "advantage", "entropy", "score", "rule_score", "llm_score",
    "pred", "reward_model", "question_id", "evidence", "self_verification",
}  # fmt: skip


def test_rows_have_the_names_of_the_reference(toys: SimpleNamespace) -> None:
    config = toys.config(roles={"verifier_share": 0.5})
    rows = [dump_row(sample, "prompt") for sample in assemble(rounds_of(toys, good=4), config, rng()).samples]
    by_role = {row["role"]: row for row in rows}
    assert by_role.keys() == {"questioner", "responder", "verifier"}
    for row in rows:
        assert row.keys() >= NAMES
        assert json.loads(json.dumps(row)) == row
        assert row["reward_model"] == {"style": "rule", "ground_truth": "A"}
        assert (row["data_source"], row["evidence"]) == ("toy", [0, 1])
    assert by_role["responder"]["rule_score"] == 0
    assert {row["self_verification"] is None for row in rows if row["role"] == "questioner"} == {True}
    assert rows[0]["self_verification"] == SAID
    assert {row["llm_score"] for row in rows if row["role"] == "verifier"} == {0, 1}


def test_whole_groups_are_shown(toys: SimpleNamespace) -> None:
    config = toys.config(roles={"verifier_share": 0.5})
    batch = assemble(rounds_of(toys, good=4), config, rng())
    shown = dumped(batch, 3)
    assert Counter((sample.role, sample.uid[0]) for sample in shown) == {
        ("responder", "g"): 8, ("questioner", "g"): 2, ("questioner", "b"): 1, ("verifier", "g"): 8
    }  # fmt: skip
    assert dumped(batch, 0) == []
    assert len(dumped(batch, 100)) == len(batch.samples)


async def test_what_was_written_is_shown_where_nothing_can_be_learned(toys: SimpleNamespace) -> None:
    cast = await toys.cast(toys.Policy(lambda call: ""))
    made = [*rounds_of(toys, good=0, bad=12), toys.round("cut", fate=Fate.TRUNCATED)]
    made[0].proposal = made[0].proposal.model_copy(update={"completion": None, "prompt_tokens": None})
    step, config = FakeStep(), toys.config(dump_questions=5)
    await log_samples(step, made, assemble(made, config, rng()), config, cast.policy)
    assert [(row["uid"], row["reward"], row["advantage"]) for row in step.rows] == [
        (f"b{i}", -1.0, 0.0) for i in range(1, 6)
    ]
    assert step.rows[0]["status"] == "bad_format"
    none = FakeStep()
    await log_samples(none, made, Batch([], 0, 0), toys.config(dump_questions=0), cast.policy)
    assert none.rows == []


# Expectations and limits


def test_usual_keep_rate(toys: SimpleNamespace) -> None:
    config = Config(text={"documents": "toy"})
    assert usual_keep_rate(Cursor(), config) == pytest.approx(128 / 480)
    assert usual_keep_rate(Cursor(keep_rates=[(100, 40), (300, 60)]), config) == pytest.approx(0.25)
    assert usual_keep_rate(Cursor(keep_rates=[(4800, 0)]), config) == 0.02
    assert usual_keep_rate(Cursor(), toys.config(generation_batch=2)) == 1.0


def test_lengths_fit_the_model(toys: SimpleNamespace) -> None:
    default = Config(text={"documents": "toy"})
    assert fitted(default, 32768) == default
    small = fitted(default, 1024)
    assert small.answer_sampling.max_tokens == small.question_sampling.max_tokens == 384
    assert small.max_input_tokens + small.answer_sampling.max_tokens == 1024
    assert small.questioner.max_prompt_tokens + small.question_sampling.max_tokens == 1024
    assert small.answer_sampling.temperature == 0.7


def test_a_part_that_is_given_leaves_the_rest_of_its_default() -> None:
    given = {"loss": {"kl_coef": 0.1}, "answer_sampling": {"max_tokens": 100}, "task_weights": {"doc_mc": 0}}
    config = Config.model_validate({"text": {"documents": "toy"}} | given)
    assert (config.loss.kl_coef, config.loss.temperature) == (0.1, 0.7)
    assert config.answer_sampling == SamplingParams(max_tokens=100, temperature=0.7, top_p=0.95)
    assert config.task_weights == {GENERAL: 1.0, MATH: 1.0, CHOICE: 0.0}
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": {"temperature": 1.0}}, "sampling at temperature 0.7 and a loss at 1.0 differ"),
        ({"policy": {"trainer": None}}, "policy.trainer is null"),
        ({"text": {}}, "documents: expected a file or folder"),
        ({"world": "ledger"}, "world: the ledger has texts and a model of its own"),
        ({"world": "ledger", "text": {}, "policy": {"model": "a/b"}}, "world: the ledger has texts and a model"),
        ({"task_weights": dict.fromkeys(Task, 0)}, "task_weights"),
        ({"task_weights": {"doc_mc": -1, "docmath_qa": 2}}, "task_weights"),
        ({"group_size": 1}, "greater than or equal to 2"),
    ],
)
def test_configurations_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"text": {"documents": "toy"}} | values)


# A reward model beside the verdict


def test_scores_count_as_they_stand_within_the_group(toys: SimpleNamespace) -> None:
    round_ = toys.round("g0", [1, 1, 0, 0])
    round_.scores = [30.0, 10.0, 20.0, 20.0]
    config = toys.config(rewards={"model_weight": 0.25})
    samples = assemble([round_, *rounds_of(toys, good=3)], config, rng()).of("responder")[:4]
    spread = np.sqrt(200 / 3)  # of the scores, with n - 1
    rewards = np.array([1 + 0.25 * 10 / spread, 1 - 0.25 * 10 / spread, 0, 0])
    expected = (rewards - rewards.mean()) / rewards.std(ddof=1)
    assert [sample.advantage for sample in samples] == pytest.approx(expected.tolist(), abs=1e-5)
    # Accuracy, which the questioner is judged by, is the verdict's alone.
    assert [sample.reward for sample in samples] == [1, 1, 0, 0]
    assert round_.accuracy == 0.5
