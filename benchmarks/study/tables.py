"""
Write the study's tables and frontiers from `benchmarks/results/study.jsonl`.

A study is many fine-tuning runs with several seeds, each beside its like-for-like control: the
same run without the locality terms. `--check` writes nothing and fails where docs/study.md is out
of date; `--figures DIR` writes each group's frontier as SVG.

Every seed's model was judged on the same items (examples, documents, prompts), so a measurement is
a table of seeds by items. Items are many: they are resampled, all seeds together. Seeds are few,
and resampling n of them would show (n - 1) / n of their variance; so each resample is shifted by
the standard error over seeds times a draw of Student's t with n - 1 degrees of freedom. With one
seed the interval covers items alone.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.earlier import differences, for_locality
from benchmarks.tables import update_readme
from melinoe.report.figures import COLOUR, Figure, panel
from melinoe.report.page import svg_files
from melinoe.report.table import DASH, Cell, Table, cell, inline, plain, signed
from melinoe.stats import Estimate

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/study.md")
Record = Mapping[str, Any]
Floats = NDArray[np.float64]
Columns = Sequence[Floats]
LEVEL, RESAMPLES, DRAWS_EACH = 0.95, 2000, 10
BASE, PLAIN = "base", "plain"  # the model itself, and fine-tuning on next tokens alone

NO_CONTROL = "no control run"
NOTE = (
    "In brackets: 95 % over seeds and items together. A price is perplexity over the like-for-like "
    "control with the same seed, trained alike without the locality terms; out of domain it is the "
    "geometric mean over the other corpora. Transfers are per completion token, all layers, each "
    "text from an empty cache, with "
)
UNPRICED = f"{NO_CONTROL}: this setting has no price, because its control was never trained."
OVER_PLAIN = (
    "Over plain fine-tuning: perplexity over a run on next tokens alone. It is no price of the "
    "locality terms, since it holds what teacher, replay and anchors do."
)


@dataclass
class Setting:
    """
    One thing that was tried, and its records by seed.

    Settings of one family differ in strength alone, which is None where nothing varies; *plain*
    names the plain fine-tuning that the setting is compared with.
    """

    group: str
    family: str
    strength: float | None
    name: str
    plain: str
    runs: dict[int, Record] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Training settings of the first seed; empty where the records hold none."""
        return next(iter(self.runs.values())).get("settings") or {}


@dataclass
class Study:
    """All settings by name, in the order read, and the base model's record."""

    base: Record | None
    settings: dict[str, Setting]

    @property
    def base_setting(self) -> Setting:
        assert self.base is not None
        return Setting(BASE, BASE, None, BASE, "", {0: self.base})

    @property
    def groups(self) -> list[str]:
        """Groups that have something to show, in the order read."""
        return list(dict.fromkeys(one.group for one in self.tried()))

    def tried(self, group: str | None = None) -> list[Setting]:
        """Settings, of one group or of all, that have a plain fine-tuning to compare with."""
        return [
            one
            for one in self.settings.values()
            if (group is None or one.group == group) and self.plain(one) is not None
        ]

    def plain(self, setting: Setting) -> Setting | None:
        """The plain fine-tuning that *setting* is compared with; it has none itself."""
        found = self.settings.get(setting.plain)
        if setting.group == PLAIN or found is None or not pairs(setting, found):
            return None
        return found

    def control(self, setting: Setting) -> Setting | None:
        """
        The setting that was trained alike but for the locality terms.

        None where no such setting was run, and for one without locality terms.
        """
        first = self.plain(setting)
        if first is None or not for_locality(setting.settings):
            return None
        beside = [one for one in self.settings.values() if one.plain == setting.plain]
        for one in [first, *(one for one in beside if one.group != PLAIN)]:
            both = pairs(setting, one)
            if both and all(_is_control(theirs, ours) for ours, theirs in both):
                return one
        return None


def gather(records: Sequence[Record]) -> Study:
    """Sort records of kind ``study`` by setting; other kinds are left out."""
    study = Study(None, {})
    for record in records:
        if record.get("kind") != "study":
            continue
        name = record["name"]
        if name == BASE:
            study.base = record
            continue
        if name not in study.settings:
            about = (record["group"], record["family"], record.get("strength"), name)
            study.settings[name] = Setting(*about, record.get("plain") or PLAIN)
        study.settings[name].runs[int(record["seed"])] = record
    return study


def pairs(setting: Setting, other: Setting) -> list[tuple[Record, Record]]:
    """Runs of both with the same seed."""
    both = sorted(setting.runs.keys() & other.runs.keys())
    return [(setting.runs[seed], other.runs[seed]) for seed in both]


def _is_control(theirs: Record, ours: Record) -> bool:
    """Whether two runs differ in the locality terms alone; no, where a record does not say."""
    said = theirs.get("settings")
    if not said or for_locality(said) or theirs.get("examples") != ours.get("examples"):
        return False
    return not differences(ours.get("settings") or {}, said)


def corpora(record: Record) -> tuple[list[str], list[str]]:
    """Names of the texts that were trained on, and of the others."""
    quality = record["quality"]
    inside = [name for name, item in quality.items() if item.get("in_domain")]
    return inside, [name for name in quality if name not in inside]


# --- numbers, with intervals over seeds and items -------------------------------------------------


def crossed(
    parts: Sequence[Columns],
    statistic: Callable[[list[Floats]], Floats],
    *,
    positive: bool = False,
    seed: int = 0,
) -> Estimate:
    """
    Estimate a statistic of sums, with an interval over seeds and items.

    Args:
        parts: One entry per kind of item (one corpus, say); each is a sequence of arrays, all
            ``(seeds, items)`` of that part, which are resampled together. What does not depend on
            the seed is repeated along the first axis.
        statistic: Called with one array ``(arrays, resamples)`` of sums per part; gives one value
            per resample.
        positive: The statistic is above 0, such as a ratio: seeds are taken to differ by factors.
        seed: Of the draw.

    Returns:
        Mean and the middle 95 % of 20,000 draws; ``n`` is the number of seeds.

    Raises:
        ValueError: arrays of one part differ in shape, or parts in their number of seeds.
    """
    stacked = [np.stack([np.asarray(column, float) for column in part]) for part in parts]
    seeds = stacked[0].shape[1]
    if any(part.shape[1] != seeds for part in stacked):
        raise ValueError("every part needs the same seeds")
    mean = float(statistic([part.sum(axis=(1, 2))[:, None] for part in stacked])[0])
    rng = np.random.default_rng(seed)
    sums, by_seed = [], []
    for part in stacked:
        draws = rng.integers(0, part.shape[2], size=(RESAMPLES, part.shape[2]))
        counts = np.zeros((RESAMPLES, part.shape[2]))
        np.add.at(counts, (np.arange(RESAMPLES)[:, None], draws), 1.0)
        sums.append(np.einsum("asi,ri->ar", part, counts, optimize=True))
        by_seed.append(part.sum(axis=2))

    def log(values: Floats) -> Floats:
        return np.log(np.maximum(values, 1e-12))  # a cache may have loaded nothing

    to, back = (log, np.exp) if positive else (np.asarray, np.asarray)
    drawn = np.repeat(to(statistic(sums)), DRAWS_EACH)
    if seeds > 1:
        error = float(np.std(to(statistic(by_seed)), ddof=1)) / seeds**0.5
        drawn = drawn + error * rng.standard_t(seeds - 1, size=drawn.size)
    low, high = back(np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Estimate(mean, float(low), float(high), seeds)


def increase(
    setting: Setting, other: Setting | None, in_domain: bool, text: str | None = None
) -> Estimate | None:
    """
    Perplexity over the other's with the same seed, minus 1: 0.02 is 2 % worse.

    Over several texts it is the geometric mean of the factors, every text weighing the same; with
    *text*, over that one alone. None without the other or without such texts.
    """
    if other is None:
        return None
    runs = pairs(setting, other)
    texts = corpora(runs[0][0])[0 if in_domain else 1] if text is None else [text]
    if not texts:
        return None
    ours, theirs = [one for one, _ in runs], [two for _, two in runs]
    parts = [
        (_column(ours, name, "nll"), _column(theirs, name, "nll"), _column(ours, name, "tokens"))
        for name in texts
    ]

    def statistic(sums: list[Floats]) -> Floats:
        return np.exp(np.mean([(mine - its) / tokens for mine, its, tokens in sums], axis=0))

    factor = crossed(parts, statistic, positive=True)
    return Estimate(factor.mean - 1, factor.low - 1, factor.high - 1, factor.n)


def transfers(setting: Setting, cache: str) -> Estimate:
    """Transfers per generated token with a cache such as ``lfu-8``, over seeds and prompts."""
    return crossed([_moved(list(setting.runs.values()), cache)], _rate, positive=True)


def fewer(study: Study, setting: Setting, cache: str) -> Estimate | None:
    """
    How many times fewer transfers than the base model, over seeds and prompts.

    None without a base, or where nothing was transferred, which has no ratio.
    """
    if study.base is None:
        return None
    ours = list(setting.runs.values())
    columns = (*_moved([study.base] * len(ours), cache), *_moved(ours, cache))
    if not np.any(columns[2]):
        return None

    def statistic(sums: list[Floats]) -> Floats:
        base, base_tokens, mine, my_tokens = sums[0]
        return (base / base_tokens) / np.maximum(mine / my_tokens, 1e-12)

    return crossed([columns], statistic, positive=True)


def perplexity(setting: Setting, text: str) -> Estimate:
    """Perplexity on one text, over seeds and examples."""
    runs = list(setting.runs.values())
    part = (_column(runs, text, "nll"), _column(runs, text, "tokens"))
    return crossed([part], lambda sums: np.exp(_rate(sums)), positive=True)


def average(setting: Setting, key: str) -> float:
    """Mean over seeds of a list that each run holds."""
    return float(np.mean([np.nanmean(run[key]) for run in setting.runs.values()]))


def _rate(sums: list[Floats]) -> Floats:
    return sums[0][0] / sums[0][1]


def _column(runs: Sequence[Record], text: str, key: str) -> Floats:
    return np.array([run["quality"][text][key] for run in runs], dtype=np.float64)


def _moved(runs: Sequence[Record], cache: str) -> Columns:
    loads = np.array([run["transfers"][cache]["loads"] for run in runs], dtype=np.float64)
    return loads, np.array([run["tokens"] for run in runs], dtype=np.float64)


# --- tables ---------------------------------------------------------------------------------------


def study_tables(study: Study) -> list[Table]:
    """The table of each group: price and saving of each setting."""
    return [price_table(study, group) for group in study.groups]


def price_table(study: Study, group: str) -> Table:
    """Price and saving of each setting of a group, below the base and the plain fine-tunings."""
    tried = study.tried(group)
    record = next(iter(tried[0].runs.values()))
    quarter, experts = quarter_cache(record), int(record["num_experts"])
    inside = corpora(record)[0]
    columns = ["setting", "seeds", *(f"perplexity, {text}" for text in inside)]
    columns += ["price in domain", "price out of domain"]
    # Where every control is the plain run, the change over that is the price, and said once.
    apart = any(study.control(one) is not study.plain(one) for one in tried)
    columns += [f"over plain fine-tuning, {where} domain" for where in ("in", "out of") if apart]
    columns += ["transfers / token", "times fewer than base"]
    columns += ["experts per sequence", "distinct over the whole set"]
    rows = []
    for one in _rows(study, group):
        over = [increase(one, study.plain(one), inside) for inside in (True, False) if apart]
        rows.append(
            [
                Cell(one.name),
                Cell(str(len(one.runs))),
                *(cell(perplexity(one, text)) for text in inside),
                *(_price(study, one, inside) for inside in (True, False)),
                *(_signed(change) for change in over),
                cell(transfers(one, quarter)),
                cell(fewer(study, one, quarter)) if one.name != BASE else Cell(DASH),
                Cell(plain(average(one, "experts_per_sequence"))),
                Cell(f"{plain(average(one, 'distinct_experts'))} of {experts}"),
            ]
        )
    notes = [f"{NOTE}{_cache_title(quarter, experts)}."]
    notes += [UNPRICED] if any(one.text == NO_CONTROL for row in rows for one in row) else []
    notes += [OVER_PLAIN] if apart else []
    return Table(f"study-{group}", f"Study, {group}: what it costs and saves", columns, rows, notes)


def _rows(study: Study, group: str) -> Iterator[Setting]:
    if study.base is not None:
        yield study.base_setting
    tried = study.tried(group)
    for name in dict.fromkeys(one.plain for one in tried):
        yield study.settings[name]
    yield from tried


def quarter_cache(record: Record) -> str:
    """Choose the cache that results are stated for: LFU with the slots nearest to a quarter."""
    quarter = record["num_experts"] / 4
    return min(
        record["transfers"], key=lambda name: (abs(_slots(name) - quarter), name[:3] != "lfu")
    )


def _slots(cache: str) -> int:
    return int(cache.rpartition("-")[2])


def _cache_title(cache: str, experts: int) -> str:
    policy = cache.rpartition("-")[0].upper()
    return f"{policy}, {100 * _slots(cache) / experts:g} % of the experts resident"


def _price(study: Study, setting: Setting, in_domain: bool) -> Cell:
    control = study.control(setting)
    if control is None and for_locality(setting.settings):
        return Cell(NO_CONTROL)
    return _signed(increase(setting, control, in_domain))


def _signed(price: Estimate | None) -> Cell:
    if price is None:
        return Cell(DASH)
    mean, interval = signed(price).removesuffix("]").split(" [")
    return Cell(mean, interval)


# --- the frontier ---------------------------------------------------------------------------------

HUES = ("tuned", "base", "control", "other", "rose", "olive", "slate")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LONG_NAME, MOST_PLAIN = 23, 2
WHERE = {True: "in domain", False: "out of domain"}


def frontier(study: Study, group: str = "frontier") -> Figure | None:
    """
    Draw transfers per token against the price in perplexity, in and out of domain.

    One line per family through the means of its strengths, weakest first, with the interval of
    each in both directions. Lower and further left is better. Settings without a like-for-like
    control have no price and are not drawn; None where that leaves nothing.
    """
    tried = [one for one in study.tried(group) if study.control(one) is not None]
    if not tried:
        return None
    cache = quarter_cache(next(iter(tried[0].runs.values())))
    families = list(dict.fromkeys(one.family for one in tried))
    # Long names of a legend stand one below the other, or they would squeeze the axes.
    columns = 1 if max(map(len, families)) > LONG_NAME else 2
    caption = _caption(study, tried, cache)
    panels: list[str] = []
    for inside in (True, False):
        with panel(panels, 4.0 + 0.22 * -(-len(families) // columns)) as figure:
            axes = figure.add_subplot()
            for index, family in enumerate(families):
                _line(axes, study, [one for one in tried if one.family == family], inside, index)
            _levels(axes, study, tried, cache)
            axes.set_xlabel(f"perplexity {WHERE[inside]} over the like-for-like control (%)")
            axes.set_ylabel(f"transfers per token ({cache.replace('-', ', ').upper()} slots)")
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
            axes.grid(axis="both")
            axes.set_title(f"Price {WHERE[inside]}")
            # Below the axes, where it covers no point.
            at = {"loc": "upper left", "bbox_to_anchor": (-0.04, -0.19)}
            axes.legend(frameon=False, ncols=columns, handlelength=1.6, **at)
    title = "Price against transfers"
    return Figure(f"study-{group}", title, panels, caption, price_table(study, group))


def _line(axes: Any, study: Study, family: list[Setting], inside: bool, index: int) -> None:
    """One family's settings, weakest first, with their intervals."""
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


def _reach(estimates: list[Estimate], scale: float) -> list[list[float]]:
    """How far each interval reaches below and above its mean, never less than nothing."""
    below = [scale * max(0.0, one.mean - one.low) for one in estimates]
    above = [scale * max(0.0, one.high - one.mean) for one in estimates]
    return [below, above]


def _levels(axes: Any, study: Study, tried: list[Setting], cache: str) -> None:
    """Draw the base and plain runs as lines across; the lowest has its name below it."""
    names = list(dict.fromkeys(one.plain for one in tried))
    if len(names) > MOST_PLAIN:  # their names would cover each other; the table has them all
        names = names[:1]
    shown = [study.base_setting] if study.base is not None else []
    shown += [study.settings[name] for name in names]
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
    """Name the settings that no other beats in both price in domain and transfers."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    parser.add_argument("--figures", type=Path, help="write the frontiers into this directory")
    asked = parser.parse_args()
    lines = (RESULTS / "study.jsonl").read_text(encoding="utf-8").splitlines()
    study = gather([json.loads(line) for line in lines])
    if asked.figures is not None:
        figures = [frontier(study, group) for group in study.groups]
        written = svg_files([one for one in figures if one is not None])
        asked.figures.mkdir(parents=True, exist_ok=True)
        for name, drawing in written.items():
            (asked.figures / name).write_text(drawing, encoding="utf-8")
        print(f"{asked.figures}: wrote {len(written)} figures", file=sys.stderr)
        return
    stale = update_readme(PAGE, [RESULTS], asked.check, study_tables(study))
    if asked.check and stale:
        sys.exit(f"{PAGE} is out of date in {', '.join(stale)}; run the same without --check")
    print(f"{PAGE}: {'wrote ' + ', '.join(stale) if stale else 'up to date'}", file=sys.stderr)


if __name__ == "__main__":
    main()
