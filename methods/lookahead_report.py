"""What Lookahead routing tells its reader: quality per source beside each model alone, and quality against price."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cluster.run_directory import write_atomically
from cluster.summary import Summary, SummaryRow
from methods.lookahead_config import Config
from methods.lookahead_data import Split
from protocols.router import RouteEvaluateResponse, RouteEvaluation

PANELS = {
    "Validation queries, 100 (router - random) / (oracle - random)": ["eval/validation"],
    "Losses": ["train/choice_loss", "train/response_loss"],
}


def collected(data: Split) -> Summary:
    """The result of a run that only collects."""
    sizes = f"{len(data.train)} training, {len(data.validation)} validation and {len(data.test)} test queries"
    return Summary(title=f"Lookahead: {sizes} of {', '.join(data.models)}", notes=data.notes)


def summary(config: Config, data: Split, tested: RouteEvaluateResponse, best_step: int) -> Summary:
    """The router beside the model that is best on the training queries, and what must be known to read it."""
    chosen, alone = tested.evaluations[0], tested.evaluations[1 : 1 + len(data.models)]
    best = best_in_training(data)
    rows = []
    for mine, its in zip([chosen.mean, *chosen.groups], [alone[best].mean, *alone[best].groups], strict=True):
        note = f"95 % {mine.low:.1f} to {mine.high:.1f}; score {mine.router:.3f}, random {mine.random:.3f},"
        note += f" oracle {mine.oracle:.3f}, {mine.queries} queries"
        rows.append(SummaryRow(name=mine.group or "mean", before=its.normalised, after=mine.normalised, note=note))
    shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(data.models, chosen.mean.shares, strict=True))
    hindsight = hindsight_of(alone)
    notes = [
        "Test queries, 100 (router - random) / (oracle - random); before: always"
        f" {data.models[best]}, the best on training queries.",
        f"The best model of each source, if that were known: {hindsight:.1f}.",
        f"Router of step {best_step}; trained on {len(data.train)} queries; calibration error"
        f" {tested.calibration_error:.3f}; shares {shares}.",
        *data.notes,
    ]
    return Summary(title=f"Routing by {config.router.kind}", rows=rows, notes=notes, panels=PANELS)


def best_in_training(data: Split) -> int:
    """Place of the model with the best mean score, each source counting once."""
    groups = sorted({row.group for row in data.train})
    scores = [np.mean([row.scores for row in data.train if row.group == group], axis=0) for group in groups]
    return int(np.mean(scores, axis=0).argmax())


def hindsight_of(alone: list[RouteEvaluation]) -> float:
    """The best model of each source in hindsight, mean over sources."""
    per_source = zip(*(one.groups for one in alone), strict=True)
    best = [max(one.normalised for one in same) for same in per_source]
    known = [value for value in best if value == value]
    return sum(known) / len(known) if known else float("nan")


def write_evaluation(
    folder: Path, tested: RouteEvaluateResponse, config: Config, prices: Mapping[str, float]
) -> None:
    """Write evaluation.json, and quality-price.svg where the pool has prices."""
    models = list(prices)
    chosen, alone = tested.evaluations[0], tested.evaluations[1 : 1 + len(models)]
    curve = tested.evaluations[1 + len(models) :]
    told = {
        "router": chosen.model_dump(mode="json"),
        "models": {name: one.model_dump(mode="json") for name, one in zip(models, alone, strict=True)},
        "hindsight": hindsight_of(alone),
        "by_price_weight": {
            f"{weight:g}": one.model_dump(mode="json")
            for weight, one in zip(config.price_weights if curve else [], curve, strict=True)
        },
        "reliability": [one.model_dump(mode="json") for one in tested.reliability],
        "calibration_error": tested.calibration_error,
    }
    write_atomically(folder / "evaluation.json", json.dumps(told, indent=1))
    if curve:
        draw_curve(folder / "quality-price.svg", dict(zip(models, alone, strict=True)), curve)


def draw_curve(file: Path, alone: Mapping[str, RouteEvaluation], curve: list[RouteEvaluation]) -> None:
    """Plot mean score against mean price: the router at several weights of the price, and each model alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([one.mean.price for one in curve], [one.mean.router for one in curve], "o-", label="router")
    for name, one in alone.items():
        axes.plot(one.mean.price, one.mean.router, "s", color="gray")
        axes.annotate(name, (one.mean.price, one.mean.router), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.axhline(curve[0].mean.oracle, linestyle=":", color="gray", label="oracle")
    axes.set_xlabel("mean price of an answer")
    axes.set_ylabel("mean score, sources count once")
    axes.legend(fontsize=8)
    figure.savefig(file)
