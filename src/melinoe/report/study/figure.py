"""The frontier: what each setting costs in perplexity against what it saves in transfers."""

from typing import Any

from melinoe.report.amounts import inline, signed
from melinoe.report.figures.base import Figure
from melinoe.report.figures.svg import COLOUR, finish, panel
from melinoe.report.records import Measurements
from melinoe.report.study.compare import increase, transfers
from melinoe.report.study.runs import Setting, Study, gather
from melinoe.report.study.table import quarter_cache, study_tables
from melinoe.stats import Estimate

HUES = ("tuned", "base", "control", "other", "rose", "olive", "slate")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LONG_NAME, MOST_PLAIN = 23, 2
WHERE = {True: "in domain", False: "out of domain"}


def frontier(found: Measurements, group: str = "frontier") -> Figure | None:
    """
    Transfers per token against the price in perplexity, in and out of domain.

    One line per family through the means of its strengths, weakest first, with the interval of
    each in both directions. Lower and further left is better. Settings without a like-for-like
    control have no price and are not drawn; ``None`` where that leaves nothing.
    """
    study = gather(found)
    if study is None or group not in study.groups:
        return None
    tried = [one for one in study.tried(group) if study.control(one) is not None]
    if not tried:
        return None
    record = next(iter(tried[0].runs.values()))
    cache = quarter_cache(record)
    families = list(dict.fromkeys(one.family for one in tried))
    caption = _caption(study, tried, cache)
    panels = []
    for inside in (True, False):
        with panel(4.0 + 0.22 * _rows(families)) as (figure, axes):
            for index, family in enumerate(families):
                _line(axes, study, [one for one in tried if one.family == family], inside, index)
            _levels(axes, study, tried, cache)
            axes.set_xlabel(f"perplexity {WHERE[inside]} over the like-for-like control (%)")
            axes.set_ylabel(f"transfers per token ({cache.replace('-', ', ').upper()} slots)")
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
            axes.grid(axis="both")
            axes.set_title(f"Price {WHERE[inside]}")
            _legend(axes, families)
            name = f"fig-{group}-{'in' if inside else 'out'}"
            panels.append(finish(figure, name, f"Price {WHERE[inside]}. {caption}"))
    (table,) = [one for one in study_tables(found) if one.name == f"study-{group}"]
    return Figure(f"study-{group}", "Price against transfers", panels, caption, table)


def _line(axes: Any, study: Study, family: list[Setting], inside: bool, index: int) -> None:
    ordered = sorted(family, key=lambda one: one.strength or 0.0)
    cache = quarter_cache(next(iter(ordered[0].runs.values())))
    points = [(increase(one, study.control(one), inside), transfers(one, cache)) for one in ordered]
    kept = [(price, moved) for price, moved in points if price is not None]
    if not kept:
        return
    # With more families than colours, a colour comes back with another marker.
    colour = COLOUR[HUES[index % len(HUES)]]
    marker = MARKERS[(index + index // len(HUES)) % len(MARKERS)]
    x, y = [100 * price.mean for price, _ in kept], [moved.mean for _, moved in kept]
    spread_x = _reach([price for price, _ in kept], 100)
    spread_y = _reach([moved for _, moved in kept], 1)
    axes.errorbar(x, y, spread_y, spread_x, fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.55)
    axes.plot(x, y, marker=marker, markersize=6, color=colour, label=ordered[0].family)


def _columns(families: list[str]) -> int:
    """Of a legend: long names stand one below the other, or they would squeeze the axes."""
    return 1 if max(map(len, families)) > LONG_NAME else 2


def _rows(families: list[str]) -> int:
    return -(-len(families) // _columns(families))


def _legend(axes: Any, families: list[str]) -> None:
    """Below the axes, where it covers no point."""
    axes.legend(
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(-0.04, -0.19),
        ncols=_columns(families),
        handlelength=1.6,
    )


def _reach(estimates: list[Estimate], scale: float) -> list[list[float]]:
    """How far each interval reaches below and above its mean, never less than nothing."""
    below = [scale * max(0.0, one.mean - one.low) for one in estimates]
    above = [scale * max(0.0, one.high - one.mean) for one in estimates]
    return [below, above]


def _levels(axes: Any, study: Study, tried: list[Setting], cache: str) -> None:
    """Where base and plain runs stand, as lines across; the lowest has its name below it."""
    plain = list(dict.fromkeys(one.plain for one in tried))
    if len(plain) > MOST_PLAIN:  # their names would cover each other; the table has them all
        plain = plain[:1]
    others = [study.settings[name] for name in plain]
    shown = ([study.base_setting] if study.base is not None else []) + others
    levels = sorted((transfers(one, cache).mean, one.name) for one in shown)
    for place, (level, name) in enumerate(levels):
        axes.axhline(level, color=COLOUR["muted"], linewidth=0.9, linestyle=(0, (3, 3)))
        below, left = place == 0 and len(levels) > 1, place % 2 == 1
        axes.annotate(
            name,
            (0.01 if left else 0.99, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3 if below else 2),
            textcoords="offset points",
            va="top" if below else "bottom",
            ha="left" if left else "right",
            color=COLOUR["muted"],
            fontsize=9,
        )


def _caption(study: Study, tried: list[Setting], cache: str) -> str:
    """Say which settings of the group no other beats in both price in domain and transfers."""
    rated = [
        (one, price, transfers(one, cache))
        for one in tried
        if (price := increase(one, study.control(one), True)) is not None
    ]
    best = [
        (one, price, moved)
        for one, price, moved in rated
        if not any(
            other_price.mean <= price.mean and other_moved.mean < moved.mean
            for other, other_price, other_moved in rated
            if other is not one
        )
    ]
    best.sort(key=lambda item: item[1].mean)
    said = [f"{one.name} ({signed(price)}, {inline(moved)})" for one, price, moved in best]
    return (
        "Each point is the mean over seeds with its 95 % interval; lower and further left is "
        "better. By their means not beaten in both price in domain and transfers, cheapest first: "
        f"{'; '.join(said)}."
    )
