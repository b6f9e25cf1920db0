"""Revisions judged by people: labels and rows of the form, and revisers that return what was accepted or proposed."""

import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from actors.actor import Actor
from cluster.configure import configure
from methods import seft_eval
from methods.seft_config import Acceptance, Config
from methods.seft_data import data_of
from methods.seft_eval import Revised, refusal, reviser_metrics
from methods.seft_revisions import (
    ASKED,
    Edit,
    JudgedRevision,
    judged_by_people,
    label_of,
    read_revisions,
    triple_of,
)
from methods.seft_rounds import Cast
from methods.seft_targets import problem_of
from methods.seft_train import reviser_data
from protocols.errors import BadInput
from protocols.messages import FinishReason
from protocols.reviser import (
    ReviserConfig,
    ReviseRequest,
    ReviseResponse,
    ReviserService,
    ReviserTrainRequest,
    ReviserTrainResponse,
    Revision,
    RevisionDelta,
)

TEXT = "one two three four five six seven eight nine ten"


def an_edit(before: str, after: str, verdict: str, start: int = 0) -> dict[str, Any]:
    return {
        "type": "A" if not before else "R" if after else "D", "before": before, "after": after, "start": start,
        "end": start + len(before), "intent": "clarity", "verdict": verdict,
    }  # fmt: skip


def a_row(*edits: tuple[str, str, str], annotator: str = "ann1", doc: str = "d", depth: int = 1) -> dict[str, Any]:
    """Of TEXT, with edits from left to right."""
    known = [an_edit(before, after, verdict, TEXT.index(before)) for before, after, verdict in edits]
    texts = []
    for wanted in ({"Accept", "Reject"}, {"Accept"}):
        text = TEXT
        for edit in reversed(known):
            if edit["verdict"] in wanted:
                text = text[: edit["start"]] + edit["after"] + text[edit["end"] :]
        texts.append(text)
    row = {"doc_id": doc, "annotator": annotator, "depth": depth, "before": TEXT}
    return row | {"proposed": texts[0], "after_accepted": texts[1], "edits": known}


UNTOUCHED = a_row(("two", "2", "Reject"), ("six", "6", "Reject"))
LITTLE = a_row(("two", "2", "Accept"), ("six", "6", "Reject"), ("ten", "10", "Accept"), doc="e")
MUCH = a_row(("one two three", "1", "Accept"), ("six", "6", "Reject"), doc="f")
UNJUDGED = a_row(("two", "2", "Accept"), annotator="none", doc="g")
ROWS = [UNTOUCHED, LITTLE, MUCH, UNJUDGED]


def a_file(folder: Path, *rows: Mapping[str, Any], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


# Labels.


@pytest.mark.parametrize(
    ("edits", "words", "label"),
    [
        ([], 10, "no"),
        ([("a b c", "d", "Reject")], 10, "no"),
        ([("a b", "c", "Accept")], 10, "minor"),  # 2 of 10
        ([("a", "b c", "Accept")], 10, "minor"),  # the longer side counts
        ([("a b", "c", "Accept")], 9, "major"),  # 2 of 9 are 22 %
        ([("a", "b c d", "Accept")], 10, "major"),
        ([("a", "", "Accept"), ("", "b", "Accept")], 10, "minor"),
        ([("a", "", "Accept"), ("", "b", "Accept"), ("c", "d", "Accept")], 10, "major"),
        ([("a", "", "Accept"), ("b c d e", "f", "Reject")], 10, "minor"),  # what was rejected does not count
        ([("  ", " ", "Accept")], 10, "minor"),  # accepted, if without a word
    ],
)
def test_labels(edits: list[tuple[str, str, str]], words: int, label: str) -> None:
    assert label_of([Edit.model_validate(an_edit(*edit)) for edit in edits], words) == label


# Rows.


def test_rows_become_examples(tmp_path: Path) -> None:
    file = a_file(
        tmp_path, *ROWS, a_row(annotator="ann2"), a_row((TEXT, "", "Accept")), a_row(("six", "six", "Accept"))
    )
    dropped: Counter[str] = Counter()
    triples = [triple_of(row) for row in judged_by_people(read_revisions([file]), dropped)]
    assert [(one.label, one.target) for one in triples] == [
        ("no", TEXT),
        ("minor", "one 2 three four five six seven eight nine 10"),
        ("major", "1 four five six seven eight nine ten"),
    ]
    assert [one.id for one in triples] == [one.source_id for one in triples]
    assert [one.id for one in triples] == [f"{file} line {i}" for i in (1, 2, 3)]
    assert all(one.reply == TEXT and [o.content for o in one.messages] == [ASKED] for one in triples)
    assert dropped == {
        "revisions: judged by nobody": 1,
        "revisions: nothing was proposed": 1,
        "revisions: nothing is left of the text": 1,
        "revisions: what was accepted changes nothing": 1,
    }


def changed(edit: Mapping[str, Any]) -> dict[str, Any]:
    return LITTLE | {"edits": [LITTLE["edits"][0] | edit, *LITTLE["edits"][1:]]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({name: value for name, value in LITTLE.items() if name != "proposed"}, "proposed: required, but missing"),
        (LITTLE | {"annotator": 1}, "annotator: got 1; input should be a valid string"),
        (LITTLE | {"depth": 0}, "depth: got 0; input should be greater than or equal to 1"),
        (LITTLE | {"doc_id": ""}, "doc_id: got ''; "),
        (LITTLE | {"before": " ", "edits": []}, "before: got ' '; expected a text"),
        (changed({"verdict": "Maybe"}), "edits.0.verdict: got 'Maybe'; input should be 'Accept' or 'Reject'"),
        (changed({"start": -1}), "edits.0.start: got -1; "),
        (
            changed({"start": 5}),
            "edits.0.start, end: got 5 to 7, where the text is 'wo'; expected the place of 'two'",
        ),
        (changed({"end": 99}), "edits.0.start, end: got 4 to 99, "),
        # It is told of the edit on the left.
        (a_row(("one two", "1", "Accept"), ("two", "2", "Accept")), "edits.0.start, end: got 0 to 7, .* apart from"),
        (
            LITTLE | {"after_accepted": TEXT},
            "after_accepted: got 'two three .*' at character 4; accepted edits lead to '2 three",
        ),
        (UNTOUCHED | {"after_accepted": TEXT + "!"}, "after_accepted: got '!' at character 48; .* lead to '' there"),
    ],
)
def test_bad_rows(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = read_revisions([a_file(tmp_path, UNTOUCHED, row)])
    assert next(rows).doc_id == "d"
    with pytest.raises(BadInput, match=rf"^revisions: .*rows.jsonl line 2: {message}"):
        next(rows)


# In the run.


def config_of(folder: Path, *rows: Mapping[str, Any], held_out: float = 0.3) -> Config:
    pairs = [{"prompt": f"Question {i}?", "better": "quite good", "worse": "quite bad"} for i in range(60)]
    given = {
        "preferences": a_file(folder, *pairs, name="pairs.jsonl"),
        "prompts": a_file(folder, {"prompt": "New?"}, name="alone.jsonl"),
        "revisions": a_file(folder, *rows),
    }
    return configure(
        Config, [f"held_out={held_out}", *(f"{key}=[{file}]" for key, file in given.items())], None, None
    )


async def test_the_reviser_learns_from_them(tmp_path: Path) -> None:
    rows = [a_row(("two", "2", "Accept"), doc=f"d{i % 20}", depth=1 + i // 20) for i in range(40)]
    config = config_of(tmp_path, *rows, UNJUDGED)
    data = data_of(config)
    documents = {row.place: row.doc_id for row in read_revisions(config.revisions)}
    learnt, out = ({documents[one.id] for one in part} for part in (data.revisions, data.revisions_held_out))
    # All rows of a document are on one side.
    assert learnt.isdisjoint(out) and len(learnt) + len(out) == 20 and 1 <= len(out) <= 12
    assert len(data.revisions) == 2 * len(learnt) and len(data.revisions_held_out) == 2 * len(out)
    assert data.dropped == {"revisions: judged by nobody": 1}

    found = await reviser_data(cast_of({}), config, data, np.random.default_rng(0))
    counts = Counter(one.label for one in found.kept)
    # Preferences have no minor pair: 1 word of 2.
    assert counts["minor"] >= len(data.revisions) and max(counts.values()) <= 2 * min(counts.values())
    assert {one.id for one in data.revisions} <= {one.id for one in found.kept}
    assert {one.id for one in data.revisions_held_out}.isdisjoint(one.id for one in found.kept)


# Revisers whose texts are known.


class Scripted(Actor, ReviserService):
    """Its revisions are canned, by the name of the item."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        super().__init__()
        self.texts = texts

    async def revise(self, request: ReviseRequest) -> ReviseResponse:
        return ReviseResponse(
            revisions=[revision_of(one.uid, one.reply, self.texts[one.uid]) for one in request.items]
        )

    def stream(self, request: ReviseRequest) -> AsyncIterator[RevisionDelta]:
        raise NotImplementedError

    async def train(self, request: ReviserTrainRequest) -> ReviserTrainResponse:
        raise NotImplementedError


def revision_of(uid: str, reply: str, text: str) -> Revision:
    """It says `no` where it changes nothing, else `minor`."""
    if text == reply:
        return Revision(uid=uid, label="no", text=text)
    return Revision(uid=uid, label="minor", text=text, finish_reason=FinishReason.STOP)


def cast_of(texts: Mapping[str, str]) -> Cast:
    nobody = cast(Any, None)
    return Cast(nobody, 0, 0, Scripted(texts), nobody, None, None, None, None)


async def both(folder: Path, rows: Sequence[JudgedRevision]) -> tuple[list[Revised], list[Revised]]:
    """What comes of the texts that were accepted, and of those that were proposed."""
    config = config_of(folder, UNTOUCHED)
    triples = [triple_of(row) for row in rows]
    best = {one.source_id: one.target for one in triples}
    scripts = ({row.place: row.after_accepted for row in rows}, {row.place: row.proposed for row in rows})
    accepted, proposed = [await seft_eval.test_reviser(cast_of(script), config, triples, best) for script in scripts]
    return accepted, proposed


def told(found: Sequence[Revised]) -> dict[str, float]:
    return {f"reviser/{name}": value for name, value in reviser_metrics(found).items()}


async def test_what_was_proposed_is_caught_where_a_person_rejected_some(tmp_path: Path) -> None:
    rows = list(judged_by_people(read_revisions([a_file(tmp_path, *ROWS, name="given.jsonl")]), Counter()))
    accepted, proposed = await both(tmp_path, rows)
    assert [one.after for one in accepted] == [1, 1, 1]
    # 2, 1 and 1 words of 10, 10 and 8 are not what the person wanted.
    assert [one.after for one in proposed] == pytest.approx([0.8, 0.9, 7 / 8])
    good, bad = told(accepted), told(proposed)
    assert (good["reviser/harm"], bad["reviser/harm"]) == (0, 1)
    assert good["reviser/gain_minor"] == pytest.approx(0.2) and bad["reviser/gain_minor"] == pytest.approx(0.1)
    assert good["reviser/gain_major"] == pytest.approx(0.3) and bad["reviser/gain_major"] == pytest.approx(0.175)
    assert refusal(good, Acceptance()) == ""
    assert refusal(bad, Acceptance()).startswith("harm: it makes 1.00 of the best replies worse")


def real_file() -> str:
    return str(Path(os.environ["REPERTORY_DATA"]) / "seft" / "human_judged_revisions.jsonl")


@pytest.mark.data
@pytest.mark.skipif("REPERTORY_DATA" not in os.environ, reason="REPERTORY_DATA is not set")
async def test_real_rows(tmp_path: Path) -> None:
    rows = list(read_revisions([real_file()]))
    assert len(rows) == 112 and len({row.doc_id for row in rows}) == 20
    verdicts = Counter(edit.verdict for row in rows for edit in row.edits)
    assert verdicts == {"Accept": 395, "Reject": 233}
    dropped: Counter[str] = Counter()
    judged = list(judged_by_people(rows, dropped))
    assert dropped == {"revisions: judged by nobody": 16} and len(judged) == 96
    # Nobody rejected anything in the rows that nobody judged.
    assert Counter(edit.verdict for row in judged for edit in row.edits) == {"Accept": 273, "Reject": 233}
    triples = [triple_of(row) for row in judged]
    assert Counter(one.label for one in triples) == {"no": 19, "minor": 71, "major": 6}
    assert all((one.label == "no") == (one.target == one.reply) for one in triples)

    accepted, proposed = await both(tmp_path, judged)
    good, bad = told(accepted), told(proposed)
    assert good["reviser/harm"] == 0 and all(one.after == 1 for one in accepted)
    assert bad["reviser/harm"] == 1  # all 19 of which nothing was accepted
    assert bad["reviser/gain_minor"] < 0 < good["reviser/gain_minor"]
    assert bad["reviser/gain_major"] < good["reviser/gain_major"]
    rejected = [any(not edit.accepted for edit in row.edits) for row in judged]
    missed = [i for i, one in enumerate(proposed) if rejected[i] and one.after == 1]
    assert sum(rejected) == 82 and len(missed) == 1
    # Of that one all that was rejected are blanks.
    assert [edit.before.strip() for edit in judged[missed[0]].edits if not edit.accepted] == [""]
    assert refusal(good, Acceptance()) == "" and refusal(bad, Acceptance()).startswith("harm: it makes 1.00")


@pytest.mark.data
@pytest.mark.skipif("REPERTORY_DATA" not in os.environ, reason="REPERTORY_DATA is not set")
def test_the_guard_on_real_rows() -> None:
    names = ReviserConfig().names.values()
    judged = list(judged_by_people(read_revisions([real_file()]), Counter()))

    def problems(text_of: Any) -> Counter[str | None]:
        said = [revision_of("", row.before, text_of(row)) for row in judged]
        return Counter(problem_of(row.before, one, names) for row, one in zip(judged, said, strict=True))

    assert problems(lambda row: row.after_accepted) == {None: 96}
    assert problems(lambda row: row.proposed) == {None: 96}


@pytest.mark.data
@pytest.mark.skipif("REPERTORY_DATA" not in os.environ, reason="REPERTORY_DATA is not set")
def test_real_rows_enter_a_run() -> None:
    folder = Path(os.environ["REPERTORY_DATA"]) / "seft"
    files = {
        "preferences": "preference_pairs",
        "prompts": "prompts_seed_tasks",
        "revisions": "human_judged_revisions",
    }
    words = [f"{key}=[{folder / f'{name}.jsonl'}]" for key, name in files.items()]
    data = data_of(configure(Config, [*words, "held_out=0.1"], None, None))
    names = {row.place: row.doc_id for row in read_revisions([real_file()])}
    assert {names[one.id] for one in data.revisions_held_out} == {"67985317-depth-1", "86353-depth-1"}
    assert (len(data.revisions), len(data.revisions_held_out)) == (88, 8)
    assert data.dropped["revisions: judged by nobody"] == 16
