"""Which experts each sequence used, layer by layer: the picture behind the averages."""

import numpy as np
from numpy.typing import NDArray

from melinoe.report.amounts import inline
from melinoe.report.figures.base import Figure, colour_of, last
from melinoe.report.figures.svg import COLOUR, WIDTH_IN, finish, panel
from melinoe.report.records import Measurements
from melinoe.report.tables import Cell, Table, cell, ordered_models
from melinoe.stats import Estimate, bootstrap

# Pictures of pixels cannot follow the page's colours; this one is legible on light and dark.
HUE = (0.16, 0.55, 0.62)


def usage(found: Measurements) -> Figure | None:
    """One panel per model: sequences down, experts across, the layers side by side."""
    records = {key[0]: record for key, record in last(found.of("usage"), "model").items()}
    if not records:
        return None
    models = ordered_models(records)
    shares = {model: _shares(records[model]["counts"]) for model in models}
    halves = {model: _needed(shares[model], 0.5) for model in models}
    most = {model: _needed(shares[model], 0.9) for model in models}
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
            axes.imshow(_ink(wide), aspect="auto", interpolation="none")
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


def _shares(counts: list[list[list[int]]]) -> NDArray[np.float64]:
    """Share of each sequence's choices by expert: (layers, sequences, experts)."""
    found = np.asarray(counts, dtype=np.float64)
    return np.asarray(found / np.maximum(found.sum(axis=-1, keepdims=True), 1))


def _needed(shares: NDArray[np.float64], part: float) -> Estimate:
    """How many experts, the most used first, take *part* of the choices: mean over sequences."""
    sums = np.cumsum(-np.sort(-shares, axis=-1), axis=-1)
    needed = 1 + (sums < part - 1e-12).sum(axis=-1)
    used = shares.any(axis=-1)  # a layer that a sequence does not use needs none
    kept = used.any(axis=0)
    return bootstrap((needed * used).sum(axis=0)[kept], used.sum(axis=0)[kept])


def _ink(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours: one hue, as opaque as the share is large; a quarter of the choices is full ink."""
    alpha = np.where(np.isnan(shares), 0.0, np.minimum(1.0, 4 * np.nan_to_num(shares)) ** 0.7)
    return np.dstack([np.full_like(alpha, part) for part in HUE] + [alpha])
