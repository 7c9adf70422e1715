"""A table as data, and written as Markdown or as text for a terminal."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from melinoe.report.amounts import spread
from melinoe.stats import Estimate

NOT_MEASURED = "n/a"


@dataclass(frozen=True)
class Cell:
    """One cell: a mean (or a text), its interval, and a remark such as a ratio to base."""

    text: str
    interval: str = ""
    remark: str = ""

    def inline(self) -> str:
        """Write the cell on one line: ``4.81 [4.60, 5.02] (÷ 3.1)``."""
        interval = f" [{self.interval}]" if self.interval else ""
        return self.text + interval + (f" ({self.remark})" if self.remark else "")


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; the first column names the row, notes stand below."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)


def cell(estimate: Estimate | None, unit: str = "", digits: int = 3, remark: str = "") -> Cell:
    """Make the cell of an estimate; one that was not measured says so."""
    if estimate is None:
        return Cell(NOT_MEASURED)
    return Cell(*spread(estimate, unit, digits), remark)


def literal(text: str) -> str:
    """Write a text for Markdown on one line, its special characters taken literally."""
    for special in ("\\", "|", "<", ">", "*", "_", "`"):
        text = text.replace(special, "\\" + special)
    return " ".join(text.split())


def markdown(table: Table) -> str:
    """Write a table in GitHub's Markdown, notes below it."""
    lines = [" | ".join(literal(column) for column in table.columns)]
    lines.append(" | ".join(["---"] + ["---:"] * (len(table.columns) - 1)))
    lines += [" | ".join(literal(cell.inline()) for cell in row) for row in table.rows]
    text = "\n".join(f"| {line} |" for line in lines)
    return text + "".join(f"\n\n{literal(note)}" for note in table.notes)


def terminal(table: Table, width: int) -> str:
    """
    Write a table for *width* columns of a terminal: the interval below its mean.

    No number is ever cut: a terminal too narrow for the table gets one line per cell instead.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        box=box.SIMPLE_HEAD, title=table.title, title_justify="left", collapse_padding=True
    )
    stacked = [
        [
            "\n".join(filter(None, (one.text, one.interval, one.remark.replace(" [", "\n[", 1))))
            for one in row
        ]
        for row in table.rows
    ]
    needs = []
    for index, column in enumerate(table.columns):
        # A heading and a row's name may break between words, a number nowhere.
        lines = [line for row in stacked for line in row[index].split("\n" if index else None)]
        needs.append(max(map(len, [*column.split(), *lines])))
        drawn.add_column(Text(column), justify="right" if index else "left", min_width=needs[-1])
    for row in stacked:
        drawn.add_row(*map(Text, row))
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None)
    if sum(needs) + 2 * len(needs) + 2 > width:  # a space between columns, and one beside each
        lines = [table.title]
        widest = max(map(len, table.columns))
        for cells in table.rows:
            named = zip(table.columns[1:], cells[1:], strict=True)
            lines += ["", cells[0].inline()]
            lines += [f"  {column:<{widest}}  {one.inline()}" for column, one in named]
        return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def render(tables: Sequence[Table], form: Literal["markdown", "text"], width: int = 0) -> str:
    """Write tables one below the other, as ``"markdown"`` or ``"text"``."""
    if form == "text":
        return "\n\n".join(terminal(table, width) for table in tables)
    if form != "markdown":
        raise ValueError(f"form must be 'markdown' or 'text', not {form!r}")
    return "\n\n".join(f"**{literal(table.title)}**\n\n{markdown(table)}" for table in tables)
