"""Draw the figures of a report: each shows what records hold, and says in a sentence what it is."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from math import floor
from typing import Any

from melinoe.report.comparing import in_order
from melinoe.report.records import Measurements, Record, estimate
from melinoe.report.table import NOT_MEASURED, Cell, Table, cell, plain
from melinoe.stats import Estimate, bootstrap

# After Okabe and Ito, distinct without colour vision; darkened to be legible as text.
COLOUR = {
    **{"ink": "#1c2126", "muted": "#5b6570", "grid": "#e4e6e3"},
    **{"base": "#0067a5", "control": "#b35a00", "tuned": "#00775a", "other": "#8a4a86"},
    **{"rose": "#b8325c", "olive": "#6b6a00", "slate": "#4f5f86"},
}
MODELS = {"base": "base", "control": "control", "fine-tuned": "tuned"}  # to their colours
# A drawing is made for a light page; on a dark one it is inverted, hues kept.
DARK = "@media (prefers-color-scheme: dark){:root{filter:invert(1) hue-rotate(180deg)}}</style>"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "melinoe",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOUR["grid"],
    "text.color": COLOUR["ink"],
    "legend.frameon": False,
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    **{f"{of}.facecolor": "none" for of in ("figure", "axes", "savefig")},
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor"), COLOUR["muted"]),
    **dict.fromkeys(("xtick.color", "ytick.color"), COLOUR["muted"]),
}


@dataclass(frozen=True)
class Figure:
    """A figure: its panels as SVG, a sentence on what they show, and its numbers as a table."""

    name: str
    title: str
    panels: list[str]
    caption: str
    table: Table


@contextmanager
def panel(panels: list[str], height_in: float = 3.1, width_in: float = 5.0) -> Iterator[Any]:
    """Open a matplotlib figure in the report's style; what was drawn is added to *panels*."""
    # Imported here: tables and README updates need no matplotlib, and it takes a second to load.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        yield figure
        buffer = io.StringIO()
        same = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no clock, no version
        figure.savefig(buffer, format="svg", metadata=same)
    svg = buffer.getvalue()
    panels.append(svg[svg.index("<svg") :].replace("</style>", DARK, 1))


def looks(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return colour and marker of each name: models have colours of their own."""
    names = list(names)
    taken = {MODELS[name] for name in names if name in MODELS}
    others = ("other", "base", "tuned", "rose", "olive", "slate")
    free = cycle([COLOUR[name] for name in others if name not in taken])
    colours = {name: COLOUR[MODELS[name]] if name in MODELS else next(free) for name in names}
    markers = zip(colours.items(), cycle("osD^vPX"))
    return {name: {"color": colour, "marker": one} for (name, colour), one in markers}


def locality(found: Measurements) -> Figure | None:
    """Draw the distribution over sequences of how many experts they use, one row per model."""
    records = found.by_model("locality")
    if not records:
        return None
    models, panels = in_order(records), list[str]()
    num_experts = records[models[0]]["num_experts"]
    means = {m: bootstrap(records[m]["experts_per_sequence"]) for m in models}
    whole = {m: n for m in models if (n := records[m].get("distinct_experts")) is not None}
    with panel(panels, 0.9 + 0.6 * len(models)) as figure:
        axes = figure.add_subplot()
        for row, (model, look) in enumerate(looks(models).items()):
            values, ink = records[model]["experts_per_sequence"], {"color": look["color"]}
            shape = {"orientation": "horizontal", "widths": 0.5, "flierprops": {"marker": "."}}
            parts = dict.fromkeys(("boxprops", "whiskerprops", "capprops", "medianprops"), ink)
            axes.boxplot(values, positions=[row], tick_labels=[model], **shape, **parts)
        axes.set(xlim=(0, num_experts), ylim=(len(models) - 0.4, -0.6))
        axes.set_xlabel(f"experts a sequence uses, of {num_experts} in a layer")
    rows = []
    for m in models:
        of_all = Cell(f"{plain(whole[m])} of {num_experts}" if m in whole else NOT_MEASURED)
        rows.append([Cell(m), cell(means[m]), cell(estimate(records[m], "reuse"), "%"), of_all])
    columns = ["model", "experts per sequence", "reuse", "distinct over the whole set"]
    table = Table("locality", "Experts used", columns, rows)
    caption = (
        "Experts that one sequence uses; a box holds the middle half of the sequences. Where all "
        "of them together use hardly more, the model was narrowed for the whole set of texts, not "
        "for each."
    )
    return Figure("locality", "Experts a sequence uses", panels, caption, table)


def curves(found: Measurements, slots: int | None) -> Figure | None:
    """Draw hit rate against slots: a panel per model, a line per policy with its interval."""
    records = {(record["model"], record["policy"]): record for record in found.of("curve")}
    if not records:
        return None
    models, panels = in_order(model for model, _ in records), list[str]()
    first = next(iter(records.values()))
    num_experts, counts = first["num_experts"], first["slots"]
    policies = sorted(dict.fromkeys(p for _, p in records), key=lambda name: name == "belady")
    bound = {p: {"color": COLOUR["muted"], "linestyle": ":"} for p in policies if p == "belady"}
    # One scale for all panels: they are there to be compared.
    lowest = min(rate["low"] for record in records.values() for rate in record["hit_rate"])
    limits = {"xlim": (0, num_experts), "ylim": (10 * floor(10 * lowest), 102)}
    for model in models:
        with panel(panels, 3.6) as figure:
            axes = figure.add_subplot(title=model, ylabel="hit rate (%)", **limits)
            for policy, look in (looks(policies) | bound).items():
                if record := records.get((model, policy)):
                    _band(axes, record["slots"], record["hit_rate"], policy_name(policy), **look)
            if slots is not None:
                axes.axvline(slots, color=COLOUR["muted"], linewidth=0.8)
            axes.set_xlabel(f"slots per layer (of {num_experts} experts)")
            axes.legend(loc="lower right")
    rows = [
        [Cell(f"{m}, {p}"), *(cell(Estimate.from_dict(one), "%") for one in record["hit_rate"])]
        for (m, p), record in sorted(records.items(), key=lambda at: models.index(at[0][0]))
        if record["slots"] == counts
    ]
    caption = (
        f"Of {num_experts} experts per layer, so many slots hold some; what is missing to 100 % is "
        "the miss ratio. Belady knows the future: no policy that can serve does better."
    )
    columns = ["model, policy", *map(str, counts)]
    table = Table("curves", "Hit rate by slots per layer", columns, rows)
    return Figure("curves", "Hit rate against slots", panels, caption, table)


def policy_name(policy: str) -> str:
    """Write a policy's name as people do: ``LRU``, ``static``."""
    if policy == "belady":
        return "Belady"
    return policy.upper() if policy in ("lru", "lfu") else policy


def _band(axes: Any, at: Sequence[int], rates: Sequence[Record], label: str, **look: Any) -> None:
    """Draw a line of rates in percent, and its interval as a band."""
    low, mean, high = ([100 * one[end] for one in rates] for end in ("low", "mean", "high"))
    axes.fill_between(at, low, high, color=look["color"], alpha=0.14, linewidth=0)
    axes.plot(at, mean, label=label, markersize=4, **look)
