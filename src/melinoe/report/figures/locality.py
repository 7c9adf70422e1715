"""Experts that sequences use, as distributions."""

import numpy as np

from melinoe.report import captions
from melinoe.report.amounts import plain
from melinoe.report.figures.base import Figure, colour_of, last
from melinoe.report.figures.svg import finish, panel
from melinoe.report.records import Measurements
from melinoe.report.schema import Record, read_estimate
from melinoe.report.tables import Cell, Table, cell, ordered_models
from melinoe.stats import bootstrap


def locality(found: Measurements) -> Figure | None:
    """Distribution over sequences of the experts used, one row of dots per model."""
    records = {key[0]: record for key, record in last(found.of("locality"), "model").items()}
    if not records:
        return None
    models = ordered_models(records)
    means = {m: bootstrap(records[m]["experts_per_sequence"]) for m in models}
    num_experts = records[models[0]]["num_experts"]
    with panel(0.9 + 0.72 * len(models)) as (figure, axes):
        for row, model in enumerate(reversed(models)):
            colour = colour_of(model)
            values = np.asarray(records[model]["experts_per_sequence"], dtype=float)
            counts, edges = np.histogram(values, bins=np.linspace(0, num_experts, 49))
            heights = 0.62 * counts / counts.max()
            axes.stairs(row + heights, edges, baseline=row, fill=True, color=colour, alpha=0.35)
            mean = means[model]
            axes.plot([mean.low, mean.high], [row, row], color=colour, linewidth=5)
            axes.plot([mean.mean], [row], "o", color=colour, markersize=7)
            right = mean.mean < num_experts * 0.62
            edge = values.max() if right else values.min()
            axes.text(
                edge + (0.02 if right else -0.02) * num_experts,
                row + 0.2,
                f"{model} {plain(mean.mean)}",
                color=colour,
                ha="left" if right else "right",
                va="center",
                fontweight="bold",
            )
        axes.set(xlim=(0, num_experts), ylim=(-0.18, len(models) - 0.2), yticks=[])
        axes.set_xlabel(f"distinct experts a sequence uses, mean over layers (of {num_experts})")
        axes.grid(axis="x")
        caption = captions.locality(means, num_experts, _whole_sets(records, models))
        drawing = finish(figure, "fig-locality", caption)
    rows = []
    for m in models:
        reuse = read_estimate(records[m].get("reuse"))
        rows.append([Cell(m), cell(means[m]), cell(reuse, "%"), _whole(records[m])])
    columns = ["model", "experts per sequence", "reuse", "distinct over the whole set"]
    table = Table("locality", "Experts used", columns, rows)
    return Figure("locality", "Experts a sequence uses", [drawing], caption, table)


def _whole_sets(records: dict[str, Record], models: list[str]) -> dict[str, float]:
    return {m: n for m in models if (n := records[m].get("distinct_experts")) is not None}


def _whole(record: Record) -> Cell:
    value = record.get("distinct_experts")
    return Cell("n/a" if value is None else f"{plain(value)} of {record['num_experts']}")
