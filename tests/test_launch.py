"""The one command: what it prints, how it ends, and what bad input leaves behind (nothing)."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import launch
from cluster.cluster import Cluster
from cluster.config import MethodConfig
from cluster.configure import configure
from cluster.run_directory import RunDirectory
from cluster.steps import LoopState, Step
from methods.spell_config import Config, preset
from protocols.errors import Corrupt, Internal

ROOT = Path(launch.__file__).parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own working directory, for all that is made by default."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def documents(folder: Path) -> Path:
    file = folder / "documents.jsonl"
    rows = (f'{{"id": "{i}", "title": "Town {i}", "text": "Town {i} has {i * 37} people."}}\n' for i in range(40))
    file.write_text("".join(rows))
    return file


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused: exit code 2, one line, nothing left behind. Returns the line."""

    def run(*words: str, code: int = launch.BAD_INPUT) -> str:
        before = tree(here)
        assert launch.main(words) == code
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
        assert tree(here) == before
        return shown.err.removeprefix("error: ").rstrip()

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("spel steps=3", "'spel' is neither a method nor a command; did you mean spell?"),
        ("reprot x", "'reprot' is neither a method nor a command; did you mean report?"),
        ("qqq", "'qqq' is neither a method nor a command; known: "),
        ("spell world=ledger stps=3", "stps: unknown key; did you mean steps? (--help lists all keys)"),
        ("spell world=ledger --steps 3", "'--steps': expected key=value"),
        ("spell world=ledger steps=many", "steps: got 'many'; input should be a valid integer"),
        ("spell world=ledger transport=grpc", "transport: got 'grpc'; input should be 'inline' or 'ray'"),
        ("spell world=ledger policy=tiny", "policy: got 'tiny'; expected keys below it, such as policy.model="),
        ("spell --config nothing.yaml", "--config: cannot read nothing.yaml: No such file or directory"),
        ("spell", "documents: expected a file or folder of .txt, .md or .jsonl (or world=ledger"),
        ("spell documents=nothing", "documents: 'nothing' does not exist"),
        ("spell world=ledger profile=nod", "profile: got 'nod'; input should be '', 'laptop', 'node' or 'cluster'"),
        ("spell world=ledger transport=ray policy.resources.cpus=999", "policy does not fit: needs 999 cpus, this"),
        ("plan spel", "'spel' is neither a method nor a command; did you mean spell?"),
        ("plan", "plan: expected a method and its keys"),
        ("report nothing", "report: no run at nothing or runs/nothing"),
    ],
)
def test_bad_words(refused: Callable[..., str], words: str, message: str) -> None:
    assert refused(*words.split()).startswith(message)


def test_a_plan_starts_nothing_and_names_what_fits_nowhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["plan", "spell", "world=ledger", "loss.kl_coef=0.1", "policy.sampler.replicas=2"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["process", "policy-sampler-0", "policy-sampler-1", "policy-trainer-0", "reference"]
    words = ["plan", "spell", "world=ledger", "profile=cluster", "policy.trainer.workers=2"]
    assert launch.main([*words, "policy.resources.gpus=99"]) == launch.BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out.count("NOWHERE: needs gpus=99") == 6
    assert shown.err.startswith("error: policy-sampler-0 does not fit: needs gpus=99")
    assert tree(here) == {}


@pytest.mark.parametrize("words", ["spell --config", "report", "report a b", "report a --runs-dir"])
def test_missing_words_are_explained(here: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    with pytest.raises(SystemExit) as end:
        launch.main(words.split())
    assert end.value.code == 2
    assert "usage: launch.py" in capsys.readouterr().err
    assert tree(here) == {}


def test_documents_that_cannot_be_read(refused: Callable[..., str], here: Path) -> None:
    (here / "empty").mkdir()
    (here / "binary.txt").write_bytes(b"\x00\xff\xfe" * 100)
    (here / "rows.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "b", "title": "two"}\n')
    assert "empty" in refused("spell", "documents=empty")
    assert "binary.txt" in refused("spell", "documents=binary.txt")
    assert "rows.jsonl line 2: field text" in refused("spell", "documents=rows.jsonl")


@pytest.mark.slow
def test_a_model_that_does_not_exist(refused: Callable[..., str], here: Path) -> None:
    documents(here)
    for model in ("/nothing/model", "./nothing", "nothing"):
        assert refused("spell", "documents=documents.jsonl", f"model={model}").startswith(
            f"model: '{model}' does not exist; expected `embedded`, a folder with a Hugging Face model"
        )
    (here / "folder").mkdir()
    message = refused("spell", "documents=documents.jsonl", "model=folder")
    assert message.startswith("model: 'folder' is a folder without config.json")


@pytest.fixture
def run(here: Path) -> Iterator[RunDirectory]:
    """A run that another process holds."""
    config = configure(Config, ["world=ledger", "run=mine"], preset=preset)
    directory = RunDirectory(here / "runs" / "mine")
    directory.open({"method": "spell", **config.model_dump(mode="json")}, config.MAY_CHANGE)
    yield directory
    directory.close()


def test_a_run_that_is_in_use(refused: Callable[..., str], run: RunDirectory) -> None:
    message = refused("spell", "world=ledger", "run=mine")
    assert message == f"run: {run.path} is in use by another process; choose another run="


def test_a_run_of_another_configuration(refused: Callable[..., str], run: RunDirectory) -> None:
    run.close()
    for words, key, old, new in (
        (["seed=1"], "seed", "0", "1"),
        (["lr=0.5"], "policy.trainer.learning_rate", "0.0005", "0.5"),
        (["questioner.documents=2"], "questioner.documents", "3", "2"),
        (["policy.lora.rank=4"], "policy.lora", "None", "None"),
    ):
        message = refused("spell", "world=ledger", "run=mine", *words)
        assert message.startswith(f"run: {run.path} was made with {key}")
        if old != new:
            assert f"{key}={old}, now it is {new}; choose another run=, or give it the old value" in message


def test_a_folder_that_is_no_run(refused: Callable[..., str], here: Path) -> None:
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "notes.txt").write_text("not a run")
    message = refused("spell", "world=ledger", "run=mine")
    assert message.endswith("runs/mine exists and is not a run (no config.yaml); choose another run=")
    assert refused("report", "mine").startswith("report: no run at mine or runs/mine")


def test_a_place_that_cannot_hold_runs(refused: Callable[..., str], here: Path) -> None:
    (here / "file").touch()
    message = refused("spell", "world=ledger", "runs_dir=file")
    assert message == f"runs_dir: {here}/file is not a folder that can be written to"


def test_a_checkpoint_that_is_damaged_is_no_bad_input(refused: Callable[..., str], run: RunDirectory) -> None:
    run.close()
    (run.path / "config.yaml").write_text("{")
    message = refused("spell", "world=ledger", "run=mine", code=launch.FAILED)
    assert message.startswith(f"{run.path}/config.yaml is damaged")


@pytest.mark.ray
def test_a_ray_cluster_that_does_not_answer(
    refused: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents(here)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    message = refused("spell", "documents=documents.jsonl", "transport=ray", code=launch.FAILED)
    assert message.startswith("RAY_ADDRESS: no Ray cluster answers at 127.0.0.1:9: ")


def test_help_and_the_list_of_methods(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["methods"]) == 0
    methods = capsys.readouterr().out
    assert "spell  " in methods and "SPELL: self-play" in methods
    for words in (["--help"], ["-h"], []):
        assert launch.main(words) == 0
        shown = capsys.readouterr().out
        assert "launch.py METHOD [--config FILE] [key=value ...]" in shown
        assert methods in shown
    assert launch.main(["spell", "steps=bad", "--help"]) == 0
    assert "usage: launch.py spell [--config FILE] [key=value ...]" in capsys.readouterr().out
    assert tree(here) == {}


def test_a_report_is_written_by_name_or_folder(
    here: Path, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    # Also while the run is going on.
    for words in (["mine"], ["runs/mine"], [str(run.path)], ["mine", "--runs-dir", str(here / "runs")]):
        (run.path / "report.html").unlink(missing_ok=True)
        assert launch.main(["report", *words]) == 0
        assert capsys.readouterr().out.strip().endswith("mine/report.html")
        assert (run.path / "report.html").is_file()


def test_the_exit_code_reaches_the_shell(here: Path) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), "spell", "world=ledger", "stps=3"]
    end = subprocess.run(command, capture_output=True, text=True)
    assert (end.returncode, end.stdout) == (2, "")
    assert end.stderr == "error: stps: unknown key; did you mean steps? (--help lists all keys)\n"


# How a run ends, shown by a method that does what the test says.


class State(LoopState):
    turns: int = 0


def method(body: Callable[[Step], Any]) -> ModuleType:
    async def run(cluster: Cluster, config: MethodConfig) -> None:
        state = State()
        async for step in cluster.steps(state):
            state.turns += 1
            step.log({"turns": state.turns})
            waiting = body(step)
            if waiting is not None:
                await waiting

    module = ModuleType("methods.test")
    vars(module).update(run=run, HEADLINE=("turns",))
    return module


@pytest.fixture
def ended(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a method and returns its exit code and what it printed on both streams."""
    config = MethodConfig(steps=3, checkpoint_every=1, wandb="disabled")

    def run(body: Callable[[Step], Any]) -> tuple[int, str, str]:
        monkeypatch.setattr(launch, "_dispatch", lambda words: launch._run("test", method(body), config, "one"))
        code = launch.main([])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_a_run_that_ends_says_where_its_results_are(ended: Callable[..., Any]) -> None:
    code, out, err = ended(lambda step: None)
    assert code == 0
    assert out == "run:    runs/one\nreport: runs/one/report.html\n"
    assert err.splitlines()[-1].startswith("step 3/3  turns 3")


def test_a_run_that_ends_itself_says_why_each_time(ended: Callable[..., Any]) -> None:
    for _ in range(2):
        code, out, err = ended(lambda step: step.stop("start gate: no"))
        assert code == launch.ENDED_EARLY
        assert "report: runs/one/report.html" in out
        assert err.splitlines()[-1] == "the run ended itself: start gate: no"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_the_last_line_says_where_it_goes_on(
    ended: Callable[..., Any], here: Path, number: int, code: int
) -> None:
    def body(step: Step, at: int) -> Awaitable[bool] | None:
        if step.index != at:
            return None
        os.kill(os.getpid(), number)
        return asyncio.Event().wait()

    for at, message in (
        (1, "stopped; the same command begins anew, nothing is committed yet"),
        (3, "stopped; the same command continues after step-000002"),
    ):
        got, out, err = ended(lambda step, at=at: body(step, at))
        assert (got, out) == (code, "")
        assert err.splitlines()[-1] == message
    assert ended(lambda step: None)[0] == 0
    rows = (here / "runs" / "one" / "metrics.jsonl").read_text()
    assert rows == "".join(f'{{"step": {i}, "turns": {i}}}\n' for i in (1, 2, 3))


def test_an_interrupt_outside_of_a_run_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_dispatch", interrupted)
    assert launch.main(["spell"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_failure_is_one_line_and_a_defect_shows_where_it_is(ended: Callable[..., Any]) -> None:
    def damaged(step: Step) -> None:
        raise Corrupt("gradient: not finite")

    def defect(step: Step) -> None:
        raise Internal("ZeroDivisionError: division by zero") from ZeroDivisionError("division by zero")

    code, out, err = ended(damaged)
    assert (code, out, err.splitlines()[-1]) == (launch.FAILED, "", "error: gradient: not finite")
    assert "Traceback" not in err
    code, out, err = ended(defect)
    assert (code, err.splitlines()[-1]) == (launch.FAILED, "error: ZeroDivisionError: division by zero")
    assert "ZeroDivisionError: division by zero\nerror: " in err
