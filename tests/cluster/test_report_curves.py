import math
import re

import pytest

from cluster.report_curves import MOST_POINTS, Curve, Plot, curves_of, draw, group_plots, tick


def test_metrics_become_curves_in_the_order_of_their_first_value() -> None:
    curves = curves_of({2: {"b": 0.2, "a": 1}, 0: {"a": 0.0}})
    assert list(curves.items()) == [("a", Curve("a", [0, 2], [0.0, 1])), ("b", Curve("b", [2], [0.2]))]


def test_shares_of_similar_size_share_a_plot() -> None:
    sizes = {
        "share/kept": 0.5,
        "share/rare": 0.01,
        "share/none": 0.0,
        "share/hard": 0.4,
        "train/a": 3.0,
        "train/b": 4.0,
    }
    plots = group_plots([Curve(name, [1], [size]) for name, size in {**sizes, "loss": 0.2}.items()], first=["train"])
    assert [(plot.title, plot.labels) for plot in plots] == [
        ("train/a", ["train/a"]),
        ("train/b", ["train/b"]),
        ("share", ["kept", "none", "hard"]),
        ("share/rare", ["share/rare"]),
        ("loss", ["loss"]),
    ]


def test_a_metric_of_few_steps_has_markers_and_a_dense_one_only_where_it_stands_alone() -> None:
    few = draw(Plot("", [Curve("m", [0, 50, 99], [0.1, 0.2, 0.3])], ["m"], []), (0, 99), (3.6, 1.9))
    assert few.count("<use") == 3
    dense = [0.5 if i not in (10, 12) else math.nan for i in range(100)]
    alone = draw(Plot("", [Curve("m", list(range(100)), dense)], ["m"], []), (0, 99), (3.6, 1.9))
    assert alone.count("<use") == 1
    assert draw(Plot("", [], [], ["missing"]), (0, 99), (3.6, 1.9)).startswith("<svg viewBox=")


def test_labels_of_an_axis_keep_their_digits() -> None:
    svg = draw(Plot("", [Curve("m", [0, 1], [0.0, 0.0125])], ["m"], []), (0, 1), (3.6, 1.9))
    assert re.findall(r">([0-9.]+)</text>", svg) == ["0", "1", "0", "0.005", "0.01"]


def test_a_long_run_is_thinned() -> None:
    steps = list(range(20 * MOST_POINTS))
    svg = draw(Plot("", [Curve("m", steps, [s % 7 / 10 for s in steps])], ["m"], []), (0, steps[-1]), (3.6, 1.9))
    assert len(svg) < 60_000
    assert "fill-opacity: 0.2" in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.25"),
        (12000, "12k"),
        (1.5e6, "1.5M"),
        (5e-4, "5e-4"),
        (0, "0"),
        (-2500, "-2.5k"),
        (0.3 - 0.1, "0.2"),
    ],
)
def test_axis_labels_are_short(value: float, text: str) -> None:
    assert tick(value) == text
