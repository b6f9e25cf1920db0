"""Builds RUN/report.html: one self-contained page with a run's curves, settings, times and sampled texts.

A method may write two files into its run directory that shape the page:
summary.json   {"title": str, "rows": [{"name", "before", "after", "note"}], "notes": [str]}
panels.json    {"Loop reward and truth": ["reward/responder", "eval/gold"], ...}: plots that stand first,
               in this order, with these metrics side by side.
A row of its samples.jsonl may hold `tokens`, `values` and more: the viewer then colours the reply's tokens by their
values (`cluster.report_samples.token_values`).
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.progress import short
from cluster.report_curves import Plot, curves_of, draw, group_plots, panel_plots
from cluster.report_samples import Samples, choose_samples
from protocols.errors import BadInput

FIRST_GROUPS = ("eval", "reward", "audit")
"""Groups of metrics that stand before the others, which follow in the order of their first appearance."""
SMALL, LARGE = (3.6, 1.9), (5.4, 2.4)
"""Sizes of a plot, in inches of 72 SVG units."""
MOST_FAULTS = 6
"""The page names this many metrics that were not finite."""


@dataclass
class RunRecord:
    """What was found in a run directory. `warnings` says what could not be read."""

    name: str
    config: dict[str, Any]
    metrics: dict[int, dict[str, float]]
    timings: dict[int, dict[str, float]]
    summary: dict[str, Any]
    panels: dict[str, list[str]]
    samples: Samples
    warnings: list[str] = field(default_factory=list)


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run directory, replacing an older one at once, and return its path.

    A run that has not begun, or was killed in the middle of a line, gives a page that says so.
    Raises BadInput when the directory does not exist.
    """
    if not run_dir.is_dir():
        raise BadInput(f"run directory: got {str(run_dir)!r}; expected an existing directory")
    page = render(read_run(run_dir))
    path = run_dir / "report.html"
    draft = run_dir / f".report.html.{os.getpid()}"
    try:
        # A lone surrogate in a model's text has no UTF-8 form.
        draft.write_text(page, encoding="utf-8", errors="replace")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory; whatever is missing or broken is left out."""
    warnings: list[str] = []
    summary = _mapping(run_dir / "summary.json", json.loads, warnings)
    panels = _mapping(run_dir / "panels.json", json.loads, warnings)
    run = RunRecord(
        name=run_dir.resolve().name,
        config=_mapping(run_dir / "config.yaml", yaml.safe_load, warnings),
        metrics=read_steps(run_dir / "metrics.jsonl", warnings),
        timings=read_steps(run_dir / "timings.jsonl", warnings),
        summary=summary,
        panels={title: [str(n) for n in names] for title, names in panels.items() if isinstance(names, list)},
        samples=choose_samples(run_dir / "samples.jsonl"),
        warnings=warnings,
    )
    if run.samples.unreadable:
        warnings.append(f"samples.jsonl: {run.samples.unreadable} unreadable line(s) left out")
    warnings.extend(_not_finite(run.metrics))
    return run


def read_steps(path: Path, warnings: list[str]) -> dict[int, dict[str, float]]:
    """Step -> its numbers, from a file of JSON lines; of two lines for one step the later counts."""
    rows: dict[int, dict[str, float]] = {}
    broken: list[int] = []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line or "{}")
            numbers = {name: float(value) for name, value in row.items() if _is_number(value)}
            rows[int(numbers.pop("step"))] = numbers
        except (ValueError, AttributeError, KeyError, OverflowError):
            broken += [number] if line.strip() else []
    if broken:
        why = "; a killed writer leaves the last line incomplete" if broken[-1] == len(lines) else ""
        warnings.append(f"{path.name}: {_listed('line', broken)} left out as unreadable{why}")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mapping(path: Path, parse: Callable[[str], Any], warnings: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, yaml.YAMLError) as error:
        warnings.append(f"{path.name}: cannot be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(value, dict):
        warnings.append(f"{path.name}: expected a mapping, found {type(value).__name__}")
        return {}
    return {str(key): entry for key, entry in value.items()}


def _not_finite(rows: Mapping[int, Mapping[str, float]]) -> list[str]:
    where: dict[str, list[int]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            if not math.isfinite(value):
                where.setdefault(name, []).append(step)
    found = [f"{name} is NaN or infinite at {_listed('step', steps)}" for name, steps in where.items()]
    return found[:MOST_FAULTS] + [f"and {len(found) - MOST_FAULTS} more metrics"] * (len(found) > MOST_FAULTS)


def _listed(noun: str, numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"{noun} {shown}" if len(numbers) == 1 else f"{len(numbers)} {noun}s ({shown})"


def render(run: RunRecord) -> str:
    """The page as HTML text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["csp_hash"] = _csp_hash
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    steps = run.config.get("steps")
    return environment.from_string(template).render(
        run=run,
        method=str(run.config.get("method", "")),
        title=str(run.summary.get("title", "")),
        done=max(run.metrics, default=None),
        steps=steps if isinstance(steps, int) and not isinstance(steps, bool) else None,
        notes=_notes(run.summary),
        rows=summary_rows(run.summary),
        plots=_drawings(run),
        config=config_blocks(run.config),
        timings=timing_rows(run.timings),
        samples=run.samples,
    )


def _csp_hash(script: str) -> str:
    """The browser runs the one script with this hash, and no other that a text might smuggle in."""
    import base64
    import hashlib

    return base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _notes(summary: Mapping[str, Any]) -> list[str]:
    notes = summary.get("notes") or []
    return [str(note) for note in notes] if isinstance(notes, list) else [str(notes)]


def summary_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """name, before, after, change and note of each row, as text."""
    given = summary.get("rows")
    return [_summary_row(row) for row in given if isinstance(row, dict)] if isinstance(given, list) else []


def _summary_row(row: Mapping[str, Any]) -> dict[str, str]:
    before, after = row.get("before"), row.get("after")
    return {
        "name": str(row.get("name", "")),
        "before": _cell(before),
        "after": _cell(after),
        "change": _change(before, after),
        "note": _cell(row.get("note")),
    }


def _change(before: Any, after: Any) -> str:
    if not (_is_number(before) and _is_number(after)):
        return ""
    change = after - before
    return f"{change:+,.0f}" if abs(change) >= 1000 else f"{change:+.3g}"


def _cell(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return short(value, 3)
    return "" if value is None else str(value)


def _drawings(run: RunRecord) -> dict[str, list[tuple[Plot, str]]]:
    """The plots of the page's three places, each with its SVG."""
    curves = curves_of(run.metrics)
    places = {
        "panels": panel_plots(curves, run.panels) if curves else [],
        "metrics": group_plots(curves.values(), FIRST_GROUPS),
        "timings": group_plots(curves_of(run.timings).values()),
    }
    span = (min(run.metrics, default=0), max(run.metrics, default=0))
    sizes = {"panels": LARGE}
    return {
        place: [(plot, draw(plot, span, sizes.get(place, SMALL))) for plot in plots]
        for place, plots in places.items()
    }


def config_blocks(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The configuration as blocks of plain values: (path of the block, [(key, value)]), outermost first."""
    return _blocks("", config)


def _blocks(path: str, config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    plain = [(str(key), _value(v)) for key, v in config.items() if not (isinstance(v, dict) and v)]
    blocks = [(path, plain)] if plain else []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            blocks += _blocks(f"{path}.{key}" if path else str(key), value)
    return blocks


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def timing_rows(timings: Mapping[int, Mapping[str, float]]) -> list[dict[str, str]]:
    """Median, smallest, largest and, for durations, total of each wall-clock value."""
    rows = []
    for name, curve in curves_of(timings).items():
        finite = curve.finite
        if finite:
            is_duration = name.endswith(("seconds", "_s")) and not name.endswith("per_s")
            row = {"median": statistics.median(finite), "smallest": min(finite), "largest": max(finite)}
            total = short(sum(finite), 3) if is_duration else ""
            rows.append({"name": name, **{k: short(v, 3) for k, v in row.items()}, "total": total})
    return rows
