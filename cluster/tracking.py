"""Copies each committed step to Weights & Biases. metrics.jsonl is the record; this is a view of it."""

import contextlib
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from protocols.errors import BadInput, Unavailable

TrackingMode = Literal["disabled", "offline", "online"]
"""`offline` keeps the records in RUN/wandb, from where `wandb sync` uploads them later."""

UPLOAD_SECONDS = 120.0
"""How long closing an online run waits for the rest of its data to be uploaded."""

logger = logging.getLogger(__name__)


class Tracker:
    """Receives the metrics of committed steps. This one keeps nothing: tracking is off."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step. Steps come in rising order; one that is there already is left out."""

    def close(self) -> None:
        """Flush, and end what the tracker started; nothing is recorded after it. May be called again."""


class WandbTracker(Tracker):
    """Records into one wandb run, and never stops the training run: its failures become one warning."""

    def __init__(self, run: Any) -> None:
        self._run: Any | None = run
        self._next_step = int(run.starting_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step at wandb's own step of the same number."""
        # wandb cannot rewrite its history, and would print a warning for every step that goes back.
        if self._run is None or step < self._next_step:
            return
        with self._forgiving():
            self._run.log(dict(metrics), step=step, commit=True)
        self._next_step = step + 1

    def close(self) -> None:
        """Finish the run and end wandb's service process; waits at most `UPLOAD_SECONDS` for an upload."""
        if self._run is not None:
            with self._forgiving():
                self._run.finish()
            self._leave()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        # wandb is a second view: its service, the disk or the network may fail in ways that no list of
        # exception types covers, and none of them may cost a training run.
        except Exception as error:  # noqa: BLE001
            what = f"{type(error).__name__}: {error}"
            logger.warning("wandb failed (%s); the run goes on without it, metrics.jsonl has every step", what)
            self._leave()

    def _leave(self) -> None:
        self._run = None
        _end_service()


def open_tracker(mode: TrackingMode, run_dir: Path, project: str, name: str, config: dict[str, Any]) -> Tracker:
    """Open the tracker of a run directory; the same directory continues the same wandb run.

    Raises BadInput when wandb refuses what it was given (`online` without an API key, a project name
    that it cannot use), and Unavailable when it cannot be reached. Never asks on the terminal.
    """
    if mode == "disabled":
        return Tracker()
    import wandb

    try:
        # Takes effect for the whole process before the first message: init's own settings come too late.
        wandb.setup(settings=wandb.Settings(silent=True, console="off", mode=mode))
        if mode == "online":
            _check_login(wandb)
        return WandbTracker(_start(wandb, mode, run_dir, project, name, config))
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        _end_service()
        raise BadInput(f"wandb: refused: {error}") from error
    except wandb.errors.Error as error:
        _end_service()
        raise Unavailable(f"wandb: did not start in mode {mode!r}: {error}") from error
    except BaseException:
        _end_service()
        raise


def _check_login(wandb: Any) -> None:
    if not wandb.login(prompt=False, verify=False):
        raise BadInput(
            "wandb: got 'online', but there is no API key; expected one in the environment variable WANDB_API_KEY"
            " (or run `wandb login` once), or wandb=offline or wandb=disabled"
        )


def _start(wandb: Any, mode: TrackingMode, run_dir: Path, project: str, name: str, config: dict[str, Any]) -> Any:
    settings = wandb.Settings(
        silent=True,
        console="off",
        finish_timeout=UPLOAD_SECONDS,
        finish_timeout_raises=True,
        # One helper process less; offline runs are the default and mostly stay where they are.
        x_disable_stats=mode == "offline",
    )
    return wandb.init(
        mode=mode,
        dir=str(run_dir),
        project=project,
        name=name,
        id=_run_id(run_dir),
        resume="allow",
        reinit="create_new",
        config=config,
        allow_val_change=True,
        settings=settings,
    )


def _run_id(run_dir: Path) -> str:
    """The directory's name and a random part that is kept in it.

    The random part keeps a new run apart from an older one of the same name, which wandb would continue.
    """
    path = run_dir / "wandb" / "id.txt"
    if path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_dir.resolve().name)[:40]
    run_id = f"{stem}-{secrets.token_hex(4)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _end_service() -> None:
    """End wandb's service process now, not when the interpreter exits."""
    import wandb

    # The process is thrown away here; how it goes is of no interest to a run.
    with contextlib.suppress(Exception):
        wandb.teardown()
