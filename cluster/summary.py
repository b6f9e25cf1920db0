"""What a run comes to: the table at its end, and which metrics belong side by side."""

from pathlib import Path

from protocols.service import Message


class SummaryRow(Message):
    """One measure, before and after."""

    name: str
    """What was measured."""
    before: float | None = None
    """Its value at the start of the run."""
    after: float | None = None
    """Its value at the end."""
    note: str = ""
    """How it was measured."""


class Summary(Message):
    """The result of a run in few lines."""

    title: str
    """What was run."""
    rows: list[SummaryRow] = []
    """Measures before and after."""
    notes: list[str] = []
    """What a reader must know: warnings, reasons to stop, sizes."""
    panels: dict[str, list[str]] = {}
    """Title of a plot to the metrics that it shows together."""


def show_summary(folder: Path) -> None:
    """Print the summary of a run, if it has one."""
    file = folder / "summary.json"
    if not file.is_file():
        return
    from rich.console import Console
    from rich.table import Table

    summary = Summary.model_validate_json(file.read_text(encoding="utf-8"))
    table = Table("", "before", "after", "how", title=summary.title, title_justify="left")
    for row in summary.rows:
        table.add_row(row.name, _number(row.before), _number(row.after), row.note)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table if summary.rows else summary.title)
    for note in summary.notes:
        console.print(f"- {note}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
