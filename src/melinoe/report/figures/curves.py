"""Hit rate against slots, for every policy and its offline bound."""

import math

from melinoe.report import captions
from melinoe.report.figures.base import Figure, colour_of, colours_of, last, marker
from melinoe.report.figures.svg import COLOUR, HEIGHT_IN, finish, panel
from melinoe.report.records import Measurements
from melinoe.report.schema import read_estimate
from melinoe.report.tables import Cell, Table, cell, ordered_models

POLICIES = ("belady", "lfu", "lru")
DASHES = {"belady": (0, (1, 1.4)), "lfu": (0, (5, 2)), "lru": "-"}
# Of more policies than that, bands would hide each other, and dashes be hard to tell apart.
BANDS = 3


def curves(found: Measurements, slots: int | None) -> Figure | None:
    """Hit rate against slots, one panel per model, one line per policy with its interval band."""
    records = last(found.of("curve"), "model", "policy")
    if not records:
        return None
    models = ordered_models(model for model, _ in records)
    num_experts = next(iter(records.values()))["num_experts"]
    caption = captions.curves(records, slots or max(1, num_experts // 4))
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
            for policy in policies:
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
                named = captions.policy_name(policy)
                label = named if policy != "belady" else "Belady (offline bound)"
                mark = "" if few or policy == "belady" else marker(policies.index(policy))
                axes.plot(
                    record["slots"], mean, marker=mark, color=colour, linestyle=style, label=label,
                    markersize=4,
                )  # fmt: skip
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
    columns = ["model, policy", *(str(c) for c in next(iter(records.values()))["slots"])]
    rows = [
        [Cell(f"{m}, {p}"), *(cell(read_estimate(item), "%") for item in records[m, p]["hit_rate"])]
        for m, p in sorted(records, key=lambda key: (models.index(key[0]), key[1]))
        if records[m, p]["slots"] == next(iter(records.values()))["slots"]
    ]
    table = Table("curves", "Hit rate by slots per layer", columns, rows)
    return Figure("curves", "Hit rate against slots", panels, caption, table)
