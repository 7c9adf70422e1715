"""The figure of losses over training steps."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from melinoe.report import captions
from melinoe.report.figures.base import Figure, colour_of
from melinoe.report.figures.svg import WIDTH_IN, finish, panel
from melinoe.report.records import Measurements
from melinoe.report.schema import TRAINING_TERMS, Record
from melinoe.report.tables import Cell, Table, ordered_models


def training(found: Measurements) -> Figure | None:
    """
    Each loss term over the training steps, one panel per term, one line per model.

    A model that trains under the cache prior runs other experts than its routers choose. Its
    losses do not compare with those of one that runs its own choices, and stand apart.
    """
    records = {record["model"]: record for record in found.of("training")}
    logged = {name for record in records.values() for row in record["log"] for name in row}
    terms = [term for term in TRAINING_TERMS if term in logged]
    if not terms:
        return None
    models = ordered_models(records)
    rules = {model: _rule(records[model]) for model in models}
    caption = captions.training({m: records[m]["log"] for m in models}, TRAINING_TERMS, rules)
    groups = list(dict.fromkeys(rules.values()))
    shown = [
        (term, rule, lines)
        for term in terms
        for rule in groups
        if (lines := list(_series(records, [m for m in models if rules[m] == rule], term)))
    ]
    panels = []
    for term, rule, lines in shown:
        title = TRAINING_TERMS[term] + (f", {rule}" if len(groups) > 1 else "")
        with panel(2.8, 3.5 if len(shown) > 2 else WIDTH_IN) as (figure, axes):
            ends = []
            for model, steps, values in lines:
                colour = colour_of(model)
                smooth = running_mean(values)
                if len(values) != len(smooth) or not np.array_equal(values, smooth):
                    axes.plot(steps, values, color=colour, lw=0.7, alpha=0.35)
                axes.plot(steps, smooth, color=colour)
                ends.append((float(smooth[-1]), model, float(steps[-1])))
            axes.margins(x=0.01)
            _label_ends(axes, ends)
            axes.set_title(title)
            axes.set_xlabel("training step")
            name = f"fig-training-{term}" + (f"-{groups.index(rule)}" if len(groups) > 1 else "")
            panels.append(finish(figure, name, f"{title}: {caption}"))
    rows = [
        [
            Cell(m),
            *([Cell(rules[m])] if len(groups) > 1 else []),
            *(Cell(captions.start_to_end(records[m]["log"], t)) for t in terms),
        ]
        for m in models
    ]
    columns = ["model", *(["experts that ran"] if len(groups) > 1 else [])]
    columns += [f"{TRAINING_TERMS[t]}, start → end" for t in terms]
    table = Table("training", "Losses: mean of first and last twentieth of steps", columns, rows)
    return Figure("training", "Losses over training", panels, caption, table)


def _rule(record: Record) -> str:
    """How experts were chosen while a model trained."""
    prior = (record.get("settings") or {}).get("cache_prior", 0)
    return "own choices" if prior == 0 else "choices under the prior"


def _series(
    records: dict[str, Record], models: list[str], term: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for model in models:
        rows = [row for row in records[model]["log"] if row.get(term) is not None]
        if rows:
            steps = np.array([row["step"] for row in rows], dtype=float)
            yield model, steps, np.array([row[term] for row in rows], dtype=float)


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
