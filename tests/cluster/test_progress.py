import io
import math
from collections.abc import Callable

import pytest
from rich.console import Console

from cluster.progress import Progress, short

SHOW_CURSOR = "\x1b[?25h"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(**options: object) -> tuple[Progress, Clock, Callable[[], list[str]]]:
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, force_terminal=False, width=20)
    progress = Progress("spell demo", 40, console=console, clock=clock, **options)  # type: ignore[arg-type]
    return progress, clock, lambda: stream.getvalue().split("\n")[:-1]


def terminal(stream: io.StringIO, clock: Clock) -> Progress:
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    return Progress("spell demo", 4, headline=["reward", "gold"], console=console, clock=clock)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5234, "0.52"),
        (1, "1"),
        (0.05234, "0.052"),
        (-0.6, "-0.60"),
        (12.345, "12.35"),
        (1234.5, "1,234"),
        (2e-6, "2e-06"),
        (0, "0"),
        (1e20, "1e+20"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_more_digits_on_request() -> None:
    assert [short(value, 3) for value in (0.5234, 12.345, 128.814)] == ["0.523", "12.35", "128.81"]


def test_without_a_terminal_each_step_is_one_plain_line() -> None:
    progress, clock, lines = plain(headline=["reward", "eval/gold"])
    with progress:
        progress.step(0, {"eval/gold": 0.61}, {})
        for index, seconds in ((1, 30.0), (2, 2.0), (3, 2.0)):
            progress.activity("answering")
            clock.now += seconds
            progress.step(index, {"reward": 0.5 + index / 100}, {"tokens_per_s": 1234.4})
    assert lines() == [
        "spell demo: 40 steps",
        "step 0/40  eval/gold 0.61  ETA -",
        "step 1/40  reward 0.51  1,234 tokens/s  ETA 0:19:30",
        # From the second step on the first, which loads and compiles, no longer counts.
        "step 2/40  reward 0.52  1,234 tokens/s  ETA 0:01:16",
        "step 3/40  reward 0.53  1,234 tokens/s  ETA 0:01:14",
    ]


def test_after_a_resume_the_remaining_time_counts_this_session_only() -> None:
    progress, clock, lines = plain(done=30)
    with progress:
        clock.now += 6
        progress.step(31, {}, {})
    assert lines() == ["spell demo: 40 steps, 30 done", "step 31/40  ETA 0:00:54"]


def test_each_line_is_flushed_at_once() -> None:
    class Stream(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed = len(self.getvalue())

    stream = Stream()
    with Progress("run", 2, console=Console(file=stream, force_terminal=False)) as progress:
        progress.step(1, {}, {})
        assert stream.flushed == len(stream.getvalue()) > 0


def test_a_note_is_one_line_without_control_characters() -> None:
    progress, _, lines = plain()
    with progress:
        progress.note("a [bold]note[/bold] \x1b[31mred\r\nof a model")
    assert lines()[1] == "a [bold]note[/bold]  [31mred  of a model"


def test_an_error_passes_and_leaves_plain_output_usable() -> None:
    progress, _, lines = plain()
    with pytest.raises(KeyboardInterrupt), progress:
        raise KeyboardInterrupt
    progress.note("after")
    assert lines()[-1] == "after"


def test_a_terminal_gets_a_live_display() -> None:
    stream, clock = io.StringIO(), Clock()
    with terminal(stream, clock) as progress:
        progress.step(1, {"reward": 0.5, "gold": 0.61}, {"tokens_per_s": 99})
        clock.now += 5
        progress.step(2, {"reward": 0.52}, {"tokens_per_s": 1234})
        progress.note("a [bold]note[/bold]")
        assert "2/4  ETA 0:00:10  1,234 tokens/s" in stream.getvalue()
        # A metric that is measured on some steps only stays in sight.
        assert "reward 0.52   gold 0.61" in stream.getvalue()
        assert "a [bold]note[/bold]\n" in stream.getvalue()
    assert stream.getvalue().endswith(SHOW_CURSOR)


def test_the_display_says_what_the_step_is_doing() -> None:
    clock = Clock()
    progress = terminal(io.StringIO(), clock)
    page = Console(file=io.StringIO(), width=100, record=True)
    clock.now += 65
    progress.activity("answering 12 of 24 questions")
    page.print(progress)
    progress.step(4, {}, {})
    page.print(progress)
    before, after = page.export_text().split("answering 12 of 24 questions  (0:01:05)")
    assert "0/4  ETA -" in before
    assert "4/4  done in 0:01:05" in after


def test_the_display_fits_a_narrow_terminal() -> None:
    progress = terminal(io.StringIO(), Clock())
    page = Console(file=io.StringIO(), width=40, record=True)
    progress.step(1, {"reward": 0.5, "gold": 0.7}, {"tokens_per_s": 1234})
    page.print(progress)
    assert all(len(line) <= 40 for line in page.export_text().split("\n"))


def test_the_live_display_is_closed_by_an_interrupt() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), terminal(stream, Clock()):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith(SHOW_CURSOR)


def test_a_log_file_gets_plain_lines_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Progress("run", 1) as progress:
        progress.step(1, {}, {})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "run: 1 steps\nstep 1/1  ETA 0:00:00\n"
