"""Draw hit rates: against slots for every policy, and by layer."""

import math
from collections.abc import Mapping
from typing import Any

from melinoe.report.amounts import inline, join
from melinoe.report.comparing import in_order
from melinoe.report.figures.svg import (
    COLOUR,
    HEIGHT_IN,
    Figure,
    colour_of,
    colours_of,
    finish,
    marker,
    panel,
)
from melinoe.report.records import Measurements, Record, read_estimate
from melinoe.report.table import Cell, Table, cell
from melinoe.report.tables import Serving
from melinoe.stats import Estimate

POLICIES = ("belady", "lfu", "lru")
DASHES = {"belady": (0, (1, 1.4)), "lfu": (0, (5, 2)), "lru": "-"}
# Of more policies than that, bands would hide each other, and dashes be hard to tell apart.
BANDS = 3
# More lines by layer than that cannot be told apart.
LINES = 6


def curves(found: Measurements, slots: int | None) -> Figure | None:
    """Draw hit rate against slots: a panel per model, a line per policy with its interval."""
    records = {(record["model"], record["policy"]): record for record in found.of("curve")}
    if not records:
        return None
    models = in_order(model for model, _ in records)
    first = next(iter(records.values()))
    num_experts = first["num_experts"]
    caption = curves_caption(records, slots or max(1, num_experts // 4))
    if max(sum(m == model for m, _ in records) for model in models) > BANDS:
        caption += " Intervals stand in the numbers."
    floor = min(item["low"] for record in records.values() for item in record["hit_rate"])
    panels: list[str] = []
    for model in models:
        policies = [p for p in POLICIES if (model, p) in records]
        policies += [p for m, p in records if m == model and p not in POLICIES]
        few = len(policies) <= BANDS
        causal = [policy for policy in policies if policy != "belady"]
        hues = dict(zip(causal, colours_of(causal), strict=True)) | {"belady": COLOUR["muted"]}
        with panel(HEIGHT_IN if few else HEIGHT_IN + 0.25 * len(policies)) as (figure, axes):
            for place, policy in enumerate(policies):
                record = records[model, policy]
                colour = colour_of(model) if few and policy != "belady" else hues[policy]
                style = DASHES.get(policy, "-.") if few or policy == "belady" else "-"
                low, mean, high = (
                    [100 * item[end] for item in record["hit_rate"]]
                    for end in ("low", "mean", "high")
                )
                if few:
                    band = {"color": colour, "alpha": 0.16, "linewidth": 0}
                    axes.fill_between(record["slots"], low, high, **band)
                line = {
                    "label": "Belady (offline bound)" if policy == "belady" else _name(policy),
                    "marker": "" if few or policy == "belady" else marker(place),
                }
                axes.plot(
                    record["slots"], mean, color=colour, linestyle=style, markersize=4, **line
                )
            if slots is not None:
                axes.axvline(slots, color=COLOUR["muted"], linewidth=0.8)
                axes.text(slots, 101.5, f" {slots} slots", color=COLOUR["muted"], fontsize=9)
            axes.set(xlim=(0, num_experts), ylim=(10 * math.floor(10 * floor), 101))
            axes.set(xlabel=f"slots per layer (of {num_experts} experts)", ylabel="hit rate (%)")
            axes.set_title(model, color=colour_of(model), pad=14)
            below = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.2), "ncols": 2}
            at = {"loc": "lower right"} if few else below
            axes.legend(frameon=False, handlelength=2.4, **at)
            panels.append(finish(figure, f"fig-curve-{len(panels)}", f"{model}: {caption}"))
    rows = [
        [Cell(f"{m}, {p}"), *(cell(read_estimate(item), "%") for item in records[m, p]["hit_rate"])]
        for m, p in sorted(records, key=lambda key: (models.index(key[0]), key[1]))
        if records[m, p]["slots"] == first["slots"]
    ]
    columns = ["model, policy", *(str(count) for count in first["slots"])]
    table = Table("curves", "Hit rate by slots per layer", columns, rows)
    return Figure("curves", "Hit rate against slots", panels, caption, table)


def _name(policy: str) -> str:
    """A policy's name as people write it: ``LRU``, ``static``."""
    return policy.upper() if policy in ("lru", "lfu", "lfru") else policy


def curves_caption(records: Mapping[tuple[str, str], Record], slots: int) -> str:
    """Say what each policy hits at the measured number of slots nearest to *slots*."""
    some = next(iter(records.values()))
    at = min(some["slots"], key=lambda count: abs(count - slots))
    models = in_order(model for model, _ in records)
    parts = []
    policies = dict.fromkeys(policy for _, policy in records)
    for policy in sorted(policies, key=lambda name: name == "belady"):
        hits = []
        for model in models:
            record = records.get((model, policy))
            if record is not None and at in record["slots"]:
                rate = read_estimate(record["hit_rate"][record["slots"].index(at)])
                assert rate is not None
                hits.append(inline(rate, "%") + (f" {model}" if len(models) > 1 else ""))
        name = "Belady, which knows the future," if policy == "belady" else _name(policy)
        if hits:
            parts.append(f"{name} hits {join(hits)}")
    return (
        f"With {at} of {some['num_experts']} experts resident, {'; '.join(parts)}. What is missing "
        "to 100 % is the miss ratio."
    )


def layers(found: Measurements, serving: Serving | None) -> Figure | None:
    """Draw hit rate by layer, a line per strategy or policy; ``None`` where no record holds it."""
    title, runs = _runs_by_layer(found, serving)
    rates: dict[str, dict[int, Estimate]] = {}
    for strategy, run in runs.items():
        # A layer that served no token has none.
        listed = enumerate(map(read_estimate, run.get("hit_rate_by_layer") or []))
        estimates = {layer: one for layer, one in listed if one is not None}
        if estimates and not strategy.startswith("all resident"):
            rates[strategy] = estimates
    left_out = list(rates)[LINES:]
    rates = dict(list(rates.items())[:LINES])
    if not rates:
        return None
    said = []
    for strategy, estimates in rates.items():
        worst, *others = sorted(estimates, key=lambda layer: estimates[layer].mean)
        text = f"{strategy} layer {worst}, {inline(estimates[worst], '%')}"
        if others and estimates[others[0]].low <= estimates[worst].high:
            text += f" (layer {others[0]}'s interval overlaps)"
        said.append(text)
    caption = f"{title}. Lowest hit rate: {'; '.join(said)}."
    if left_out:
        caption += f" Not drawn: {', '.join(left_out)}."
    used = sorted({layer for estimates in rates.values() for layer in estimates})
    with panel(2.9) as (figure, axes):
        colours = colours_of(list(rates))
        for index, (strategy, estimates) in enumerate(rates.items()):
            low, mean, high = (
                [100 * getattr(one, end) for one in estimates.values()]
                for end in ("low", "mean", "high")
            )
            colour, at = colours[index], list(estimates)
            axes.fill_between(at, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(at, mean, marker(index), linestyle="-", color=colour, label=strategy)
        axes.set(xlabel="MoE layer", ylabel="hit rate (%)", xlim=(used[0] - 0.2, used[-1] + 0.2))
        axes.set_xticks(range(used[0], used[-1] + 1, max(1, len(used) // 8)))
        axes.set_ylim(top=100)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2)
        drawing = finish(figure, "fig-layers", caption)
    rows = [
        [Cell(strategy), *(cell(estimates.get(layer), "%") for layer in used)]
        for strategy, estimates in rates.items()
    ]
    columns = ["strategy", *(f"layer {layer}" for layer in used)]
    table = Table("layers", "Hit rate by layer", columns, rows)
    return Figure("layers", "Hit rate by layer", [drawing], caption, table)


def _runs_by_layer(
    found: Measurements, serving: Serving | None
) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """The runs to draw: one configuration's, a bench's with as many slots, or a trace's."""
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
