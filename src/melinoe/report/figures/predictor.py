"""Recall of the predictor beside its free rivals."""

from melinoe.report import captions
from melinoe.report.figures.base import Figure, colour_of, last, mark_models, marker
from melinoe.report.figures.svg import COLOUR, finish, panel
from melinoe.report.records import Measurements
from melinoe.report.schema import read_estimate
from melinoe.report.tables import Cell, Table, cell, ordered_models


def predictor(found: Measurements) -> Figure | None:
    """Recall of the predictor and of its free rivals, one row each, one colour per model."""
    records = {key[0]: record for key, record in last(found.of("predictor"), "model").items()}
    if not records:
        return None
    models = ordered_models(records)
    names = list(dict.fromkeys(name for record in records.values() for name in record["recall"]))
    caption = captions.predictor(records)
    with panel(1.0 + 0.46 * len(names)) as (figure, axes):
        for index, model in enumerate(models):
            for row, name in enumerate(reversed(names)):
                item = records[model]["recall"].get(name)
                if item is None:
                    continue
                y = row + 0.24 * ((len(models) - 1) / 2 - index)
                colour = colour_of(model)
                axes.plot([0, 100 * item["mean"]], [y, y], color=colour, lw=1, alpha=0.5)
                axes.plot([100 * item["low"], 100 * item["high"]], [y, y], color=colour, lw=3)
                mean = 100 * item["mean"]
                axes.plot([mean], [y], marker(index), color=colour, ms=6, clip_on=False)
                axes.text(
                    100 * item["high"] + 1.6,
                    y,
                    f"{100 * item['mean']:.0f} %",
                    color=colour,
                    va="center",
                    fontsize=9.5,
                )
        mark_models(axes, models)
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.tick_params(axis="y", labelcolor=COLOUR["ink"], pad=7)
        axes.set(xlim=(0, 108), ylim=(-0.5, len(names) - 0.4), xticks=range(0, 101, 20))
        slots = records[models[0]]["slots"]
        axes.set_xlabel(f"recall (%) of the completion's experts at {slots} slots")
        axes.grid(axis="x")
        axes.grid(False, axis="y")
        drawing = finish(figure, "fig-predictor", caption)
    rows = [
        [Cell(name), *(cell(read_estimate(records[m]["recall"].get(name)), "%") for m in models)]
        for name in names
    ]
    if any(record.get("ceiling") for record in records.values()):
        best = [cell(read_estimate(records[m].get("ceiling")), "%") for m in models]
        rows.append([Cell("ceiling: the best unchanging choice"), *best])
    table = Table("predictor", "Recall", ["prediction from", *models], rows)
    return Figure("predictor", "Predictor against its free rivals", [drawing], caption, table)
