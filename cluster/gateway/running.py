"""Gateways that run on this machine: who they are, and how to stop one."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.run_directory import held, write_atomically
from protocols.errors import BadInput, DeadlineExceeded

GATEWAY_FILE = "gateway.json"
SERVING = "serving at "
POLL = 0.1


@dataclass(frozen=True)
class Running:
    """A run whose gateway answers."""

    run: str
    pid: int
    address: str
    http: str


@contextlib.contextmanager
def logged(file: Path) -> Iterator[None]:
    """Write the gateway's log lines into a file as well."""
    logger = logging.getLogger("repertory.gateway")
    logger.setLevel(logging.INFO)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    # On the console they would tear the display of a run.
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def noted(folder: Path, address: str, http: str) -> Iterator[None]:
    """Leave in a run's folder where its gateway is while it is up."""
    file = folder / GATEWAY_FILE
    here = {"pid": os.getpid(), "host": socket.gethostname()}
    write_atomically(file, json.dumps({**here, "address": address, "http": http}))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def running(runs_dir: Path) -> list[Running]:
    """The runs in a folder whose gateway is up."""
    found = []
    for file in sorted(runs_dir.glob(f"*/{GATEWAY_FILE}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            noted = json.loads(file.read_text("utf-8"))
            one = Running(file.parent.name, int(noted["pid"]), str(noted["address"]), str(noted.get("http", "")))
            # Not by the process alone: its number may be another's by now.
            if noted["host"] == socket.gethostname() and held(file.parent):
                found.append(one)
    return found


def stop(runs_dir: Path, run: str, deadline_s: float) -> Running:
    """Tell a run to end, and wait until it has. Raises BadInput when it is not up, DeadlineExceeded when it stays."""
    up = {one.run: one for one in running(runs_dir)}
    if run not in up:
        known = ", ".join(up) or "none"
        raise BadInput(f"stop: no run {run!r} with a gateway is up in {runs_dir}; up: {known}")
    try:
        os.kill(up[run].pid, signal.SIGTERM)
    except PermissionError:
        raise BadInput(f"stop: {run} (process {up[run].pid}) belongs to another user") from None
    until = time.monotonic() + deadline_s
    while held(runs_dir / run):
        if time.monotonic() > until:
            raise DeadlineExceeded(f"{run} (process {up[run].pid}) did not end within {deadline_s:g} s")
        time.sleep(POLL)
    return up[run]


def detach(command: list[str]) -> int:
    """Start a command that serves and let it go on alone once it says so. Returns 0, or the code that it ended with.

    What it says later goes to the log that is named.
    """
    with tempfile.NamedTemporaryFile("w+", prefix="repertory-serve-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        said = Path(log.name)
    try:
        while SERVING not in (text := said.read_text("utf-8")):
            if (code := process.poll()) is not None:
                sys.stderr.write(said.read_text("utf-8"))
                said.unlink()
                return code
            time.sleep(POLL)
    except BaseException:
        # Ctrl-C: it is in a session of its own, where that does not reach it.
        process.terminate()
        raise
    line = next(line for line in text.splitlines() if SERVING in line)
    print(f"{line.partition(';')[0]}; `launch.py stop` ends it, {said} is its log", file=sys.stderr)
    return 0
