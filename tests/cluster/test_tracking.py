import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cluster.tracking
from cluster.tracking import Tracker, WandbTracker, open_tracker
from protocols.errors import BadInput


class Run:
    """What the tracker needs of a wandb run."""

    def __init__(self, starting_step: int = 0, broken: str = "") -> None:
        self.starting_step = starting_step
        self.broken = broken
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def log(self, data: dict[str, float], *, step: int, commit: bool) -> None:
        if self.broken == "log":
            raise ConnectionResetError("Connection lost")
        assert commit
        self.logged.append((step, data))

    def finish(self) -> None:
        self.finished += 1
        if self.broken == "finish":
            raise TimeoutError("Timed out finishing run.")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each time that wandb's service is ended."""
    calls: list[str] = []
    monkeypatch.setattr(cluster.tracking, "_end_service", lambda: calls.append("ended"))
    return calls


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def services() -> list[str]:
    """Command lines of the wandb services that this process started."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:  # the process ended meanwhile
            continue
        if "wandb-core" in words[0] and str(os.getpid()) in words:
            lines.append(" ".join(words))
    return lines


def test_off_keeps_nothing_and_does_not_import_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.tracking import open_tracker\n"
        "tracker = open_tracker('disabled', Path(sys.argv[1]), 'project', 'name', {})\n"
        "tracker.log(1, {'reward': 0.5}); tracker.close(); assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_each_step_is_logged_once(ended: list[str]) -> None:
    run = Run(starting_step=2)
    tracker = WandbTracker(run)
    for step in (1, 2, 3, 3, 2, 4):
        tracker.log(step, {"reward": step / 10})
    assert run.logged == [(2, {"reward": 0.2}), (3, {"reward": 0.3}), (4, {"reward": 0.4})]
    tracker.close()
    tracker.close()
    tracker.log(5, {})
    assert (run.finished, len(run.logged), ended) == (1, 3, ["ended"])


def test_a_failure_while_logging_is_one_warning(ended: list[str], caplog: pytest.LogCaptureFixture) -> None:
    tracker = WandbTracker(Run(broken="log"))
    for step in range(3):
        tracker.log(step, {"reward": 0.5})
    tracker.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "ConnectionResetError: Connection lost" in caplog.text
    assert ended == ["ended"]


def test_a_failure_while_closing_is_one_warning(ended: list[str], caplog: pytest.LogCaptureFixture) -> None:
    tracker = WandbTracker(Run(broken="finish"))
    tracker.close()
    assert "Timed out finishing run." in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("no_key")
def test_online_without_a_key_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="WANDB_API_KEY"):
        open_tracker("online", tmp_path, "project", "name", {})
    assert not (tmp_path / "wandb").exists()
    assert services() == []


@pytest.mark.usefixtures("no_key")
def test_a_malformed_key_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(BadInput, match="WANDB_API_KEY invalid"):
        open_tracker("online", tmp_path, "project", "name", {})


@pytest.mark.usefixtures("no_key")
def test_offline_keeps_the_run_in_its_directory_and_continues_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the argument counts, not the environment
    run_dir = tmp_path / "ledger seed 0"
    run_dir.mkdir()
    ids = []
    for first in (0, 2):
        tracker = open_tracker("offline", run_dir, "project", "a name", {"policy": {"seed": 0}})
        assert services()
        for step in (first, first + 1, first, first + 2):
            tracker.log(step, {"reward": 0.5, "loss": float("nan")})
        tracker.close()
        assert services() == []
        ids.append((run_dir / "wandb" / "id.txt").read_text().strip())
    assert ids[0] == ids[1]
    assert ids[0].startswith("ledger-seed-0-")
    assert list(run_dir.glob(f"wandb/offline-run-*/run-{ids[0]}.wandb"))
    assert capfd.readouterr() == ("", "")


def test_a_tracker_that_is_off_is_a_tracker(tmp_path: Path) -> None:
    assert type(open_tracker("disabled", tmp_path, "project", "name", {})) is Tracker
