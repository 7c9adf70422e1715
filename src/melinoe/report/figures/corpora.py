"""Draw the perplexity of each model on each corpus."""

import math
from typing import Any

from melinoe.report.amounts import inline, join
from melinoe.report.comparing import domains, in_order, perplexity
from melinoe.report.figures.svg import COLOUR, Figure, colour_of, finish, mark_models, marker, panel
from melinoe.report.records import Measurements, Record
from melinoe.report.table import Table


def corpora(found: Measurements, table: Table | None) -> Figure | None:
    """Draw each model's perplexity on each corpus, as dots with intervals on a log axis."""
    records = {(record["model"], record["domain"]): record for record in found.of("quality")}
    if not records or table is None:
        return None
    names = domains(found)
    models = in_order(model for model, _ in records)
    caption = corpora_caption(found)
    with panel(1.0 + 0.46 * len(names)) as (figure, axes):
        axes.set_xscale("log")
        for index, model in enumerate(models):
            for row, (domain, _) in enumerate(reversed(names)):
                if (model, domain) not in records:
                    continue
                item = records[model, domain]["perplexity"]
                y = row + 0.24 * ((len(models) - 1) / 2 - index)
                axes.plot([item["low"], item["high"]], [y, y], color=colour_of(model), lw=2.6)
                axes.plot([item["mean"]], [y], marker(index), color=colour_of(model), ms=6)
        mark_models(axes, models)
        labels = [f"{name}\n(trained on)" if inside else name for name, inside in reversed(names)]
        axes.set_yticks(range(len(names)), labels)
        axes.tick_params(axis="y", labelcolor=COLOUR["ink"], pad=7)
        axes.set_ylim(-0.5, len(names) - 0.45)
        _plain_log_ticks(axes, records)
        axes.set_xlabel("perplexity (log scale)")
        axes.grid(axis="x")
        axes.grid(False, axis="y")
        drawing = finish(figure, "fig-corpora", caption)
    return Figure("corpora", "Perplexity of each model", [drawing], caption, table)


def _plain_log_ticks(axes: Any, records: dict[tuple[str, str], Record]) -> None:
    """Put plain numbers at 1, 2, 5 times powers of ten: a short log axis has few others."""
    low = min(record["perplexity"]["low"] for record in records.values()) / 1.05
    high = max(record["perplexity"]["high"] for record in records.values()) * 1.05
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def corpora_caption(found: Measurements) -> str:
    """Say every model's perplexity on the texts trained on, and on the others."""
    sentences = []
    for in_domain, where in ((True, "in domain"), (False, "out of domain")):
        values = {
            model: value
            for model in in_order(record["model"] for record in found.of("quality"))
            if (value := perplexity(found, model, in_domain)) is not None
        }
        if values:
            said = [f"{model} {inline(value, digits=4)}" for model, value in values.items()]
            many = sum(inside is in_domain for _, inside in domains(found)) > 1
            mean = " (geometric mean)" if many else ""
            sentences.append(f"{where}{mean} {join(said)}")
    return f"Perplexity, lower is better: {'; '.join(sentences)}."
