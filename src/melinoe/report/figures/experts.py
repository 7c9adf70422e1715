"""Draw which experts sequences use: how many each, and which of them by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melinoe.report.amounts import apart, inline, join, plain
from melinoe.report.comparing import in_order
from melinoe.report.figures.svg import COLOUR, WIDTH_IN, Figure, colour_of, finish, panel
from melinoe.report.records import Measurements, estimate
from melinoe.report.table import Cell, Table, cell
from melinoe.stats import Estimate, bootstrap

# Pictures of pixels cannot follow the page's colours; this one is legible on light and dark.
HUE = (0.16, 0.55, 0.62)


def locality(found: Measurements) -> Figure | None:
    """Draw the distribution over sequences of how many experts they use, one row per model."""
    records = found.by_model("locality")
    if not records:
        return None
    models = in_order(records)
    num_experts = records[models[0]]["num_experts"]
    values = {m: np.asarray(records[m]["experts_per_sequence"], dtype=float) for m in models}
    means = {m: bootstrap(values[m]) for m in models}
    whole = {m: n for m in models if (n := records[m].get("distinct_experts")) is not None}
    with panel(0.9 + 0.72 * len(models)) as (figure, axes):
        spread(axes, [(m, colour_of(m), values[m], means[m]) for m in models], num_experts)
        axes.set_xlabel(f"distinct experts a sequence uses, mean over layers (of {num_experts})")
        caption = locality_caption(means, num_experts, whole)
        drawing = finish(figure, "fig-locality", caption)
    rows = [
        [
            Cell(m),
            cell(means[m]),
            cell(estimate(records[m], "reuse"), "%"),
            Cell(f"{plain(whole[m])} of {num_experts}" if m in whole else "n/a"),
        ]
        for m in models
    ]
    columns = ["model", "experts per sequence", "reuse", "distinct over the whole set"]
    table = Table("locality", "Experts used", columns, rows)
    return Figure("locality", "Experts a sequence uses", [drawing], caption, table)


def spread(
    axes: Any, rows: Sequence[tuple[str, str, NDArray[np.float64], Estimate]], num_experts: int
) -> None:
    """Draw a row for each (name, colour, value per sequence, mean): histogram, mean, interval."""
    for row, (name, colour, values, mean) in enumerate(reversed(rows)):
        counts, edges = np.histogram(values, bins=np.linspace(0, num_experts, 49))
        heights = 0.62 * counts / counts.max()
        axes.stairs(row + heights, edges, baseline=row, fill=True, color=colour, alpha=0.35)
        axes.plot([mean.low, mean.high], [row, row], color=colour, linewidth=5)
        axes.plot([mean.mean], [row], "o", color=colour, markersize=7)
        right = mean.mean < num_experts * 0.62  # the name stands on the side with more room
        edge = values.max() if right else values.min()
        axes.text(
            edge + (0.02 if right else -0.02) * num_experts,
            row + 0.2,
            f"{name} {plain(mean.mean)}",
            color=colour,
            ha="left" if right else "right",
            va="center",
            fontweight="bold",
        )
    axes.set(xlim=(0, num_experts), ylim=(-0.18, len(rows) - 0.2), yticks=[])
    axes.grid(axis="x")


def locality_caption(
    means: Mapping[str, Estimate], num_experts: int, whole: Mapping[str, float]
) -> str:
    """
    Say how many experts a sequence uses, and compare the fine-tuned model with the others.

    *whole* is how many all sequences use together, by model: what is fewer there too is narrowed
    for the whole set of texts, and not for each.
    """
    after = means.get("fine-tuned")
    others = [name for name in ("control", "base") if name in means]
    if after is None or not others:
        each = [f"{model} {inline(mean)}" for model, mean in means.items()]
        text = f"A sequence uses, of {num_experts} experts per layer: {join(each)}"
    else:
        against = []
        for name in others:
            word = "fewer than" if after.mean < means[name].mean else "more than"
            word = word if apart(means[name], after) else "no difference shown from"
            against.append(f"{word} the {name}'s {inline(means[name])}")
        text = (
            f"A sequence of the fine-tuned model uses {inline(after)} of {num_experts} experts per "
            f"layer, {join(against)}"
        )
    if whole:
        each = [f"{model} {plain(count)}" for model, count in whole.items()]
        text += f". All sequences together use: {join(each)}"
    return f"{text}."


def usage(found: Measurements) -> Figure | None:
    """Draw one panel per model: sequences down, experts across, the layers side by side."""
    records = found.by_model("usage")
    if not records:
        return None
    models = in_order(records)
    shares = {model: used_shares(records[model]["counts"]) for model in models}
    halves = {model: experts_needed(shares[model], 0.5) for model in models}
    most = {model: experts_needed(shares[model], 0.9) for model in models}
    num_experts = int(records[models[0]]["num_experts"])
    said = [f"{model} {inline(halves[model])} and {inline(most[model])}" for model in models]
    caption = (
        "Each row is a sequence, each column an expert; the stronger its colour, the more of the "
        "sequence's choices in that layer fell on it. Strong columns are experts that all "
        "sequences share; strong cells in changing places are each sequence's own. Experts that "
        "take half and nine tenths of a sequence's choices, mean over what is shown: "
        f"{'; '.join(said)}."
    )
    panels: list[str] = []
    for model in models:
        shown = [int(layer) for layer in records[model]["shown_layers"]]
        sequences = shares[model].shape[1]
        # Three abreast are drawn smaller, so that their text comes out as large as that of two.
        width = 3.5 if len(models) > 2 else WIDTH_IN
        with panel(0.9 + 0.085 * sequences, width) as (figure, axes):
            gap = max(1, num_experts // 16)
            wide = np.full((sequences, len(shown) * (num_experts + gap) - gap), np.nan)
            for place in range(len(shown)):
                start = place * (num_experts + gap)
                wide[:, start : start + num_experts] = shares[model][place]
                middle = start + num_experts / 2 - 0.5
                axes.text(middle, -1.2, f"layer {shown[place]}", ha="center", fontsize=9)
            # One hue, as opaque as the share is large; a quarter of the choices is full ink.
            alpha = np.minimum(1.0, 4 * np.nan_to_num(wide)) ** 0.7
            ink = np.dstack([np.full_like(alpha, part) for part in HUE] + [alpha])
            axes.imshow(ink, aspect="auto", interpolation="none")
            axes.set(xticks=[], yticks=[], ylabel="sequences", xlabel="experts of each layer")
            axes.set_title(model, color=colour_of(model), pad=18)
            axes.grid(False)
            for side in ("left", "bottom"):
                axes.spines[side].set_visible(False)
            axes.tick_params(colors=COLOUR["muted"])
            panels.append(finish(figure, f"fig-usage-{len(panels)}", f"{model}: {caption}"))
    rows = [[Cell(model), cell(halves[model]), cell(most[model])] for model in models]
    columns = ["model", "experts for half the choices", "experts for nine tenths"]
    table = Table("usage", "Experts that take most of a sequence's choices", columns, rows)
    return Figure("usage", "Experts by sequence and layer", panels, caption, table)


def used_shares(counts: list[list[list[int]]]) -> NDArray[np.float64]:
    """Return each expert's share of a sequence's choices: (layers, sequences, experts)."""
    found = np.asarray(counts, dtype=np.float64)
    return np.asarray(found / np.maximum(found.sum(axis=-1, keepdims=True), 1))


def experts_needed(shares: NDArray[np.float64], part: float) -> Estimate:
    """Count the experts, the most used first, that take *part* of the choices: a mean."""
    sums = np.cumsum(-np.sort(-shares, axis=-1), axis=-1)
    needed = 1 + (sums < part - 1e-12).sum(axis=-1)
    used = shares.any(axis=-1)  # a layer that a sequence does not use needs none
    kept = used.any(axis=0)
    return bootstrap((needed * used).sum(axis=0)[kept], used.sum(axis=0)[kept])
