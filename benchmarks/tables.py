"""
Write the tables of README and docs from the records in benchmarks/results, or check them.

    python -m benchmarks.tables README.md docs/method.md [--check]
    python -m benchmarks.tables --figures docs/figures          # and README's curves, of the demo
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from melinoe.errors import DataError
from melinoe.report.page import figures_of, svg_files
from melinoe.report.records import Measurements, Record, Sources, read_records
from melinoe.report.table import (
    NOT_MEASURED,
    Cell,
    Table,
    cell,
    hardware,
    label,
    markdown,
    plain,
    render,
)
from melinoe.report.tables import main_table, model_tables, servings
from melinoe.stats import Estimate
from melinoe.whole_file import write_whole

RESULTS = Path(__file__).parent / "results"
OPENING = re.compile(r"<!-- report:([\w-]+) -->")


def update_readme(
    readme: Path | str, sources: Sources, check: bool = False, more: Iterable[Table] = ()
) -> list[str]:
    """
    Replace the text between ``<!-- report:NAME -->`` and ``<!-- /report:NAME -->``.

    Args:
        readme: The file that has the markers. It is written only if something changes.
        check: Return the names that are out of date, and write nothing.
        more: Further tables, by their own names.

    Returns:
        The names whose text was out of date, in the order of the file.

    Raises:
        DataError: the file cannot be read or written, has no marker, one that nothing closes, or a
            name that no record fills; nothing has been written.
    """
    path, found = Path(readme), read_records(sources)
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise DataError(f"cannot read {path} ({reason}); name a Markdown file") from error
    tables = (*model_tables(found), *benchmark_tables(found), *more)
    texts = {table.name.replace("_", "-"): markdown(table) for table in tables}
    if configurations := servings(found):
        texts["demo"] = render([main_table(found, one) for one in configurations], "markdown")
    pieces, stale, position = [], [], 0
    while opening := OPENING.search(before, position):
        name = opening.group(1)
        line = before.count("\n", 0, opening.start()) + 1
        if name not in texts:
            known = ", ".join(sorted(texts)) or "none"
            raise DataError(
                f"{path}, line {line}: no record fills report:{name}; "
                f"give its records too, or use one of: {known}"
            )
        closing = f"<!-- /report:{name} -->"
        end = before.find(closing, opening.end())
        if end < 0:
            raise DataError(f"{path}, line {line}: report:{name} is not closed; add {closing}")
        text = f"\n{texts[name]}\n"
        if before[opening.end() : end] != text and name not in stale:
            stale.append(name)
        pieces += [before[position : opening.end()], text, closing]
        position = end + len(closing)
    if not pieces:
        raise DataError(f"{path} has no <!-- report:NAME --> marker; add one where a table belongs")
    if stale and not check:
        try:
            write_whole(path, "".join(pieces) + before[position:])
        except OSError as error:
            raise DataError(
                f"cannot write {path} ({error.strerror}); make it and its directory writable"
            ) from None
    return stale


# --- benchmark results: JSON with ``benchmark``, its rows, and the machine -----------------------

# Keys that describe a result file and are no figures.
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
RANGE_NOTE = (
    "Below or in brackets: the 95 % interval of a mean, or of a median the range that was seen."
)


def benchmark_tables(found: Measurements) -> list[Table]:
    """Make the tables of all benchmarks; a later result of the same name replaces an earlier."""
    latest = {record["benchmark"]: record for record in found.of("benchmark")}
    return [benchmark_table(record) for record in latest.values()]


def benchmark_table(record: Record) -> Table:
    """
    Make the table of one benchmark's result.

    ``result`` is a list of rows, or a mapping, which is one row; without it, the figures of the
    record are. ``{mean, low, high}``, ``{median, min, max}`` and ``{median, p5, p95}`` are a value
    with its range. Columns that are empty are left out.
    """
    result = record.get("result") or {key: v for key, v in record.items() if key not in ABOUT}
    rows = [result] if isinstance(result, Mapping) else result
    named = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in named if any(row.get(key) is not None for row in rows)]
    name = record["benchmark"].replace("_", "-")
    ranges = any(spread_of(value) for row in rows for value in row.values())
    notes = [RANGE_NOTE] * ranges + [str(note) for note in record.get("notes") or []]
    if machine := hardware(record.get("machine") or {}):
        notes.append(f"Machine: {machine}.")
    title = str(record.get("title") or name.replace("-", " ").capitalize())
    cells = [[value_cell(key, row.get(key)) for key in columns] for row in rows]
    return Table(name, title, [label(key) for key in columns], cells, notes)


def spread_of(value: Any) -> Estimate | None:
    """Return an estimate, or a median with its range, if a value is a mapping that holds one."""
    if isinstance(value, Mapping):
        for names in RANGES:
            ends = [value.get(name) for name in names]
            if all(isinstance(end, int | float) for end in ends):
                centre, low, high = (float(end) for end in ends if end is not None)
                return Estimate(centre, low, high, int(value.get("n", 0)))
    return None


def value_cell(key: str, value: Any) -> Cell:
    """Make the cell of one figure: an estimate, a median with its range, a number or a text."""
    scale = 1 / 2**30 if key.endswith("_bytes") else 1.0
    if (found := spread_of(value)) is not None:
        return cell(Estimate(scale * found.mean, scale * found.low, scale * found.high, found.n))
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{label(k)} {value_cell(k, v).inline()}" for k, v in value.items()))
    if isinstance(value, list | tuple):
        return Cell(", ".join(value_cell(key, item).inline() for item in value))
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int) and scale == 1:
        return Cell(f"{value:,}")
    if isinstance(value, int | float):
        return Cell(plain(scale * value))
    return Cell(NOT_MEASURED if value is None else str(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files with markers.")
    parser.add_argument("--check", action="store_true", help="Write nothing, fail if out of date.")
    parser.add_argument("--figures", type=Path, help="Write the demo's curves into this directory.")
    asked = parser.parse_args()
    if asked.figures is not None:
        curves = svg_files(figures_of(RESULTS / "demo.jsonl"))
        for name in ("curves-1.svg", "curves-2.svg"):
            write_whole(asked.figures / f"demo-{name}", curves[name])
    found, wrong = read_records(RESULTS), False
    for page in asked.pages:
        stale = update_readme(page, found, asked.check)
        said = ("out of date in " if asked.check else "wrote ") + ", ".join(stale)
        print(f"{page}: {said if stale else 'up to date'}")
        wrong |= bool(stale) and asked.check
    sys.exit(wrong)


if __name__ == "__main__":
    main()
