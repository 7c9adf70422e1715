"""Draw the losses over training steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from melinoe.report.amounts import join, plain
from melinoe.report.comparing import in_order
from melinoe.report.figures.svg import WIDTH_IN, Figure, colour_of, finish, panel
from melinoe.report.records import TRAINING_TERMS, Measurements
from melinoe.report.table import Cell, Table

Log = Sequence[Mapping[str, Any]]


def training(found: Measurements) -> Figure | None:
    """Draw each loss over the training steps, one panel per loss, one line per model."""
    logs: dict[str, Log] = {m: record["log"] for m, record in found.by_model("training").items()}
    models = in_order(logs)
    terms = {
        term: name
        for term, name in TRAINING_TERMS.items()
        if any(term in row for log in logs.values() for row in log)
    }
    if not terms:
        return None
    caption = training_caption({model: logs[model] for model in models}, terms)
    drawn = [term for term in terms if any(len(series(log, term)[0]) for log in logs.values())]
    panels = []
    for term in drawn:
        with panel(2.8, 3.5 if len(drawn) > 2 else WIDTH_IN) as (figure, axes):
            ends = []
            for model in models:
                steps, values = series(logs[model], term)
                if not len(steps):
                    continue
                colour = colour_of(model)
                smooth = running_mean(values)
                if not np.array_equal(values, smooth):
                    axes.plot(steps, values, color=colour, lw=0.7, alpha=0.35)
                axes.plot(steps, smooth, color=colour)
                ends.append((float(smooth[-1]), model, float(steps[-1])))
            axes.margins(x=0.01)
            _label_ends(axes, ends)
            axes.set_title(terms[term])
            axes.set_xlabel("training step")
            panels.append(finish(figure, f"fig-training-{term}", f"{terms[term]}: {caption}"))
    rows = [
        [Cell(m), *(Cell(start_to_end(logs[m], term) or "n/a") for term in terms)] for m in models
    ]
    columns = ["model", *(f"{name}, start → end" for name in terms.values())]
    table = Table("training", "Losses: mean of first and last twentieth of steps", columns, rows)
    return Figure("training", "Losses over training", panels, caption, table)


def training_caption(logs: Mapping[str, Log], terms: Mapping[str, str]) -> str:
    """Say where each loss began and ended, model by model."""
    sentences = []
    for term, name in terms.items():
        ends = {model: start_to_end(log, term) for model, log in logs.items()}
        if each := [f"{model} {said}" for model, said in ends.items() if said]:
            sentences.append(f"{name} {join(each)}")
    return f"From the first to the last twentieth of the steps: {'; '.join(sentences)}."


def start_to_end(log: Log, term: str) -> str | None:
    """Write a loss's means over the first and last twentieth of its steps: ``3.62 → 3.51``."""
    _, values = series(log, term)
    some = max(1, len(values) // 20)
    if not len(values):
        return None
    return f"{plain(sum(values[:some]) / some)} → {plain(sum(values[-some:]) / some)}"


def series(log: Log, term: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which a loss was logged, and its values."""
    rows = [(row["step"], row[term]) for row in log if row.get(term) is not None]
    steps, values = np.array(rows, dtype=float).reshape(-1, 2).T
    return steps, values


def running_mean(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of a thirtieth of the steps, shorter at both ends."""
    reach = len(values) // 60
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    mean: np.ndarray = (total[high] - total[low]) / (high - low)
    return values if reach == 0 else mean


def _label_ends(axes: Any, ends: list[tuple[float, str, float]]) -> None:
    """Name each line at its end, moved apart where two ends would overlap."""
    bottom, top = axes.get_ylim()
    gap, below = 0.085 * (top - bottom), -math.inf
    for value, model, step in sorted(ends):
        y = max(value, below + gap)
        axes.annotate(
            model,
            (step, y),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour_of(model),
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )
        below = y
