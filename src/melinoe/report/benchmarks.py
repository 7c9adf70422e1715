"""Tables of benchmark results: JSON files with ``benchmark``, its figures, and the machine."""

from collections.abc import Mapping
from typing import Any

from melinoe.report.amounts import label, plain
from melinoe.report.records import Estimate, Measurements, Record
from melinoe.report.tables import Cell, Table, cell

# Not figures: what a result file says about itself.
ABOUT = frozenset(
    {"benchmark", "kind", "machine", "versions", "commit", "date", "command", "question", "note"}
    | {"notes", "settings", "title", "floor", "bad_news", "not_measured"}
)


def value_cell(key: str, value: Any) -> Cell:
    """Make the cell of one figure: an estimate, a median with its range, a number or a text."""
    scale = 1 / 2**30 if key.endswith("_bytes") else 1.0
    if isinstance(value, Mapping):
        middle = "mean" if "mean" in value else "median"
        low, high = ("low", "high") if "low" in value else ("min", "max")
        if all(isinstance(value.get(name), int | float) for name in (middle, low, high)):
            centre, left, right = (scale * float(value[name]) for name in (middle, low, high))
            return cell(Estimate(centre, left, right))
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


def benchmark_table(record: Record) -> Table:
    """
    Make the table of one benchmark's result.

    ``result`` (or, without it, every figure of the record) may be a list of rows, a mapping of
    row names to rows, or a mapping of figures; an estimate or ``{median, min, max}`` is one value.
    """
    result = record.get("result")
    if result is None:
        result = {key: value for key, value in record.items() if key not in ABOUT}
    name = record["benchmark"]
    machine = record.get("machine") or {}
    note = "; ".join(f"{k.replace('_', ' ')} {v}" for k, v in machine.items() if v is not None)
    notes = [f"Machine: {note}."] if note else []
    title = str(record.get("title") or name.replace("-", " ").replace("_", " ").capitalize())
    rows = _rows(result)
    if rows is None:
        figures = result if isinstance(result, Mapping) else {"result": result}
        cells = [[Cell(label(key)), value_cell(key, value)] for key, value in figures.items()]
        return Table(name, title, ["figure", "value"], cells, notes)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[value_cell(key, row.get(key)) for key in columns] for row in rows]
    return Table(name, title, [label(key) for key in columns], cells, notes)


def _rows(result: Any) -> list[Mapping[str, Any]] | None:
    """Give the rows of a result that has rows: a list of mappings, or mappings by name."""
    if isinstance(result, list) and result and all(isinstance(row, Mapping) for row in result):
        return result
    if isinstance(result, Mapping) and result and all(_is_row(row) for row in result.values()):
        return [{"case": name, **row} for name, row in result.items()]
    return None


def _is_row(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return not ({"mean", "low", "high"} <= set(value) or {"median", "min", "max"} <= set(value))


def benchmark_tables(found: Measurements) -> list[Table]:
    """Make the tables of all benchmarks; a later result of the same name replaces an earlier."""
    latest = {record["benchmark"]: record for record in found.of("benchmark")}
    return [benchmark_table(record) for record in latest.values()]
