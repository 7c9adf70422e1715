"""Draw one generation token by token: what each waited for, and which layer loaded."""

from typing import Any

import numpy as np

from melinoe.report.amounts import plain
from melinoe.report.comparing import in_order
from melinoe.report.figures.svg import COLOUR, Figure, colour_of, finish, panel
from melinoe.report.records import Measurements, Record
from melinoe.report.table import Cell, Table
from melinoe.report.tables import link_of, link_text

_PALE = "; pale behind them, those that it found there"


def timeline(found: Measurements) -> Figure | None:
    """Draw one panel per model: time of each token above, loads of each layer below."""
    records = found.by_model("timeline")
    if not records:
        return None
    models = in_order(records)
    some = records[models[0]]
    said = []
    for model in models:
        record = records[model]
        free = sum(not any(step) for step in record["loads"])
        loads = sum(map(sum, record["loads"]))
        hits = sum(map(sum, record.get("hits") or []))
        found_there = f"found {hits:,} experts resident and " if hits else ""
        said.append(
            f"{model} {found_there}loaded {loads:,} experts for {len(record['loads'])} tokens, "
            f"{free} of which waited for none"
        )
    caption = (
        f"The same prompt from an empty cache over the {link_text(link_of(some))}, "
        f"{some['slots']} of {some['num_experts']} experts resident. Bars: time of each token, "
        "the solid part waiting for experts. Dots: experts that a layer loaded for it, larger for "
        f"more{_PALE if any(record.get('hits') for record in records.values()) else ''}. "
        f"{'; '.join(said)}."
    )
    # A single hiccup of the machine must not flatten all other bars: it runs out of the picture.
    every = np.concatenate([record["ms"] for record in records.values()])
    longest = min(every.max(), 1.5 * np.quantile(every, 0.95))
    panels: list[str] = []
    for model in models:
        with panel(3.3) as (figure, axes):
            _draw(axes, records[model], colour_of(model), longest)
            axes.set_title(model, color=colour_of(model))
            panels.append(finish(figure, f"fig-timeline-{len(panels)}", f"{model}: {caption}"))
    rows = []
    for model in models:
        record = records[model]
        loads, free = sum(map(sum, record["loads"])), sum(not any(s) for s in record["loads"])
        numbers = [f"{len(record['ms'])}", f"{loads:,}", f"{free:,}"]
        numbers += [plain(float(np.median(record["ms"]))), plain(float(np.sum(record["stall_ms"])))]
        rows.append([Cell(model), *map(Cell, numbers)])
    columns = ["model", "tokens", "loads", "tokens without a load"]
    columns += ["median time per token (ms)", "waited in all (ms)"]
    table = Table("timeline", "One generation", columns, rows)
    return Figure("timeline", "One generation, token by token", panels, caption, table)


def _draw(axes: Any, record: Record, colour: str, longest: float) -> None:
    ms, stall = np.asarray(record["ms"]), np.asarray(record["stall_ms"])
    loads = np.asarray(record["loads"])
    at = np.arange(1, len(ms) + 1)
    axes.bar(at, ms, width=0.85, color=colour, alpha=0.35, linewidth=0)
    axes.bar(at, np.minimum(stall, ms), width=0.85, color=colour, linewidth=0)
    layers = loads.shape[1]
    hits = np.asarray(record.get("hits") or np.zeros_like(loads))
    # Below the axis, one row of dots per layer, a quarter of the bars' height in all.
    row = 0.42 * longest / layers
    for layer in range(layers):
        y = -row * (layer + 0.9)
        found = hits[:, layer] > 0
        size = 5.0 * (hits + loads)[found, layer]
        axes.scatter(
            at[found], np.full(found.sum(), y), s=size, color=colour, alpha=0.25, linewidths=0
        )
        some = loads[:, layer] > 0
        size = 5.0 * loads[some, layer]
        axes.scatter(at[some], np.full(some.sum(), y), s=size, color=colour, linewidths=0)
        if layers <= 12 or layer % (layers // 8) == 0:
            axes.text(-0.3, y, f"layer {layer}", ha="right", va="center", fontsize=8)
    axes.axhline(0, color=COLOUR["muted"], linewidth=0.8)
    axes.set_ylim(-row * (layers + 0.5), longest * 1.03)
    ticks = [tick for tick in axes.get_yticks() if 0 <= tick <= longest]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel="token of the completion", ylabel="time (ms)", xlim=(0, len(ms) + 1))
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", pad=2)
