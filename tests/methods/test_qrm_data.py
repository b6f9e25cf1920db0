"""Q-RM's input: what is read, what is left out, and what each bad row is told."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from methods.dealing import dealt
from methods.qrm_data import Pair, Span, read_pairs, read_tasks, write_pairs
from methods.qrm_world import split
from protocols.errors import BadInput

GOOD = {"instruction": "1 + 1?", "chosen": "2", "rejected": "3"}


def a_file(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_pairs(tmp_path: Path, name: str) -> None:
    rows = [GOOD, "", {**GOOD, "chosen": ["4", "5"], "eq_spans_chosen": [[0, 1, True]], "id": 7}]
    found = read_pairs(a_file(tmp_path, *rows, name=name))
    assert [(pair.chosen, pair.rejected) for pair in found.rows] == [("2", "3"), ("4", "3")]
    assert found.rows[1].spans_chosen == [Span(start=0, end=1, right=True)]
    assert found.rows[1].uid.endswith("line 3")
    assert not found.dropped


def test_what_teaches_nothing_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "chosen": " \n"}, {**GOOD, "rejected": "2"}, {**GOOD, "rejected": ""}]
    found = read_pairs(a_file(tmp_path, *rows))
    assert len(found.rows) == 1
    assert found.dropped == Counter({"empty reply": 2, "chosen equals rejected": 1})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ({"instruction": "a", "chosen": "b"}, "line 2: field rejected: required, but missing"),
        ({**GOOD, "chosen": 3}, "line 2: field chosen: got 3, expected text"),
        ({**GOOD, "chosen": []}, r"line 2: field chosen: got \[\], expected text"),
        ({**GOOD, "chosen": [None]}, "line 2: field chosen: got null, expected text"),
        ({**GOOD, "instruction": None}, "line 2: field instruction: got null"),
        ({**GOOD, "eq_spans_chosen": [[1, 2]]}, "line 2: field eq_spans_chosen: expected"),
        ({**GOOD, "eq_spans_rejected": 5}, "line 2: field eq_spans_rejected: expected"),
        ({**GOOD, "eq_spans_rejected": [[-1, 2, True]]}, "line 2: field eq_spans_rejected: expected"),
    ],
)
def test_a_bad_pair_is_named_by_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(BadInput, match=f"rows.jsonl {message}"):
        read_pairs(a_file(tmp_path, GOOD, row))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no pair"),
        (b"\xff\xfe", "is not UTF-8"),
        (json.dumps({**GOOD, "chosen": "3"}).encode(), "holds no pair"),
    ],
)
def test_files_without_pairs(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_pairs(file)


def test_a_file_that_is_not_there_or_no_whole_gzip(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="pairs: cannot read"):
        read_pairs(tmp_path / "none.jsonl")
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(BadInput, match="not a whole gzip file"):
        read_pairs(broken)


def test_prompts(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "label": "1"}, {"instruction": "b", "label": ""}, {"instruction": "a", "label": "1"}]
    found = read_tasks(a_file(tmp_path, *rows))
    assert [(task.instruction, task.reference) for task in found.rows] == [("a", "1")]
    assert found.dropped == Counter({"no instruction or label": 1, "repeated": 1})
    with pytest.raises(BadInput, match="line 1: field label: required"):
        read_tasks(a_file(tmp_path, {"instruction": "a"}))


def test_pairs_are_read_as_they_were_written(tmp_path: Path) -> None:
    pairs = [Pair(uid="x", instruction="ä\u2028", chosen="\n1", rejected="2\t")]
    write_pairs(tmp_path / "p.jsonl", pairs)
    (found,) = read_pairs(tmp_path / "p.jsonl").rows
    assert (found.instruction, found.chosen, found.rejected) == ("ä\u2028", "\n1", "2\t")


def test_every_row_comes_once_per_epoch() -> None:
    turns = [dealt(range(7), turn, 3, seed=5) for turn in range(14)]
    every = [row for turn in turns for row in turn]
    epochs = [every[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_share_is_kept_for_tests() -> None:
    learn, test = split(list(range(20)), None, 0.1, seed=0)
    assert len(test) == 2 and sorted(learn + test) == list(range(20))
    assert split([1, 2], [3], 0.1, seed=0) == ([1, 2], [3])
    with pytest.raises(BadInput, match="heldout_share"):
        split([1], None, 0.5, seed=0)


@pytest.mark.data
@pytest.mark.skipif("REPERTORY_DATA" not in os.environ, reason="REPERTORY_DATA is unset")
def test_real_pairs_and_prompts() -> None:
    folder = Path(os.environ["REPERTORY_DATA"]) / "qrm"
    pairs = read_pairs(folder / "gsm8k_pairs.jsonl.gz")
    assert len(pairs.rows) == 469 and not pairs.dropped
    spans = [span for pair in pairs.rows for span in pair.spans_chosen + pair.spans_rejected]
    assert (len(spans), sum(not span.right for span in spans)) == (1325, 91)
    assert len(read_pairs(folder / "math_pairs.jsonl.gz").rows) == 1380
    assert len(read_tasks(folder / "gsm8k_prompts.jsonl.gz").rows) == 4000
    tasks = read_tasks(folder / "math_prompts.jsonl.gz")
    assert (len(tasks.rows), tasks.dropped) == (3998, Counter({"no instruction or label": 2}))
