"""Whatever stops a run at whatever moment, the same command ends with the files of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.run_directory import RunDirectory, step_of

ROOT = Path(__file__).parents[2]
CONFIG = """
world: ledger
wandb: disabled
steps: 6
checkpoint_every: 1
ledger: {warmup_steps: 30, responder_steps: 10, training_clusters: 30, heldout_clusters: 3}
questions_per_step: 4
generation_batch: 12
group_size: 4
votes: 4
audit: {proposals: 8, enforce: false}
test_questions: 8
test_every: 2
"""
STEPS = 6
INTO_A_STEP = 12
"""CPU time in ticks of 10 ms that leads into the middle of a step; a whole one takes about 30."""
MARK = "REPERTORY_TEST_RUN"
"""An environment variable by which all processes of a run are found, also those that Ray started."""
AGENTS = {"ray::DashboardA", "ray::RuntimeEnv"}
"""Ray's own agents, which hold nothing of a run: one may wait a minute for a head that was killed before it ends."""
KILLED_AT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from launch import main
awaited, ending, left, sys.argv[1:] = sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:]
def kill(event, arguments):
    global left
    if event == awaited and str(arguments[0]).endswith(ending):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
sys.exit(main())
"""
"""launch.py that is killed right before it does something to a path for the n-th time."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc"),
]


@dataclass
class Run:
    """One run, started as often as needed with the same command."""

    folder: Path
    name: str
    options: list[str] = field(default_factory=list)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def path(self) -> Path:
        return self.folder / "runs" / self.name

    def start(self, *more: str, program: Sequence[str] = (str(ROOT / "launch.py"),)) -> subprocess.Popen[str]:
        words = ["--config", str(self.folder / "config.yaml"), f"runs_dir={self.folder / 'runs'}", f"run={self.name}"]
        return subprocess.Popen(
            [sys.executable, *program, "spell", *words, *self.options, *more],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {MARK: self.mark},
        )

    def finish(self, *more: str) -> list[str]:
        """Run to the end. Returns the lines that it printed on standard error."""
        process = self.start(*more)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        return errors.splitlines()

    def stop(self, number: int, when: Callable[[subprocess.Popen[str]], None], *more: str) -> tuple[int, list[str]]:
        """Start, wait until it is time, send a signal. Returns the exit code and the last lines."""
        process = self.start(*more)
        when(process)
        assert process.poll() is None, "the run was over before it was time to stop it"
        process.send_signal(number)
        _, errors = process.communicate()
        return process.returncode, errors.splitlines()

    def result(self) -> tuple[bytes, bytes]:
        """What must be equal to the last byte."""
        return (self.path / "metrics.jsonl").read_bytes(), (self.path / "samples.jsonl").read_bytes()

    def steps(self, journal: str = "metrics.jsonl") -> list[int]:
        return [json.loads(line)["step"] for line in (self.path / journal).read_text().splitlines()]

    def processes(self) -> list[str]:
        """Names of the processes that belong to it, but for Ray's agents."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}\0".encode() in (process / "environ").read_bytes():
                    found.append((process / "comm").read_text().strip())
            except OSError:  # it ended meanwhile, or is not ours
                continue
        return [name for name in found if name not in AGENTS]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run. The base model that it trains serves all others."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "config.yaml").write_text(CONFIG)
    run = Run(folder, "reference")
    lines = run.finish()
    assert run.steps() == list(range(STEPS + 1))
    assert run.result()[1]
    assert [line for line in lines if "Traceback" in line] == []
    return run


@pytest.fixture
def run(reference: Run, request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run(reference.folder, request.node.name.translate(str.maketrans("[]", "--")).strip("-"))
    yield run
    # Ray's processes notice the end of a killed run by themselves, but take a moment.
    until(lambda: not run.processes())


def until(condition: Callable[[], bool]) -> None:
    """Look again and again until the condition holds; the test's time limit ends it."""
    while not condition():
        time.sleep(0.001)


def after_line(start: str, ticks: int = 0) -> Callable[[subprocess.Popen[str]], None]:
    """When a line with this beginning was printed, and so much CPU time was spent since."""

    def wait(process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        found = next((line for line in process.stderr if line.startswith(start)), None)
        assert found, f"no line begins with {start!r}"
        enough = cpu_ticks(process) + ticks
        until(lambda: cpu_ticks(process) >= enough)

    return wait


def cpu_ticks(process: subprocess.Popen[str]) -> int:
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 10**9
    return int(fields[11]) + int(fields[12])


def committed(run: Run) -> int:
    latest = RunDirectory(run.path).latest()
    assert latest is not None
    return step_of(latest)


def test_stopped_in_the_middle_of_a_step_by_every_signal(run: Run, reference: Run) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        code, lines = run.stop(number, after_line("step ", INTO_A_STEP))
        assert code == 128 + number
        assert lines.pop() == f"stopped; the same command continues after step-{committed(run):06d}"
        # All else that was printed are steps that ended before the signal came.
        assert [line for line in lines if not line.startswith("step ")] == []
        assert run.steps() == list(range(committed(run) + 1))
    code, _ = run.stop(signal.SIGKILL, after_line("step ", INTO_A_STEP))
    assert code == -signal.SIGKILL
    with open(run.path / "metrics.jsonl", "a") as journal:
        journal.write('{"step": 9, "half a li')
    done = committed(run)
    assert 2 <= done < STEPS
    first, second, *_ = run.finish()
    assert first == f"spell {run.name}: {STEPS} steps, {done} done"
    assert second.startswith(f"step {done + 1}/{STEPS}  ")
    assert run.result() == reference.result()
    assert run.steps("timings.jsonl") == list(range(STEPS + 1))


def test_killed_in_the_middle_of_a_commit(run: Run, reference: Run) -> None:
    for event, path, times, kept in [
        ("os.rename", "/.loop.json.tmp", 1, []),  # the actors are written, the loop is not
        ("os.rename", "/.staging", 1, []),  # all is written, but does not count yet
        ("os.rename", "/.staging", 3, [0, 1]),
        ("os.rename", "/.manifest.json.tmp", 1, [0, 1]),
        ("shutil.rmtree", "/step-000000", 1, [0, 1, 2]),  # step 2 counts, and the oldest is yet to be removed
    ]:
        process = run.start(program=["-c", KILLED_AT, str(ROOT), event, path, str(times)])
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert sorted(int(found.name[-6:]) for found in run.path.glob("checkpoints/step-*")) == kept
        assert (run.path / "checkpoints" / ".staging").exists() == (event == "os.rename")
    run.finish()
    assert run.result() == reference.result()
    assert sorted(found.name for found in run.path.glob("checkpoints/*")) == ["step-000005", "step-000006"]


def test_killed_between_two_commits(run: Run, reference: Run) -> None:
    run.options = [f"checkpoint_every={STEPS}"]
    run.stop(signal.SIGKILL, after_line(f"step 2/{STEPS}", INTO_A_STEP))
    assert committed(run) == 0
    # Steps 1 and 2 at least, on a fast machine more, were done, but not committed, so they are done again.
    assert [0, 1, 2] <= run.steps() == list(range(len(run.steps()))) < list(range(STEPS + 1))
    assert run.finish()[1].startswith(f"step 1/{STEPS}  ")
    assert run.result() == reference.result()


def test_stopped_while_the_base_model_is_trained(reference: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((reference.folder / "config.yaml").read_text())
    run, bases = Run(tmp_path, "base"), tmp_path / "runs" / "bases"
    begun = after_line("ledger base model, ", INTO_A_STEP)
    run.stop(signal.SIGKILL, begun)
    left = set(bases.iterdir())
    assert [path.name for path in left if not path.name.startswith(".")] == []
    code, lines = run.stop(signal.SIGINT, begun)
    assert code == 128 + signal.SIGINT
    assert lines == ["stopped; the same command begins anew, nothing is committed yet"]
    assert set(bases.iterdir()) == left
    assert not run.path.exists()


@pytest.mark.ray
def test_a_whole_run_on_ray_is_the_same(run: Run, reference: Run) -> None:
    run.finish("transport=ray")
    assert run.result() == reference.result()


@pytest.mark.ray
def test_a_run_may_move_to_ray_and_be_stopped_there(run: Run, reference: Run) -> None:
    run.stop(signal.SIGKILL, after_line("step ", INTO_A_STEP))
    code, lines = run.stop(signal.SIGTERM, after_line("step "), "transport=ray")
    assert code == 128 + signal.SIGTERM
    assert lines.pop() == f"stopped; the same command continues after step-{committed(run):06d}"
    assert [line for line in lines if not line.startswith("step ")] == []
    run.stop(signal.SIGKILL, after_line("step "), "transport=ray")
    until(lambda: not run.processes())
    run.finish()
    assert run.result() == reference.result()
