"""Curves of a report: which metrics share a plot, and a plot as inline SVG."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.progress import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES_COLORS = 8
"""Colours of the page's palette, --s0 to --s7; a ninth curve starts over with a dashed line."""
MOST_POINTS = 400
"""A longer curve is drawn as means of neighbouring steps, with a band from their minimum to maximum."""
MOST_MARKERS = 30
"""A curve of more points has markers only where a point stands alone; a sparse one may have twice as many."""

# matplotlib wants colours; the page wants variables that follow its light or dark mode. These go in, and
# are replaced in the SVG by `_style`.
INK, GRID = "#000001", "#000002"
SENTINELS = {INK: "var(--muted)", GRID: "var(--line)"} | {
    f"#0000{16 + i:02x}": f"var(--s{i})" for i in range(SERIES_COLORS)
}


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it was measured, in rising order; values may be NaN or infinite."""

    name: str
    steps: list[int]
    values: list[float]

    @property
    def finite(self) -> list[float]:
        """The values that can be drawn."""
        return [value for value in self.values if math.isfinite(value)]

    @property
    def course(self) -> str:
        """First and last value, for the legend."""
        ends = [self.values[0], self.values[-1]] if len(self.values) > 1 else self.values
        return " → ".join(short(value, 3) for value in ends)


@dataclass(frozen=True)
class Plot:
    """Curves on common axes. `labels` are the legend's names; `missing` names metrics without a value."""

    title: str
    curves: list[Curve]
    labels: list[str]
    missing: list[str]


def curves_of(rows: Mapping[int, Mapping[str, float]]) -> dict[str, Curve]:
    """Step -> metrics, turned into one curve per metric, in the order of their first appearance."""
    points: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            points.setdefault(name, []).append((step, value))
    return {name: Curve(name, [s for s, _ in found], [v for _, v in found]) for name, found in points.items()}


def panel_plots(curves: Mapping[str, Curve], panels: Mapping[str, Sequence[str]]) -> list[Plot]:
    """The plots that the method asked for: title -> metric names."""
    plots = []
    for title, names in panels.items():
        found = [curves[name] for name in names if name in curves]
        labels = [curve.name for curve in found]
        plots.append(Plot(title, found, labels, [name for name in names if name not in curves]))
    return plots


def group_plots(curves: Iterable[Curve], first: Sequence[str] = ()) -> list[Plot]:
    """All curves, group by group (the name before its first `/`); shares of similar size share a plot.

    The groups named in `first` come first, the others in the order of their first curve.
    """
    groups: dict[str, list[list[Curve]]] = {name: [] for name in first}
    for curve in curves:
        sets = groups.setdefault(_group(curve), [])
        home = next((known for known in sets if _belongs(curve, known)), None)
        if home is None:
            sets.append([curve])
        else:
            home.append(curve)
    return [_group_plot(found) for sets in groups.values() for found in sets]


def _group(curve: Curve) -> str:
    return curve.name.rpartition("/")[0].partition("/")[0]


def _group_plot(curves: list[Curve]) -> Plot:
    if len(curves) == 1:
        return Plot(curves[0].name, curves, [curves[0].name], [])
    group = _group(curves[0])
    labels = [curve.name.removeprefix(f"{group}/") for curve in curves]
    return Plot(group or ", ".join(labels), curves, labels, [])


def _belongs(curve: Curve, others: list[Curve]) -> bool:
    """Whether it can be read on the others' axes: rewards, shares, accuracies, none tiny beside another."""
    sizes = [max(map(abs, c.finite), default=math.inf) for c in [curve, *others]]
    return len(others) < 6 and max(sizes) <= 1 and all(size == 0 or size >= 0.2 * max(sizes) for size in sizes)


def draw(plot: Plot, span: tuple[int, int], inches: tuple[float, float]) -> str:
    """The plot as an SVG element; `span` is the first and last step of the run, the same for all plots."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text: smaller, and in the page's font. The salt makes the ids, and so the file, repeatable.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 8.0}):
        figure = Figure(figsize=inches)
        width, height = (72 * side for side in inches)
        axes = figure.add_axes((34 / width, 18 / height, 1 - 42 / width, 1 - 25 / height))
        for index, curve in enumerate(plot.curves):
            _draw_curve(axes, curve, index)
        _dress(axes, plot, span)
        return _svg_text(figure)


def _draw_curve(axes: "Axes", curve: Curve, index: int) -> None:
    color = f"#0000{16 + index % SERIES_COLORS:02x}"
    steps, values = (
        [float(step) for step in curve.steps],
        [v if math.isfinite(v) else math.nan for v in curve.values],
    )
    if len(steps) > MOST_POINTS:
        steps, values, low, high = _thinned(steps, values)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, clip_on=False)
    alone = [i for i in range(len(values)) if _is_alone(values, i)]
    sparse = curve.steps[-1] - curve.steps[0] > 2 * len(values)
    few = len(values) <= (2 * MOST_MARKERS if sparse else MOST_MARKERS)
    axes.plot(
        steps,
        values,
        color=color,
        linewidth=1.3,
        linestyle="--" if index >= SERIES_COLORS else "-",
        marker="o",
        markersize=3.0 if few else 2.4,
        markevery=None if few else alone,
        clip_on=False,
    )


def _is_alone(values: Sequence[float], i: int) -> bool:
    """No neighbour to draw a line to."""
    neighbours = [*values[max(0, i - 1) : i], *values[i + 1 : i + 2]]
    return math.isfinite(values[i]) and not any(math.isfinite(value) for value in neighbours)


def _thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Mean step, mean, minimum and maximum of neighbouring points; a bucket without a finite value is NaN."""
    size = math.ceil(len(steps) / MOST_POINTS)
    columns: tuple[list[float], list[float], list[float], list[float]] = ([], [], [], [])
    for start in range(0, len(steps), size):
        part = [value for value in values[start : start + size] if math.isfinite(value)] or [math.nan]
        where = steps[start : start + size]
        bucket = (sum(where) / len(where), sum(part) / len(part), min(part), max(part))
        for column, value in zip(columns, bucket, strict=True):
            column.append(value)
    return columns


def _dress(axes: "Axes", plot: Plot, span: tuple[int, int]) -> None:
    """Limits, ticks and a quiet grid."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    first, last = span
    axes.set_xlim(first, max(last, first + 1))
    _set_range(axes, [value for curve in plot.curves for value in curve.finite])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, pad=4)
    axes.patch.set_visible(False)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=GRID, linewidth=0.7)


def _set_range(axes: "Axes", values: list[float]) -> None:
    """Shares and accuracies are read against 0 and 1, and an axis that nearly reaches 0 begins there."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low >= 0 and 0.3 < high <= 1:
        axes.set_ylim(0, 1)
    elif high - low <= 1e-9 * abs(high):
        margin = abs(high) / 2 or 1.0
        axes.set_ylim(low - margin, high + margin)
    elif 0 <= low < 0.6 * high:
        axes.set_ylim(0, high * 1.05)


def tick(value: float) -> str:
    """An axis label of few characters: `0.25`, `12k`, `1.5M`, `5e-4`."""
    value = float(f"{value:.6g}")
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{suffix}"
    if 0 < abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def _svg_text(figure: "Figure") -> str:
    stream = io.StringIO()
    figure.patch.set_visible(False)
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return _style(stream.getvalue())


def _rounded(found: "re.Match[str]") -> str:
    return f"{float(found[0]):.2f}"


def _style(svg: str) -> str:
    """matplotlib's file as an element of the page: no prologue, few ids, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    for waste in (
        r"<metadata>.*?</metadata>",
        r"<defs>\s*<style.*?</style>\s*</defs>",
        r"<defs>\s*<clipPath.*?</clipPath>\s*</defs>",
        r'(?<=<g) id="[^"]*"',
        r'font(-size|-family)?: [^;"]*; ',
        r' clip-path="[^"]*"',
        r' transform="rotate\(-0 [^"]*\)"',
        r"<g/>",
    ):
        svg = re.sub(waste, "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    # Within attributes only: the axis labels between the tags keep their digits.
    svg = re.sub(r'="[^"]*"', lambda attribute: re.sub(r"-?\d+\.\d{3,}", _rounded, attribute[0]), svg)
    for sentinel, variable in SENTINELS.items():
        svg = svg.replace(sentinel, variable)
    return re.sub(r"\s*\n\s*", "\n", svg).replace("xlink:href", "href")
