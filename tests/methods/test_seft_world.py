"""The sorting desk, the data of SEFT, and when its rounds end."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.configure import configure
from methods.qrm_measures import wilson
from methods.seft_config import Acceptance, Config, Drift
from methods.seft_data import Data, best_of, data_of, is_held_out, of_round
from methods.seft_eval import Revised, end_of_rounds, refusal, reviser_metrics
from methods.worlds import sorting
from protocols.errors import BadInput


def test_quality_and_damage() -> None:
    assert sorting.answer("3 1 4 1 5 9") == "1 1 3 4 5 9"
    assert sorting.quality("3 1 4 1 5 9", "1 1 3 4 5 9") == 1
    assert sorting.quality("3 1 4 1 5 9", "1 1 3 4 9 5") == pytest.approx(4 / 6)
    assert sorting.quality("3 1 4 1 5 9", "1 1 3") == pytest.approx(3 / 6)
    assert sorting.quality("3 1 4 1 5 9", "1 1 3 4 5 9 9 9") == pytest.approx(6 / 8)
    assert sorting.quality("3 1 4 1 5 9", "") == 0
    rng = np.random.default_rng(0)
    worth = [
        np.mean([sorting.quality(p, sorting.damage(rng, sorting.answer(p), n)) for p in sorting.draw(rng, 400)])
        for n in sorting.DAMAGES
    ]
    assert worth[0] == 1
    # The pilot: 0.755, 0.587 and 0.384 to 0.390.
    assert worth[1:] == pytest.approx([0.755, 0.587, 0.387], abs=0.03)


def world(*words: str) -> Data:
    return data_of(configure(Config, ["world=sorting", *words], None, None))


def test_the_world_of_a_seed_is_the_same_for_all_sizes() -> None:
    small, large = world("sorting.prompts=50"), world("sorting.prompts=90", "held_out=0.2")
    assert small.prompts == large.prompts[:50] and small.test == large.test
    assert small.held_out + small.annotated == large.held_out + large.annotated
    assert (len(small.held_out), len(large.held_out)) == (6, 24)
    prompts = [
        one.id for part in (small.annotated, small.held_out, small.prompts, small.dev, small.test) for one in part
    ]
    assert len(set(prompts)) == len(prompts) == 120 + 50 + 200 + 1000
    assert world("world_seed=1", "sorting.prompts=50").test != small.test
    # Without a reviser there is nothing to test on what is held out.
    assert len(world("algorithm=sft").annotated) == 120


def test_rounds_get_fresh_prompts_as_long_as_there_are_some() -> None:
    prompts = world("sorting.prompts=10").prompts
    first, second, third = (of_round(prompts, turn, 4, seed=0) for turn in (1, 2, 3))
    assert len({one.id for one in first + second}) == 8
    assert {one.id for one in first + second + third[:2]} == {one.id for one in prompts}
    assert third[2:] == first[:2]
    assert of_round(prompts, 2, 0, seed=0) == of_round(prompts, 2, 99, seed=0) == prompts


def write(file: Path, rows: list[dict[str, object]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_no_prompt_is_in_two_parts(tmp_path: Path) -> None:
    pairs = [{"prompt": f"Question {i}?", "better": "good", "worse": "bad"} for i in range(60)]
    pairs.append({"prompt": " question  7? ", "better": "x", "worse": "y"})
    config = configure(
        Config,
        [
            f"preferences=[{write(tmp_path / 'pairs.jsonl', pairs)}]",
            f"prompts=[{write(tmp_path / 'alone.jsonl', [{'prompt': 'QUESTION 3?'}, {'prompt': 'New?'}])}]",
            f"test_prompts=[{write(tmp_path / 'test.jsonl', [{'prompt': 'Question 5?', 'reference': 'r'}])}]",
            "held_out=0.2",
        ],
        None,
        None,
    )
    found = data_of(config)
    assert [one.messages[0].content for one in found.prompts] == ["New?"]
    assert found.dropped == {"preferences: prompt met before": 2, "prompts: prompt met before": 1}
    assert len(found.annotated) + len(found.held_out) == 59
    assert 3 <= len(found.held_out) <= 24 and all(is_held_out(item, 0.2) for item in found.held_out)
    assert [one.reference for one in found.dev] == ["good"] * len(found.held_out)
    assert best_of(found.annotated[0]) == "good"
    assert found.test[0].reference == "r"


def test_too_little_to_hold_some_out_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "better": "b", "worse": "c"}])
    with pytest.raises(BadInput, match=r"no annotated prompts .* among 1"):
        data_of(configure(Config, [f"preferences=[{file}]", f"prompts=[{file}]", "algorithm=seft"], None, None))


def test_ids_become_unique_and_development_prompts_stay_apart(tmp_path: Path) -> None:
    pairs = [{"id": f"{i % 30}", "prompt": f"Q {i}", "better": f"good {i}", "worse": "bad"} for i in range(60)]
    text = write(tmp_path / "pairs.jsonl", pairs)
    alone = write(tmp_path / "alone.jsonl", [{"prompt": "New?"}])
    given = [f"preferences=[{text}]", f"prompts=[{alone}]", "held_out=0.3"]
    found = data_of(configure(Config, given, None, None))
    ids = [one.id for one in found.annotated + found.held_out]
    assert len(set(ids)) == 60
    for task in found.dev:
        assert task.reference == task.messages[0].content.replace("Q", "good")
    # Whatever the algorithm, what tells rounds apart is nothing that it learns from.
    sft = data_of(configure(Config, [*given, "algorithm=sft"], None, None))
    assert {one.id for one in sft.annotated}.isdisjoint(one.id for one in sft.dev)
    with pytest.raises(BadInput, match="prompts: none is left to learn from"):
        data_of(configure(Config, [f"preferences=[{text}]", f"prompts=[{text}]", "held_out=0.3"], None, None))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (63, 400, 0.1251, 0.1964),
        (155, 400, 0.3410, 0.4361),
        (185, 400, 0.4142, 0.5115),
        (147, 400, 0.3217, 0.4158),
    ],
)
def test_intervals_of_the_specification(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=6e-5)


def test_the_alarm_rings_in_the_pilots_case() -> None:
    # The share of `no` jumped from 0.30 to 0.75 after a round; later rounds gained nothing.
    scores, kept = [0.527, 0.798, 0.817, 0.815], [0.30, 0.75, 0.78, 0.80]
    told = [end_of_rounds(scores[: i + 1], kept[: i + 1], Drift()) for i in range(4)]
    assert told[:3] == ["", "", ""]
    assert told[3].startswith("drift: the reviser keeps 0.80 of the replies, at first 0.30")
    # Without a rise there is no drift, but no gain either.
    assert end_of_rounds(scores, [0.30, 0.35, 0.40, 0.45], Drift()).startswith("the last round has not gained")
    assert end_of_rounds(scores, [], Drift()).startswith("the last round has not gained")
    # A gain that is too small is none.
    assert end_of_rounds([0.5, 0.8, 0.804], [0.3, 0.6, 0.7], Drift(gain=0.005)).startswith("drift")


def one(label: str, said: str, before: float, after: float, *, copied: bool = False) -> Revised:
    return Revised(label, said, before, after, copied, 0.5)


def test_what_a_reviser_is_accepted_by() -> None:
    found = [
        one("no", "no", 1, 1, copied=True),
        one("no", "minor", 1, 0.5),
        one("minor", "minor", 0.5, 0.8),
        one("major", "major", 0.2, 0.9),
        one("major", "minor", 0.4, 0.4, copied=True),
    ]
    metrics = reviser_metrics(found)
    # no: 1 right, 1 missed; minor: 1 right, 2 too many; major: 1 right, 1 missed.
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 2 / 3) / 3)
    assert metrics["accuracy"] == pytest.approx(0.6)
    assert (metrics["harm"], metrics["gain_minor"], metrics["gain_major"]) == pytest.approx((0.5, 0.3, 0.35))
    assert metrics["copies"] == pytest.approx(0.25)
    assert metrics["distance"] == 0.5
    told = {f"reviser/{name}": value for name, value in metrics.items()} | {"reviser/no_precision": 0.2}
    assert refusal(told, Acceptance()).startswith("harm: it makes 0.50")
    assert refusal(told, Acceptance(harm=0.5)).startswith("copies: 0.25")
    assert refusal(told, Acceptance(harm=0.5, copies=0.3)) == ""
    assert refusal(told, Acceptance(harm=0.5, copies=0.3, no_precision=0.3)).startswith("no_precision")
    assert refusal(told | {"reviser/gain_major": 0}, Acceptance(harm=1)).startswith("gain_major")
    # None of its labels was `no`, so nothing is known of them.
    assert refusal(told | {"reviser/no_precision": float("nan")}, Acceptance(harm=1, copies=1)) == ""


@given(st.lists(st.tuples(*[st.sampled_from(["no", "minor", "major"])] * 2), min_size=1))
def test_macro_f1_is_sklearns(pairs: list[tuple[str, str]]) -> None:
    from sklearn.metrics import f1_score

    truth = [label for label, _ in pairs]
    wanted = f1_score(truth, [said for _, said in pairs], labels=sorted(set(truth)), average="macro", zero_division=0)
    assert reviser_metrics([one(*pair, 0, 0) for pair in pairs])["macro_f1"] == pytest.approx(wanted)
