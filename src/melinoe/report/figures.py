"""The figures of a report: each draws what records hold, and says in a sentence what is seen."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from melinoe.report import captions
from melinoe.report.amounts import plain
from melinoe.report.records import Measurements
from melinoe.report.schema import Record, read_estimate
from melinoe.report.svg import COLOUR, finish, panel
from melinoe.report.tables import Cell, Table, cell, domains, ordered_models
from melinoe.stats import bootstrap

POLICIES = ("belady", "lfu", "lru")
DASHES = {"belady": (0, (1, 1.4)), "lfu": (0, (5, 2)), "lru": "-"}


@dataclass(frozen=True)
class Figure:
    """One figure: its panels as SVG, its sentence, and its numbers as a table."""

    name: str
    title: str
    panels: list[str]
    caption: str
    table: Table


def colour_of(model: str) -> str:
    """Give the colour that stands for a model on the whole page."""
    known = {"base": "base", "control": "control", "fine-tuned": "tuned"}
    return COLOUR[known.get(model, "other")]


def _last(records: list[Record], *keys: str) -> dict[tuple[str, ...], Record]:
    return {tuple(record[key] for key in keys): record for record in records}


def locality(found: Measurements) -> Figure | None:
    """Distribution over sequences of the experts used, one row of dots per model."""
    records = {key[0]: record for key, record in _last(found.of("locality"), "model").items()}
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
        caption = captions.locality(means, num_experts)
        drawing = finish(figure, "fig-locality", caption)
    rows = []
    for m in models:
        reuse = read_estimate(records[m].get("reuse"))
        rows.append([Cell(m), cell(means[m]), cell(reuse, "%"), _whole(records[m])])
    columns = ["model", "experts per sequence", "reuse", "distinct over the whole set"]
    table = Table("locality", "Experts used", columns, rows)
    return Figure("locality", "Experts a sequence uses", [drawing], caption, table)


def _whole(record: Record) -> Cell:
    value = record.get("distinct_experts")
    return Cell("n/a" if value is None else f"{plain(value)} of {record['num_experts']}")


def curves(found: Measurements, slots: int | None) -> Figure | None:
    """Hit rate against slots, one panel per model, one line per policy with its interval band."""
    records = _last(found.of("curve"), "model", "policy")
    if not records:
        return None
    models = ordered_models(model for model, _ in records)
    num_experts = next(iter(records.values()))["num_experts"]
    caption = captions.curves(records, slots or max(1, num_experts // 4))
    floor = min(item["low"] for record in records.values() for item in record["hit_rate"])
    panels: list[str] = []
    for model in models:
        with panel() as (figure, axes):
            policies = [p for p in POLICIES if (model, p) in records]
            policies += [p for m, p in records if m == model and p not in POLICIES]
            for policy in policies:
                record = records[model, policy]
                colour = COLOUR["muted"] if policy == "belady" else colour_of(model)
                style = DASHES.get(policy, "-.")
                low, mean, high = (
                    [100 * item[end] for item in record["hit_rate"]]
                    for end in ("low", "mean", "high")
                )
                axes.fill_between(record["slots"], low, high, color=colour, alpha=0.16, linewidth=0)
                label = f"{policy.upper()}" if policy != "belady" else "Belady (offline bound)"
                axes.plot(record["slots"], mean, color=colour, linestyle=style, label=label)
            if slots is not None:
                axes.axvline(slots, color=COLOUR["muted"], linewidth=0.8)
                axes.text(slots, 101.5, f" {slots} slots", color=COLOUR["muted"], fontsize=9)
            axes.set(xlim=(0, num_experts), ylim=(10 * math.floor(10 * floor), 101))
            axes.set(xlabel=f"slots per layer (of {num_experts} experts)", ylabel="hit rate (%)")
            axes.set_title(model, color=colour_of(model), pad=14)
            axes.legend(loc="lower right", frameon=False, handlelength=2.4)
            panels.append(finish(figure, f"fig-curve-{len(panels)}", f"{model}: {caption}"))
    columns = ["model, policy", *(str(c) for c in next(iter(records.values()))["slots"])]
    rows = [
        [Cell(f"{m}, {p}"), *(cell(read_estimate(item), "%") for item in records[m, p]["hit_rate"])]
        for m, p in sorted(records, key=lambda key: (models.index(key[0]), key[1]))
        if records[m, p]["slots"] == next(iter(records.values()))["slots"]
    ]
    table = Table("curves", "Hit rate by slots per layer", columns, rows)
    return Figure("curves", "Hit rate against slots", panels, caption, table)


def corpora(found: Measurements, table: Table | None) -> Figure | None:
    """Perplexity of each model on each corpus, as dots with intervals on a log axis."""
    records = _last(found.of("quality"), "model", "domain")
    if not records or table is None:
        return None
    names = domains(found)
    models = ordered_models(model for model, _ in records)
    caption = captions.corpora(found)
    with panel(1.0 + 0.46 * len(names)) as (figure, axes):
        axes.set_xscale("log")
        for index, model in enumerate(models):
            for row, (domain, _) in enumerate(reversed(names)):
                if (model, domain) not in records:
                    continue
                item = records[model, domain]["perplexity"]
                y = row + 0.24 * ((len(models) - 1) / 2 - index)
                axes.plot([item["low"], item["high"]], [y, y], color=colour_of(model), lw=2.6)
                axes.plot([item["mean"]], [y], _marker(index), color=colour_of(model), ms=6)
        _mark_models(axes, models)
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


def _marker(index: int) -> str:
    return ("o", "s", "D", "^", "v")[index % 5]


def _mark_models(axes: Any, models: list[str]) -> None:
    """Name the models once, in their colours and markers, on a line above the rows."""
    handles = []
    for index, model in enumerate(models):
        (line,) = axes.plot([], [], _marker(index), color=colour_of(model), label=model)
        handles.append(line)
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.98),
        ncols=len(models),
        frameon=False,
        labelcolor=[colour_of(model) for model in models],
        handletextpad=0.2,
        columnspacing=1.4,
        borderpad=0,
    )


def _plain_log_ticks(axes: Any, records: dict[tuple[str, ...], Record]) -> None:
    """Put plain numbers at 1, 2, 5 times powers of ten: a short log axis has few others."""
    low = min(record["perplexity"]["low"] for record in records.values()) / 1.05
    high = max(record["perplexity"]["high"] for record in records.values()) * 1.05
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def predictor(found: Measurements) -> Figure | None:
    """Recall of the predictor and of its free rivals, one row each, one colour per model."""
    records = {key[0]: record for key, record in _last(found.of("predictor"), "model").items()}
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
                axes.plot([mean], [y], _marker(index), color=colour, ms=6, clip_on=False)
                axes.text(
                    100 * item["high"] + 1.6,
                    y,
                    f"{100 * item['mean']:.0f} %",
                    color=colour,
                    va="center",
                    fontsize=9.5,
                )
        _mark_models(axes, models)
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
