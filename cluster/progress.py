"""What a person sees of a running loop: a live display on a terminal, one plain line per step elsewhere."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

STEPS_FOR_ETA = 50
"""The remaining time is estimated from this many steps, the latest ones."""


def short(value: float, digits: int = 2) -> str:
    """A number for reading: `0.52`, `1,234`, `2.5e-06`; at least `digits` significant digits are kept."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.{digits}g}"
    if abs(value) < 0.001:
        return f"{value:.{digits}g}"
    return f"{value:.{max(2, digits - 1 - math.floor(math.log10(abs(value))))}f}"


class Progress:
    """Shows how far a loop is, on standard error. Used as a context manager, which always closes the display.

    title: what runs; total: the number of the last step; done: steps that are committed already.
    headline: names of the metrics to show. console: where to show them; clock: seconds, for tests.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        headline: Sequence[str] = (),
        console: "Console | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = _one_line(title)
        self.total = total
        self.done = done
        self._headline = dict.fromkeys(headline, "")
        self._console = console if console is not None else _stderr_console()
        self._clock = clock
        self._started = self._last = clock()
        self._durations: deque[float] = deque(maxlen=STEPS_FOR_ETA)
        self._tokens_per_s = ""
        self._activity = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._started = self._last = self._clock()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = self._start_display()
        else:
            done = f", {self.done} done" if self.done else ""
            self._line(f"{self.title}: {self.total} steps{done}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._activity = ""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def step(self, index: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Step `index` was committed; step 0 is the state before the first update."""
        now = self._clock()
        if index > self.done:
            # Some say only now and then how far they are.
            self._durations.append((now - self._last) / (index - max(self.done, 0)))
        self._last, self.done, self._activity = now, index, ""
        shown = {name: short(metrics[name]) for name in self._headline if name in metrics}
        self._headline.update(shown)
        self._tokens_per_s = _rate(timings)
        if self._live is None:
            self._line(self._plain_line(shown))
        else:
            self._live.refresh()

    def note(self, text: str) -> None:
        """Say something in one line, above the display."""
        self._line(text)

    def activity(self, text: str) -> None:
        """Say what the running step is doing; seen on a terminal only, until the step is committed."""
        self._activity = _one_line(text)

    def eta(self) -> str:
        """Time to the last step as h:mm:ss, from the steps since it was opened; `-` before there is one."""
        if not self._durations:
            return "-"
        # The first step also pays for loading and compiling; it counts only while it is the only one.
        durations = list(self._durations)[1:] or list(self._durations)
        seconds = sum(durations) / len(durations) * max(0, self.total - self.done)
        return str(timedelta(seconds=round(seconds)))

    def _plain_line(self, shown: Mapping[str, str]) -> str:
        parts = [f"step {self.done}/{self.total}", *(f"{name} {value}" for name, value in shown.items())]
        return "  ".join([*parts, *([self._tokens_per_s] if self._tokens_per_s else []), f"ETA {self.eta()}"])

    def _line(self, text: str) -> None:
        if self._live is None:
            # Not through rich, which wraps at a guessed width when there is no terminal.
            print(_one_line(text), file=self._console.file, flush=True)
        else:
            self._console.print(_one_line(text), markup=False, highlight=False, soft_wrap=True)

    def _start_display(self) -> "Live":
        from rich.live import Live

        live = Live(
            get_renderable=self.__rich__,
            console=self._console,
            refresh_per_second=4,
            # The display lives on standard error: output that was sent elsewhere must still get there.
            redirect_stdout=sys.stdout.isatty(),
        )
        live.start(refresh=True)
        return live

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=max(1, self.total), completed=self.done, width=20),
            *(Text(part) for part in (f"{self.done}/{self.total}", self._time(), self._tokens_per_s)),
        )
        values = "   ".join(f"{name} {value}" for name, value in self._headline.items() if value)
        lines = [Text(values)] if values else []
        if self._activity:
            waited = timedelta(seconds=int(self._clock() - self._last))
            lines.append(Text(f"{self._activity}  ({waited})", style="dim", overflow="ellipsis", no_wrap=True))
        return Group(Text(self.title, style="bold", overflow="ellipsis", no_wrap=True), bar, *lines)

    def _time(self) -> str:
        if self.done >= self.total:
            return f"done in {timedelta(seconds=round(self._last - self._started))}"
        return f"ETA {self.eta()}"


def _stderr_console() -> "Console":
    from rich.console import Console

    # Environment variables may make rich take a log file for a terminal; the stream itself knows better.
    return Console(stderr=True, force_terminal=sys.stderr.isatty())


def _rate(timings: Mapping[str, float]) -> str:
    rate = timings.get("tokens_per_s")
    return "" if rate is None else f"{short(round(rate))} tokens/s"


def _one_line(text: str) -> str:
    """The text without line breaks and control characters, which may come from model output."""
    return "".join(char if char.isprintable() else " " for char in text).strip()
