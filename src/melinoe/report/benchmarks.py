"""Tables of benchmark results: JSON files with ``benchmark``, its figures, and the machine."""

from collections.abc import Iterator, Mapping
from typing import Any

from melinoe.report.amounts import label, plain
from melinoe.report.facts import hardware
from melinoe.report.records import Measurements
from melinoe.report.schema import Record
from melinoe.report.tables import Cell, Table, cell
from melinoe.stats import Estimate

# Not figures: what a result file says about itself.
ABOUT = frozenset(
    {"benchmark", "kind", "machine", "versions", "commit", "date", "command", "question", "note"}
    | {"notes", "settings", "title", "floor", "bad_news", "not_measured"}
)


# The middle of a figure and its two ends, by the names that benchmarks give them.
RANGES = tuple(
    (middle, low, high)
    for middle in ("mean", "median")
    for low, high in (("low", "high"), ("p5", "p95"), ("min", "max"))
)


INTERVALS = "Below or in brackets: a 95 % interval."
SEEN = "Below or in brackets: the range that the benchmark saw."
BOTH = (
    "Below or in brackets: a 95 % interval for a mean, "
    "the range that the benchmark saw for a median."
)


def spread_of(value: Any) -> Estimate | None:
    """Take an estimate, or a median with its range, from a mapping that is one."""
    if isinstance(value, Mapping):
        for names in RANGES:
            ends = [value.get(name) for name in names]
            if all(isinstance(end, int | float) for end in ends):
                centre, low, high = (float(end) for end in ends if end is not None)
                return Estimate(centre, low, high, int(value.get("n", 0)))
    return None


def brackets(value: Any) -> str | None:
    """
    Say what the brackets of a table mean: intervals of means, ranges that were seen, or both.

    A mean between ``low`` and ``high`` is an estimate with its interval.
    """
    kinds = set(_kinds_of_ranges(value))
    if not kinds:
        return None
    return BOTH if len(kinds) == 2 else INTERVALS if kinds == {True} else SEEN


def _kinds_of_ranges(value: Any) -> Iterator[bool]:
    """For each range within *value*, whether it is an interval."""
    if spread_of(value) is not None:
        yield {"mean", "low", "high"} <= value.keys()
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _kinds_of_ranges(one)


def value_cell(key: str, value: Any) -> Cell:
    """Make the cell of one figure: an estimate, a median with its range, a number or a text."""
    scale = 1 / 2**30 if key.endswith("_bytes") else 1.0
    if (found := spread_of(value)) is not None:
        scaled = (scale * found.mean, scale * found.low, scale * found.high)
        return cell(Estimate(*scaled, found.n))
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{label(k)} {value_cell(k, v).inline()}" for k, v in value.items()))
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int) and scale == 1:
        return Cell(f"{value:,}")
    if isinstance(value, int | float):
        return Cell(plain(scale * value))
    if isinstance(value, list | tuple):
        return Cell(", ".join(value_cell(key, item).inline() for item in value))
    return Cell("n/a" if value is None else str(value))


def figures_of(
    result: Mapping[str, Any], path: tuple[str, ...] = (), unit: str = ""
) -> Iterator[tuple[str, Cell]]:
    """Go through nested figures, each as (name, cell); a unit holds for all below it."""
    for key, value in result.items():
        own = unit if label(key) == key.replace("_", " ") else key
        names = (*path, str(key))
        if isinstance(value, Mapping) and spread_of(value) is None and value:
            yield from figures_of(value, names, own)
        else:
            yield _name(names, own), value_cell(own or str(key), value)


def _name(path: tuple[str, ...], unit_key: str) -> str:
    """Join the names of a nested figure, its unit at the end: ``request, lru, all hits (µs)``."""
    bare = [label(key).partition(" (")[0] if key == unit_key else label(key) for key in path]
    unit = label(unit_key).partition(" (")[2]
    return ", ".join(bare) + (f" ({unit}" if unit else "")


def benchmark_table(record: Record) -> Table:
    """
    Make the table of one benchmark's result.

    ``result`` (without it, every figure of the record) may be a list of rows or
    a mapping of figures, nested as deep as it likes; ``{mean, low, high}``, ``{median, min, max}``
    and ``{median, p5, p95}`` are one value with its range. Sentences in ``notes`` stand below it.
    Columns that hold nothing in any row are left out.
    """
    result = record.get("result")
    if result is None:
        result = {key: value for key, value in record.items() if key not in ABOUT}
    name = record["benchmark"].replace("_", "-")
    machine = hardware(record.get("machine") or {})
    notes = [str(note) for note in record.get("notes") or []]
    notes += [f"Machine: {machine}."] if machine else []
    notes = [note for note in (brackets(result),) if note is not None] + notes
    title = str(record.get("title") or name.replace("-", " ").capitalize())
    if isinstance(result, list) and result and all(isinstance(row, Mapping) for row in result):
        told = {key for row in result for key, value in row.items() if value is not None}
        columns = [key for key in dict.fromkeys(k for row in result for k in row) if key in told]
        cells = [[value_cell(key, row.get(key)) for key in columns] for row in result]
        return Table(name, title, [label(key) for key in columns], cells, notes)
    figures = result if isinstance(result, Mapping) else {"result": result}
    rows = [[Cell(text), value] for text, value in figures_of(figures)]
    return Table(name, title, ["figure", "value"], rows, notes)


def benchmark_tables(found: Measurements) -> list[Table]:
    """Make the tables of all benchmarks; a later result of the same name replaces an earlier."""
    latest = {record["benchmark"]: record for record in found.of("benchmark")}
    return [benchmark_table(record) for record in latest.values()]
