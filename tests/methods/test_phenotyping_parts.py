"""How the input is put into parts: many small files in one, tables cut as they are."""

import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods import phenotyping_notes, phenotyping_parts
from methods.phenotyping_decide import Origin
from methods.phenotyping_input import check_input, input_of, keep_input
from methods.phenotyping_notes import Note, Reject, read_part
from methods.phenotyping_parts import Part, files_in, parts_of
from methods.phenotyping_prompts import PromptConfig
from protocols.errors import BadInput
from tests.methods.phenotyping_toys import Run, reader, runner, ward


@pytest.fixture
def run(tmp_path: Path, toys: Any) -> Run:
    return runner(tmp_path, lambda: reader(toys))


def files(root: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x" * size)
    return root


def names(root: Path, parts: Sequence[Part]) -> list[list[str]]:
    return [[Path(one.file).relative_to(root).as_posix() for one in files_in(part)] for part in parts]


def read(root: Path, size: int) -> list[Note | Reject]:
    return [one for part in parts_of([str(root)], size) for one in read_part(part, {})]


def test_small_texts_are_one_part_up_to_a_size(tmp_path: Path) -> None:
    files(tmp_path, {"a.txt": 4, "b/1.txt": 6, "b/2.txt.gz": 1, "c.txt": 30, "d.txt": 0, "e.json": 10, "f.txt": 1})
    parts = parts_of([str(tmp_path)], 10)
    assert names(tmp_path, parts) == [["a.txt", "b/1.txt"], ["b/2.txt.gz"], ["c.txt"], ["d.txt", "e.json"], ["f.txt"]]
    assert [part.index for part in parts] == [0, 1, 2, 3, 4]
    assert [one.format for one in files_in(parts[3])] == ["text", "fhir"]
    assert len(parts_of([str(tmp_path)], 1)) == 7
    assert len(parts_of([str(tmp_path)], 100)) == 1
    # What is named one by one stays apart.
    assert len(parts_of([str(tmp_path / "a.txt"), str(tmp_path / "d.txt")], 100)) == 2


def test_a_part_has_so_many_files_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phenotyping_parts, "FILES", 3)
    files(tmp_path, {f"{i}.txt": 1 for i in range(7)})
    assert [len(one) for one in names(tmp_path, parts_of([str(tmp_path)], 1 << 20))] == [3, 3, 1]


def test_tables_between_texts_keep_their_places_and_are_cut(tmp_path: Path) -> None:
    files(tmp_path, {"a.txt": 1, "b.txt": 1, "d.txt": 1, "f.txt": 1})
    (tmp_path / "c.jsonl").write_text('{"a": 1}\n' * 4)
    (tmp_path / "e.csv").write_text("patient_id,note_id,text\n1,2,3\n")
    parts = parts_of([str(tmp_path)], 18)
    told = [["a.txt", "b.txt"], ["c.jsonl"], ["c.jsonl"], ["d.txt"], ["e.csv"], ["f.txt"]]
    assert names(tmp_path, parts) == told
    assert [(one.start, one.end, one.first_line) for one in parts[1:3]] == [(0, 18, 1), (18, 36, 3)]


@given(st.lists(st.lists(st.text("ab-. _B", min_size=1, max_size=3), min_size=1, max_size=3), max_size=8))
def test_files_come_in_the_order_of_their_paths(tmp_path_factory: Any, places: list[list[str]]) -> None:
    root = files(tmp_path_factory.mktemp("order"), {"x.txt": 1})
    for place in places:
        folder = root.joinpath(*(f"{name}d" for name in place[:-1]))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place[-1]}.txt").write_text("x")
    told = sorted(one for one in root.rglob("*") if one.is_file())
    assert [Path(one.file) for part in parts_of([str(root)], 4) for one in files_in(part)] == told


def test_links_to_files_are_read_and_links_to_folders_are_not(tmp_path: Path) -> None:
    notes = files(tmp_path / "notes", {"a.txt": 1})
    files(tmp_path / "others", {"b.txt": 1})
    (notes / "c.txt").symlink_to(tmp_path / "others" / "b.txt")
    (notes / "d.txt").symlink_to(tmp_path / "nothing")
    (notes / "e").symlink_to(tmp_path / "others")
    assert names(notes, parts_of([str(notes)], 100)) == [["a.txt", "c.txt"]]
    empty = files(tmp_path / "empty", {"a.pdf": 1})
    with pytest.raises(BadInput, match=r"notes: no .jsonl, .* in .*empty"):
        parts_of([str(notes), str(empty)], 100)


BROKEN = ("a/3.txt.gz", "a/5.json.gz")


def mixed(root: Path) -> Path:
    """Texts and resources, some of them bad."""
    files(root, {"a/1.txt": 9, "b/1.txt": 0, "b/2.txt": 5})
    (root / "a" / "2.txt.gz").write_bytes(gzip.compress(b"in an archive"))
    (root / "a" / "3.txt.gz").write_bytes(gzip.compress(b"broken" * 99)[:-9])
    (root / "a" / "4.json").write_text('{"resourceType": "Patient"}')
    (root / "a" / "5.json.gz").write_bytes(b"no archive")
    (root / "a" / "6.txt").write_bytes(b"caf\xe9")
    (root / "c.txt").write_text("at the top")
    return root


def test_a_bad_file_costs_itself_and_is_named(tmp_path: Path) -> None:
    (part,) = parts_of([str(mixed(tmp_path))], 1 << 20)
    found = list(read_part(part, {}))
    told = [(one.patient_id, one.note_id, one.text) for one in found if isinstance(one, Note)]
    assert told == [
        ("a", "a/1", "x" * 9), ("a", "a/2", "in an archive"), ("b", "b/1", ""), ("b", "b/2", "xxxxx"),
        ("c", "c", "at the top"),
    ]  # fmt: skip
    rejects = [(one.place, one.reason) for one in found if isinstance(one, Reject)]
    ended = "Compressed file ended before the end-of-stream marker was reached"
    assert rejects == [
        (f"{tmp_path}/a/3.txt.gz", f"a broken archive: {ended}"),
        (
            f"{tmp_path}/a/4.json",
            "resourceType: got 'Patient', expected DocumentReference or DiagnosticReport",
        ),
        (f"{tmp_path}/a/5.json.gz", "a broken archive: Not a gzipped file"),
        (f"{tmp_path}/a/6.txt", "not utf-8 at byte 3"),
        (f"{tmp_path}/b/1.txt", "text: empty"),
    ]


@pytest.mark.parametrize("size", [1, 20, 60, 1000])
def test_the_same_is_read_in_parts_of_any_size(tmp_path: Path, size: int) -> None:
    root = mixed(tmp_path)
    assert read(root, size) == read(root, 1 << 20)
    # A part goes to other processes as it is.
    parts = [Part.model_validate_json(one.model_dump_json()) for one in parts_of([str(root)], size)]
    assert [one for part in parts for one in read_part(part, {})] == read(root, 1 << 20)


def touched(file: Path) -> None:
    seen = file.stat()
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))


CHANGES = {
    "time": (lambda root: touched(root / "b.txt"), r"a.txt to .*c.txt \(3 files\)"),
    "size": (lambda root: (root / "c.txt").write_text("xx"), r"a.txt to .*c.txt \(3 files\)"),
    "gone": (lambda root: (root / "b.txt").unlink(), r"a.txt to .*c.txt \(3 files\)"),
    "new": (lambda root: (root / "aa.txt").write_text("x"), r"a.txt to .*c.txt \(3 files\)"),
    "renamed": (lambda root: (root / "b.txt").rename(root / "bb.txt"), r"a.txt to .*c.txt \(3 files\)"),
    "table": (lambda root: touched(root / "d.jsonl"), r"d.jsonl"),
    "last": (lambda root: touched(root / "e.txt"), r"e.txt"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_run_is_pinned_to_its_files(tmp_path: Path, change: str) -> None:
    root, run = files(tmp_path / "notes", {"a.txt": 1, "b.txt": 1, "c.txt": 1, "e.txt": 1}), tmp_path / "run"
    (root / "d.jsonl").write_text('{"a": 1}\n' * 4)
    run.mkdir()

    def now() -> dict[str, dict[str, Any]]:
        return input_of(parts_of([str(root)], 18), [], Origin("model", PromptConfig(), "run"))

    keep_input(run, now())
    check_input(run, now())
    assert len(now()["notes"]) == 3
    make, told = CHANGES[change]
    make(root)
    with pytest.raises(BadInput, match=rf"^notes: .*{told} has changed since the run began; choose another run="):
        check_input(run, now())


def charts(root: Path) -> Path:
    """Patients' notes as texts, beside bad ones."""
    mixed(root)
    for one in ward(12):
        file = root / str(one["patient_id"]) / f"{one['note_id']}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(str(one["text"]))
    return root


def left(done: Any, name: str) -> str:
    """A file of a run, without the run's name."""
    text: str = (done.folder / name).read_text()
    return text.replace(f'"run":"{done.folder.name}"', "")


async def test_decisions_do_not_depend_on_how_many_files_are_a_part(run: Run, tmp_path: Path) -> None:
    root = charts(tmp_path / "notes")
    alone = await run("alone", root, "part_bytes=1")
    whole = await run("whole", root, "part_bytes=1000000")
    count = sum(one.is_file() for one in root.rglob("*"))
    assert [len(os.listdir(one.folder / "scan")) for one in (alone, whole)] == [3 * count, 3]
    for name in ("decisions.jsonl", "rejects.jsonl"):
        assert left(alone, name) == left(whole, name)
    assert len(whole.decisions) > 12
    assert len(left(whole, "rejects.jsonl").splitlines()) == 5


async def test_a_part_that_was_interrupted_is_read_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = charts(tmp_path / "notes")
    whole = await run("whole", root)
    kept = phenotyping_notes.told
    read: list[str] = []

    def dies(where: str, row: Any, *, show: bool) -> Any:
        read.append(Path(where).relative_to(root).as_posix())
        if len(read) == 20:
            raise KeyboardInterrupt
        return kept(where, row, show=show)

    monkeypatch.setattr(phenotyping_notes, "told", dies)
    with pytest.raises(KeyboardInterrupt):
        await run("part", root)
    parts = [[one for one in part if one not in BROKEN] for part in names(root, parts_of([str(root)], 300))]
    done = len(list((tmp_path / "runs" / "part" / "scan").glob("*.counts.json")))
    first = [one for part in parts[:done] for one in part]
    # Some parts were read, and some of the next one.
    assert 0 < len(first) < 19 and read == [one for part in parts for one in part][:20]
    again = await run("part", root)
    assert read[20:] == [one for part in parts[done:] for one in part]
    for name in ("decisions.jsonl", "rejects.jsonl"):
        assert left(again, name) == left(whole, name)
