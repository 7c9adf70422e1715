"""The figures of a model card, as PNG: a hub page takes no style sheet of ours."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from melinoe.report.amounts import plain
from melinoe.report.figures.svg import RC, STAND_INS
from melinoe.report.schema import TRAINING_TERMS

# The page's colours on paper; see the style sheet.
PALETTE = {
    "ink": "#1c2126",
    "muted": "#5b6570",
    "grid": "#e4e6e3",
    "base": "#0067a5",
    "control": "#b35a00",
    "tuned": "#00775a",
    "other": "#8a4a86",
    "page": "#ffffff",
}
DPI = 144
# In the order of the legend.
_SIDES = (
    ("before", "before fine-tuning", PALETTE["base"]),
    ("control", "control", PALETTE["control"]),
    ("after", "after fine-tuning", PALETTE["tuned"]),
)
_PANELS = ("nll", "cache")  # what every run logs and every reader asks for


@contextmanager
def _canvas(width_in: float, height_in: float, panels: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """A white figure in the report's style, and its axes side by side."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {key: PALETTE.get(STAND_INS.get(str(value), ""), value) for key, value in RC.items()}
    style |= dict.fromkeys(("figure.facecolor", "savefig.facecolor"), PALETTE["page"])
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _png(figure: Any) -> bytes:
    """The figure's bytes; equal drawings give equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _sides(outcome: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The models that were measured: key, name in a legend, colour."""
    return [side for side in _SIDES if outcome.get(side[0])]


def losses(log: list[Mapping[str, Any]], under_prior: bool = False) -> bytes | None:
    """
    Loss terms over the steps of training, and their held-out values; ``None`` without a log.

    Held-out texts are read with the routers' own choices. A model that trained *under_prior* took
    others while it trained, so that its two kinds of values do not compare: they stand apart.
    """
    terms = [term for term in _PANELS if any(row.get(term) is not None for row in log)]
    if not terms:
        return None
    drawn = {
        name: [(row["step"], row[name]) for row in log if row.get(name) is not None]
        for term in terms
        for name in (term, f"eval_{term}")
    }
    panels = [[term, f"eval_{term}"] for term in terms]
    if under_prior:
        panels = [[name] for pair in panels for name in pair if drawn[name]]
    with _canvas(4.2 * len(panels), 3.0, len(panels)) as (figure, all_axes):
        for names, axes in zip(panels, all_axes, strict=True):
            for name in names:
                if drawn[name]:
                    _curve(axes, drawn[name], name.startswith("eval_"))
            if sum(bool(drawn[name]) for name in names) > 1:
                axes.legend(frameon=False, loc="upper right")
            title = TRAINING_TERMS[names[0].removeprefix("eval_")]
            if under_prior:
                own = names[0].startswith("eval_")
                title += "\nheld out, own choices" if own else "\ntraining, choices under the prior"
            axes.set_title(title)
            axes.set_xlabel("training step")
            axes.set_xlim(0, max(step for name in names for step, _ in drawn[name]))
        return _png(figure)


def _curve(axes: Any, points: list[tuple[int, float]], held_out: bool) -> None:
    steps, values = zip(*points, strict=True)
    if not held_out:
        axes.plot(steps, values, color=PALETTE["tuned"], label="training")
        return
    axes.plot(
        steps,
        values,
        "o-" if len(points) > 2 else "o",
        color=PALETTE["control"],
        markersize=6,
        linewidth=1.2,
        label="held out",
        clip_on=False,
        zorder=3,
    )


def experts(outcome: Mapping[str, Any]) -> bytes:
    """Distinct experts that each sequence used, by model: spread, mean and interval."""
    total, sides = outcome["num_experts"], _sides(outcome)
    with _canvas(6.4, 0.9 + 0.8 * len(sides)) as (figure, (axes,)):
        for row, (side, _, colour) in enumerate(reversed(sides)):
            values = np.asarray(outcome[side]["writing"]["experts_per_sequence"], dtype=float)
            mean = outcome[side]["writing"]["experts_per_sequence_mean"]
            counts, edges = np.histogram(values, bins=np.linspace(0, total, 49))
            axes.stairs(
                row + 0.6 * counts / counts.max(),
                edges,
                baseline=row,
                fill=True,
                color=colour,
                alpha=0.35,
            )
            axes.plot([mean["low"], mean["high"]], [row, row], color=colour, linewidth=5)
            axes.plot([mean["mean"]], [row], "o", color=colour, markersize=7)
            # On the side with more room.
            right = mean["mean"] < 0.6 * total
            axes.text(
                values.max() + edges[1] + 0.01 * total if right else values.min() - 0.02 * total,
                row + 0.18,
                f"{side} {plain(mean['mean'])}",
                color=colour,
                ha="left" if right else "right",
                va="center",
                fontweight="bold",
            )
        axes.set(xlim=(0, total), ylim=(-0.18, len(sides) - 0.25), yticks=[])
        axes.set_xlabel(f"distinct experts a completion uses, mean over layers (of {total})")
        axes.grid(axis="x")
        return _png(figure)


def hit_rates(outcome: Mapping[str, Any]) -> bytes:
    """Hit rate of completions against slots per layer, one panel per policy, with intervals."""
    policies, sides = list(outcome["after"]["writing"]["caches"]), _sides(outcome)
    lowest = min(
        item["low"]
        for side, *_ in sides
        for cache in outcome[side]["writing"]["caches"].values()
        for item in cache["hit_rate"]
    )
    bottom = 10 * int(10 * lowest)
    with _canvas(4.2 * len(policies), 3.3, len(policies)) as (figure, all_axes):
        for policy, axes in zip(policies, all_axes, strict=True):
            for side, name, colour in sides:
                cache = outcome[side]["writing"]["caches"][policy]
                low, mean, high = (
                    [100 * item[end] for item in cache["hit_rate"]]
                    for end in ("low", "mean", "high")
                )
                axes.fill_between(cache["slots"], low, high, color=colour, alpha=0.16, linewidth=0)
                axes.plot(cache["slots"], mean, color=colour, label=name)
            axes.axvline(outcome["slots"], color=PALETTE["muted"], linewidth=0.8)
            axes.text(
                outcome["slots"],
                bottom + 0.02 * (101 - bottom),
                f" {outcome['slots']} slots",
                color=PALETTE["muted"],
                fontsize=9,
            )
            axes.set(xlim=(0, outcome["num_experts"]), ylim=(bottom, 101))
            axes.set_xlabel(f"slots per layer (of {outcome['num_experts']} experts)")
            axes.set_title(policy.upper())
        all_axes[0].set_ylabel("hit rate (%)")
        all_axes[-1].legend(frameon=False, loc="lower right")
        return _png(figure)
