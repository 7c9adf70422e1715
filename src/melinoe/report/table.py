"""A table as data, and written as Markdown, as text for a terminal, or as HTML."""

import io
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from melinoe.report.amounts import NOT_MEASURED, spread
from melinoe.stats import Estimate

# A table of more columns does not fit on paper in full size.
WIDE = 8


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

    def stacked(self) -> str:
        """Write the cell on several lines, so that its column stays narrow."""
        lines = (self.text, self.interval, *self.remark.replace(" [", "\n[", 1).split("\n"))
        return "\n".join(part for part in lines if part)


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

    No number is ever cut: a terminal too narrow for the table gets one block per row instead.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # A heading may break between words, a row's name too, a number nowhere.
    needs = []
    for index, column in enumerate(table.columns):
        lines = [line for row in table.rows for line in row[index].stacked().split("\n")]
        if index == 0:
            lines = [word for line in lines for word in line.split()]
        needs.append(max(map(len, [*column.split(), *lines])))
    if sum(needs) + 3 * len(needs) > width:
        return _blocks(table)
    drawn = RichTable(
        box=box.SIMPLE_HEAD, title=table.title, title_justify="left", collapse_padding=True
    )
    for index, (column, need) in enumerate(zip(table.columns, needs, strict=True)):
        drawn.add_column(Text(column), justify="right" if index else "left", min_width=need)
    for row in table.rows:
        drawn.add_row(*(Text(cell.stacked()) for cell in row))
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None)
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _blocks(table: Table) -> str:
    """Write each row as a block of lines, one line per column."""
    widest = max(len(column) for column in table.columns)
    blocks = [table.title]
    for row in table.rows:
        lines = [row[0].text]
        for column, cell in zip(table.columns[1:], row[1:], strict=True):
            lines.append(f"  {column:<{widest}}  {cell.inline()}")
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *table.notes])


def html(table: Table) -> str:
    """
    Write a table as an HTML element.

    On narrow screens each row becomes a card; on paper, which does not scroll, many columns are
    set small.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = []
    for row in table.rows:
        cells = [f'<th scope="row">{escape(row[0].text)}</th>']
        for column, cell in zip(table.columns[1:], row[1:], strict=True):
            inner = f"<b>{escape(cell.text)}</b>"
            if cell.interval:
                inner += f' <span class="interval">{escape(cell.interval)}</span>'
            if cell.remark:
                # It may break before its interval alone, so that the column stays narrow.
                ratio, bracket, rest = cell.remark.partition(" [")
                parts = [ratio, *([f"[{rest}"] if bracket else [])]
                remark = " ".join(escape(part).replace(" ", "&nbsp;") for part in parts)
                inner += f' <span class="remark">{remark}</span>'
            body_cell = f'<td data-label="{escape(column)}"><span class="value">{inner}</span></td>'
            cells.append(body_cell)
        body.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    kind = "data wide" if len(table.columns) > WIDE else "data"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{notes}"
    )


def render(tables: list[Table], form: Literal["markdown", "text"], width: int = 0) -> str:
    """
    Write tables one below the other.

    Raises:
        ValueError: *form* is neither ``"markdown"`` nor ``"text"``.
    """
    if form == "text":
        return "\n\n".join(terminal(table, width) for table in tables)
    if form != "markdown":
        raise ValueError(f"form must be 'markdown' or 'text', not {form!r}")
    titled = [f"**{literal(table.title)}**\n\n{markdown(table)}" for table in tables]
    return "\n\n".join(titled)
