"""`report.html` of a run that trained a reward model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.checkpoint import atomic_write, read_jsonl
from burnish.config import read_recipe
from burnish.report.page import data_uri, percent, render
from burnish.report.parts import environment, plot, series

SHARES = {"accuracy", "calibration_error", "ties", "liked"}
SHOWN = ("loss", "accuracy", "calibration_error", "rank_correlation", "absolute_error")


def write_reward_report(run: Path) -> Path:
    """Write `report.html` from what `run` holds, also while it goes on, and return its path."""
    config, rows = read_recipe(run / "config.yaml"), read_jsonl(run / "metrics.jsonl")
    stored = run / "evaluation.json"
    evaluation: dict[str, Any] = json.loads(stored.read_text("utf-8")) if stored.is_file() else {}
    columns = [name for name in SHOWN if any(name in one for one in evaluation.values())]
    page = render(
        "reward_model.html.j2",
        title=f"Reward model from {config['signal']}",
        subtitle=f"{config['model']}, {config['tune']}, {rows[-1]['step'] if rows else 0} of {config['steps']} steps",
        figures=[
            {"label": name, "value": _cell(main, one[main]), "note": main.replace("_", " ")}
            for name, one in evaluation.items()
            if (main := "accuracy" if "accuracy" in one else "rank_correlation")
        ],
        sentence=_sentence(evaluation, rows),
        columns=[name.replace("_", " ") for name in columns],
        sets=[
            {"name": name, "cells": [_cell(column, one.get(column)) for column in columns]}
            for name, one in evaluation.items()
        ],
        calibration=[{"name": name, "bins": one["bins"]} for name, one in evaluation.items() if one.get("bins")],
        mistakes=[
            {"name": picture.stem.removeprefix("wrong-"), "uri": data_uri(picture)}
            for picture in sorted((run / "samples").glob("wrong-*.png"))
        ],
        plots=_plots(rows),
        config=(run / "config.yaml").read_text("utf-8"),
        environment=environment(run / "environment.json"),
    )
    path = run / "report.html"
    atomic_write(path, page)
    return path


def _sentence(evaluation: Mapping[str, Mapping[str, Any]], rows: list[dict[str, Any]]) -> str:
    told = []
    for name, one in evaluation.items():
        before = series(rows, f"eval/{name}/accuracy")
        if "accuracy" in one and before:
            told.append(
                f"on {name} it agrees with {percent(one['accuracy'])} of the labels ({percent(before[0][1])} at first)"
            )
    return ("After training, " + "; ".join(told) + ".") if told else "The run has not been evaluated at its end yet."


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return percent(value) if name in SHARES else f"{value:.3f}"


def _plots(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A plot a metric: of the training batches, and of each held-out set."""
    # `eval/accuracy` is the first set's once more, for the progress bar.
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "eval/accuracy"))
    metrics = dict.fromkeys(name.rpartition("/")[2] for name in names)
    plots = []
    for metric in metrics:
        lines = {name.split("/")[1] if "/" in name else "training": series(rows, name) for name in names
                 if name.rpartition("/")[2] == metric}  # fmt: skip
        if lines := {name: points for name, points in lines.items() if points}:
            plots.append(plot(metric.replace("_", " "), lines, percent_axis=metric in SHARES))
    return plots
