"""launch.py serve, status and stop, as an operator uses them."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import launch
from cluster.gateway import running
from protocols.client import connect
from protocols.messages import Prompt, SamplingParams
from protocols.policy import PolicyService, SampleRequest

ROOT = Path(launch.__file__).parent
pytestmark = pytest.mark.slow


@dataclass
class Served:
    """A process that serves, and where."""

    process: "subprocess.Popen[str]"
    address: str
    http: str


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    keys = ["policy.threads=1", "address=127.0.0.1:0", "gateway.http=127.0.0.1:0"]
    command = [sys.executable, ROOT / "launch.py", "serve", *keys]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        host = r"://127\.0\.0\.1:\d+"
        found = re.fullmatch(rf"serving at (grpc{host}) and (http{host}/v1); Ctrl-C stops\n", line)
        assert found, line + process.stderr.read()
        yield Served(process, found[1], found[2])
        process.kill()


def launched(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, ROOT / "launch.py", *words], cwd=folder, capture_output=True, text=True)


async def test_status_and_stop_finish_what_is_under_way(served: Served, tmp_path: Path) -> None:
    shown = launched(tmp_path, "status").stdout
    assert shown.split() == ["serve", served.address, served.http, "process", str(served.process.pid)]
    policy = connect(served.address, PolicyService, tries=1)
    request = SampleRequest(prompts=[Prompt(text="The text says", seed=1)], params=SamplingParams(max_tokens=900))
    stream = policy.stream(request)
    tokens = (await anext(stream)).tokens.tolist()
    stopping = asyncio.ensure_future(asyncio.to_thread(launched, tmp_path, "stop", "serve"))
    async for delta in stream:
        tokens += delta.tokens.tolist()
        finish = delta.finish_reason
    assert finish is not None
    stopped = await stopping
    assert (stopped.returncode, stopped.stdout) == (0, "serve has ended\n")
    assert served.process.wait() == 0
    assert not (tmp_path / "runs" / "serve" / "gateway.json").exists()
    log = (tmp_path / "runs" / "serve" / "gateway.log").read_text()
    assert "caller=anyone method=PolicyService.stream code=OK" in log
    assert launched(tmp_path, "status").stdout == ""


async def test_detached_it_outlives_whoever_started_it(tmp_path: Path) -> None:
    keys = ["policy.threads=1", "address=127.0.0.1:0", "gateway.http="]
    started = launched(tmp_path, "serve", "--detach", *keys)
    assert started.returncode == 0, started.stderr
    found = re.fullmatch(
        r"serving at (grpc://127\.0\.0\.1:\d+); `launch\.py stop` ends it, (\S+) is its log\n", started.stderr
    )
    assert found, started.stderr
    log = Path(found[2])
    try:
        policy = connect(found[1], PolicyService, tries=1)
        request = SampleRequest(prompts=[Prompt(text="The text says", seed=1)], params=SamplingParams(max_tokens=4))
        assert len((await policy.sample(request)).results) == 1
        assert launched(tmp_path, "status").stdout.split()[:3] == ["serve", found[1], "-"]
        assert launched(tmp_path, "stop", "serve").returncode == 0
        assert log.read_text().splitlines()[-1] == "stopped"
    finally:
        log.unlink()
    failed = launched(tmp_path, "serve", "--detach", "model=nowhere/at/all")
    assert failed.returncode == launch.BAD_INPUT
    assert failed.stderr.startswith("error: ") and "'nowhere/at/all' does not exist" in failed.stderr


def test_ctrl_c_while_it_comes_up_leaves_nobody_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def poll(self) -> int | None:
            nonlocal child
            if child is not None:
                return super().poll()
            child = self
            raise KeyboardInterrupt

    child: subprocess.Popen[bytes] | None = None
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.detach([sys.executable, "-c", "import time; time.sleep(600)"])
    assert child is not None
    assert child.wait() == -signal.SIGTERM


def test_what_an_older_gateway_or_nobody_has_noted_is_no_failure(tmp_path: Path) -> None:
    for name, noted in (("old", '{"pid": 1}'), ("list", "[]"), ("none", "")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "gateway.json").write_text(noted)
    shown = launched(tmp_path, "status")
    assert (shown.returncode, shown.stdout) == (0, "")


def test_a_plan_of_serving_serves_nothing(tmp_path: Path) -> None:
    shown = launched(tmp_path, "plan", "serve", "--detach")
    assert shown.returncode == launch.BAD_INPUT
    assert "--detach" in shown.stderr


async def test_ctrl_c_and_again(served: Served, tmp_path: Path) -> None:
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait() == 0
    assert served.process.stderr is not None
    assert served.process.stderr.read() == "stopped\n"
    other = launched(tmp_path, "stop", "serve")
    assert other.returncode == launch.BAD_INPUT
    assert other.stderr == "error: stop: no run 'serve' with a gateway is up in runs; up: none\n"


def test_a_gateway_that_was_killed_is_not_up(served: Served, tmp_path: Path) -> None:
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.wait()
    assert (tmp_path / "runs" / "serve" / "gateway.json").exists()
    assert launched(tmp_path, "status").stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attach=first"], "attach: the actors of another run are reached through Ray; set transport=ray"),
        (["adress=127.0.0.1:1"], "adress: unknown key"),
        (["address=0.0.0.0:1"], "0.0.0.0 is reached from other machines; set tls"),
        (["gateway.tokens=nowhere.yaml"], "tokens: cannot read nowhere.yaml"),
        (["model=nowhere/at/all"], "model: 'nowhere/at/all' does not exist"),
    ],
)
def test_what_cannot_be_served_is_said_and_leaves_nothing(words: list[str], message: str, tmp_path: Path) -> None:
    done = launched(tmp_path, "serve", "address=127.0.0.1:0", "gateway.http=127.0.0.1:0", *words)
    assert done.returncode == launch.BAD_INPUT
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_address_that_is_taken(served: Served, tmp_path: Path) -> None:
    address = served.address.removeprefix("grpc://")
    done = launched(tmp_path, "serve", f"address={address}", "run=second")
    assert done.returncode == launch.BAD_INPUT
    assert f"gateway.address: cannot listen at {address}" in done.stderr
    assert not (tmp_path / "runs" / "second").exists()
