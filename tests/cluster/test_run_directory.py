import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.run_directory import RunDirectory, check_same_config, flatten, read_manifest, write_atomically
from protocols.errors import BadInput, Corrupt

CONFIG = {"method": "test", "seed": 0, "steps": 4, "policy": {"model": "tiny", "betas": [0.9, 0.99]}}
MAY_CHANGE = {"steps"}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory(tmp_path / "runs" / "one")
    assert directory.open(CONFIG, MAY_CHANGE)
    yield directory
    directory.close()


def committed(run: RunDirectory, step: int, *, keep: int = 9, finished: str = "") -> Path:
    staging = run.begin_checkpoint()
    (staging / "policy").mkdir()
    (staging / "policy" / "weights").write_bytes(step.to_bytes(8) * 10)
    (staging / "loop.json").write_text("{}")
    return run.commit(staging, step, finished, keep)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_new_folder_holds_its_configuration(run: RunDirectory) -> None:
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    assert run.latest() is None


def test_the_same_configuration_takes_it_over(run: RunDirectory) -> None:
    run.append("metrics.jsonl", [{"step": 1}])
    run.close()
    again = RunDirectory(run.path)
    assert not again.open(CONFIG | {"steps": 9}, MAY_CHANGE)
    assert yaml.safe_load((run.path / "config.yaml").read_text())["steps"] == 9
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    again.close()


@pytest.mark.parametrize(
    ("change", "key", "old", "new"),
    [
        ({"seed": 1}, "seed", "0", "1"),
        ({"policy": {"model": "big", "betas": [0.9, 0.99]}}, "policy.model", "'tiny'", "'big'"),
        ({"policy": {"model": "tiny", "betas": [0.9, 0.5]}}, "policy.betas", "[0.9, 0.99]", "[0.9, 0.5]"),
        ({"policy": None}, "policy", "None", "None"),
        ({"method": "other"}, "method", "'test'", "'other'"),
        ({"extra": 5}, "extra", "None", "5"),
    ],
)
def test_another_configuration_is_refused_by_key_old_and_new_value(
    run: RunDirectory, change: dict[str, object], key: str, old: str, new: str
) -> None:
    run.close()
    before = tree(run.path)
    with pytest.raises(BadInput) as error:
        RunDirectory(run.path).claim(CONFIG | change, MAY_CHANGE)
    assert str(error.value).startswith(f"run: {run.path} was made with {key}")
    if change != {"policy": None}:
        assert f"{key}={old}, now it is {new}" in str(error.value)
    assert tree(run.path) == before


def test_claiming_makes_nothing_and_holds_what_is_there(tmp_path: Path, run: RunDirectory) -> None:
    other = RunDirectory(tmp_path / "runs" / "two")
    other.claim(CONFIG, MAY_CHANGE)
    assert not other.path.exists()
    run.close()
    first, second = RunDirectory(run.path), RunDirectory(run.path)
    first.claim(CONFIG, MAY_CHANGE)
    with pytest.raises(BadInput, match=r"one is in use by another process; choose another run="):
        second.claim(CONFIG, MAY_CHANGE)
    # Who has claimed it may open it.
    first.open(CONFIG, MAY_CHANGE)
    first.close()
    second.open(CONFIG, MAY_CHANGE)
    second.close()


def test_another_process_cannot_take_a_run_that_is_held(run: RunDirectory) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.run_directory import RunDirectory\n"
        f"RunDirectory(Path(sys.argv[1])).open({CONFIG!r}, ['steps'])"
    )
    other = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
    assert other.returncode == 1
    assert "BadInput" in other.stderr
    assert "in use by another process" in other.stderr
    run.close()
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    for method in (RunDirectory(tmp_path).claim, RunDirectory(tmp_path).open):
        with pytest.raises(BadInput, match=r"exists and is not a run \(no config.yaml\); choose another run="):
            method(CONFIG, MAY_CHANGE)
    assert tree(tmp_path) == before


def test_an_empty_folder_may_become_a_run_and_so_may_one_whose_birth_was_interrupted(tmp_path: Path) -> None:
    for leftover in ([], [".lock"], [".lock", ".config.yaml.tmp"]):
        path = tmp_path / f"run-{len(leftover)}"
        path.mkdir()
        for name in leftover:
            (path / name).touch()
        directory = RunDirectory(path)
        assert directory.open(CONFIG, MAY_CHANGE)
        directory.close()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"runs_dir: .*/file is not a folder that can be written to"):
        RunDirectory(tmp_path / "file" / "one").claim(CONFIG, MAY_CHANGE)
    with pytest.raises(BadInput, match=r"runs_dir: .*/file is not a folder that can be written to"):
        RunDirectory(tmp_path / "file").open(CONFIG, MAY_CHANGE)


def test_a_folder_without_write_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by chmod: the tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(BadInput, match="is not a folder that can be written to"):
        RunDirectory(tmp_path / "one").open(CONFIG, MAY_CHANGE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "- 1\n", "", "\x00"])
def test_a_damaged_configuration_is_corrupt_and_named(run: RunDirectory, text: str) -> None:
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(Corrupt, match=r"one/config\.yaml is damaged"):
        check_same_config(run.path / "config.yaml", CONFIG, MAY_CHANGE)


def test_a_run_that_could_not_start_can_be_discarded(run: RunDirectory) -> None:
    run.discard()
    assert not run.path.exists()
    assert run.open(CONFIG, MAY_CHANGE)


def test_rows_are_json_lines_with_null_for_what_json_cannot_say(run: RunDirectory) -> None:
    run.append("metrics.jsonl", [{"step": 1, "loss": float("nan"), "gain": float("inf")}])
    text = "ä\n\u2028\U0001f600 and half a sign: \ud83d"
    run.append("metrics.jsonl", [{"step": 2, "text": text}])
    lines = (run.path / "metrics.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"step": 1, "loss": None, "gain": None},
        {"step": 2, "text": text},
    ]


def test_a_commit_is_the_latest_checkpoint_with_all_its_files(run: RunDirectory) -> None:
    run.append("metrics.jsonl", [{"step": 1}])
    path = committed(run, 1, finished="enough")
    assert run.latest() == path
    assert path.name == "step-000001"
    manifest = read_manifest(path)
    assert (manifest.step, manifest.finished) == (1, "enough")
    assert manifest.journals == {"metrics.jsonl": 12, "samples.jsonl": 0, "timings.jsonl": 0}
    assert set(manifest.files) == {"loop.json", "policy/weights"}


def test_only_the_last_checkpoints_are_kept(run: RunDirectory) -> None:
    for step in range(1, 6):
        committed(run, step, keep=2)
    assert [p.name for p in sorted(run.checkpoints.iterdir())] == ["step-000004", "step-000005"]


def test_the_latest_is_the_one_with_the_highest_number(run: RunDirectory) -> None:
    for step in (999_999, 1_000_000):
        path = committed(run, step, keep=1)
        assert run.latest() == path


def test_folders_beside_the_checkpoints_do_not_matter(run: RunDirectory) -> None:
    path = committed(run, 1)
    for name in ("step-000009", "step-000001.bak", "step-new", ".staging"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "step-000001.bak" / "manifest.json").touch()
    assert run.latest() == path
    committed(run, 2, keep=9)
    assert (run.checkpoints / "step-000001.bak").is_dir()


@pytest.mark.parametrize("name", ["policy/weights", "loop.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_corrupt_and_the_file_is_named(run: RunDirectory, name: str, damage: str) -> None:
    path = committed(run, 1)
    file = path / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"flip": b"\xff" + content[1:], "cut": content[:-1], "empty": b""}[damage])
    with pytest.raises(Corrupt, match=name):
        read_manifest(path)


def test_journals_are_cut_back_to_what_is_committed(run: RunDirectory) -> None:
    run.append("metrics.jsonl", [{"step": 1}])
    manifest = read_manifest(committed(run, 1))
    run.append("metrics.jsonl", [{"step": 2}])
    run.append("samples.jsonl", [{"step": 2}])
    with open(run.path / "timings.jsonl", "a") as file:
        file.write('{"step": 2, "sec')
    run.rewind(manifest)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (run.path / "samples.jsonl").read_text() == (run.path / "timings.jsonl").read_text() == ""
    run.rewind(None)
    assert (run.path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("left", ["", '{"step":'])
def test_committed_rows_that_are_gone_are_never_made_up(run: RunDirectory, left: str) -> None:
    run.append("metrics.jsonl", [{"step": 1}])
    manifest = read_manifest(committed(run, 1))
    (run.path / "metrics.jsonl").write_text(left)
    with pytest.raises(Corrupt, match=rf"metrics\.jsonl has {len(left)} bytes, but 12 are committed"):
        run.rewind(manifest)
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(Corrupt, match=r"metrics\.jsonl has 0 bytes"):
        run.rewind(manifest)


def test_what_an_interrupted_commit_left_is_removed(run: RunDirectory) -> None:
    staging = run.begin_checkpoint()
    (staging / "half").write_text("written")
    assert list(run.begin_checkpoint().iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    write_atomically(file, "first")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "second")
    assert file.read_text() == "first"


LEAVES = st.integers() | st.none() | st.lists(st.integers(), max_size=2)
MAPPINGS = st.recursive(LEAVES, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3))


@given(st.dictionaries(st.sampled_from("abc"), MAPPINGS, max_size=3))
def test_flattening_keeps_every_leaf_at_its_path(mapping: dict[str, object]) -> None:
    for path, leaf in flatten(mapping).items():
        value: object = mapping
        for key in path.split(".") if path else []:
            assert isinstance(value, dict)
            value = value[key]
        assert value == leaf
        assert not isinstance(leaf, dict) or leaf == {}
