"""Hit rate of each MoE layer, to see where the misses come from."""

from collections.abc import Mapping
from typing import Any

from melinoe.report.amounts import inline
from melinoe.report.figures.base import Figure, colours_of, marker
from melinoe.report.figures.svg import finish, panel
from melinoe.report.records import Measurements
from melinoe.report.schema import read_estimate
from melinoe.report.tables import Cell, Serving, Table, cell
from melinoe.stats import Estimate

# More lines than that cannot be told apart.
LINES = 6

Rates = dict[int, Estimate]
"""By MoE layer; one that served no token has none."""


def layers(found: Measurements, serving: Serving | None) -> Figure | None:
    """Hit rate by layer, one line per strategy or policy; ``None`` where no record holds it."""
    title, runs = _compared(found, serving)
    rates: dict[str, Rates] = {}
    for strategy, run in runs.items():
        listed = run.get("hit_rate_by_layer") or []
        estimates = {
            layer: one
            for layer, item in enumerate(listed)
            if (one := read_estimate(item)) is not None
        }
        if estimates and not strategy.startswith("all resident"):
            rates[strategy] = estimates
    left_out = list(rates)[LINES:]
    rates = dict(list(rates.items())[:LINES])
    if not rates:
        return None
    caption = _caption(rates, title)
    if left_out:
        caption += f" Not drawn: {', '.join(left_out)}."
    colours = dict(zip(rates, colours_of(list(rates)), strict=True))
    with panel(2.9) as (figure, axes):
        for index, (strategy, estimates) in enumerate(rates.items()):
            colour = colours[strategy]
            at = list(estimates)
            axes.fill_between(
                at,
                [100 * one.low for one in estimates.values()],
                [100 * one.high for one in estimates.values()],
                color=colour,
                alpha=0.14,
                linewidth=0,
            )
            means = [100 * one.mean for one in estimates.values()]
            axes.plot(at, means, marker(index), linestyle="-", color=colour, label=strategy)
        used = sorted({layer for estimates in rates.values() for layer in estimates})
        axes.set(xlabel="MoE layer", ylabel="hit rate (%)", xlim=(used[0] - 0.2, used[-1] + 0.2))
        axes.set_xticks(range(used[0], used[-1] + 1, max(1, len(used) // 8)))
        axes.set_ylim(top=100)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2)
        drawing = finish(figure, "fig-layers", caption)
    columns = ["strategy", *(f"layer {layer}" for layer in used)]
    rows = [
        [Cell(strategy), *(cell(estimates.get(layer), "%") for layer in used)]
        for strategy, estimates in rates.items()
    ]
    table = Table("layers", "Hit rate by layer", columns, rows)
    return Figure("layers", "Hit rate by layer", [drawing], caption, table)


def _compared(
    found: Measurements, serving: Serving | None
) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """Whose layers are drawn: one configuration's, a bench's with as many slots, or a trace's."""
    if serving is not None:
        return serving.title, {one: serving.run(one) or {} for one in serving.strategies}
    benched = [run for run in found.of("serve") if "predicted" in run]
    between = [run for run in benched if 1 < (run.get("slots") or 0) < run["num_experts"]]
    named = {f"{run['model']}, {run['policy']}": run for run in found.of("layers")}
    if not between and not named:
        return "", {}
    first = (between or list(named.values()))[0]
    slots, experts = first["slots"], first["num_experts"]
    runs = {run["strategy"]: run for run in between if run["slots"] == slots} or named
    return f"{slots} of {experts} experts per layer resident", runs


def _caption(rates: dict[str, Rates], title: str) -> str:
    """Say which layer each strategy hits least in, and whether the intervals bear it."""
    said = []
    for strategy, estimates in rates.items():
        worst, *others = sorted(estimates, key=lambda layer: estimates[layer].mean)
        text = f"{strategy} layer {worst}, {inline(estimates[worst], '%')}"
        if others and estimates[others[0]].low <= estimates[worst].high:
            text += f" (layer {others[0]}'s interval overlaps)"
        said.append(text)
    return f"{title}. Lowest hit rate: {'; '.join(said)}."
