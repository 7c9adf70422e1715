"""One table as Markdown, as plain text for a terminal, or as HTML rows for the page."""

import io
from html import escape
from typing import Literal

from melinoe.report.tables import Cell, Table

MIN_WIDTH = 72


def markdown(table: Table) -> str:
    """Write a table in GitHub's Markdown, notes below it."""
    lines = [" | ".join(plain(column) for column in table.columns)]
    lines.append(" | ".join(["---"] + ["---:"] * (len(table.columns) - 1)))
    lines += [" | ".join(plain(cell.inline()) for cell in row) for row in table.rows]
    text = "\n".join(f"| {line} |" for line in lines)
    return text + "".join(f"\n\n{plain(note)}" for note in table.notes)


def plain(text: str) -> str:
    """Write a text for Markdown on one line, its special characters taken literally."""
    for special in ("\\", "|", "<", ">", "*", "_", "`"):
        text = text.replace(special, "\\" + special)
    return " ".join(text.split())


def terminal(table: Table, width: int) -> str:
    """Write a table for *width* columns of a terminal: the interval below its mean."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, title=table.title, title_justify="left", padding=(0, 1))
    for index, column in enumerate(table.columns):
        # A mean and its interval may not break: 9 columns hold "100.0–100.0" but for its ends.
        drawn.add_column(Text(column), justify="right" if index else "left")
    for row in table.rows:
        drawn.add_row(*(Text(_stacked(cell)) for cell in row))
    buffer = io.StringIO()
    console = Console(file=buffer, width=max(width, MIN_WIDTH), color_system=None)
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _stacked(cell: Cell) -> str:
    return "\n".join(part for part in (cell.text, cell.interval, cell.remark) if part)


def html(table: Table) -> str:
    """Write a table as an HTML element; on narrow screens each row becomes a card."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = []
    for row in table.rows:
        cells = [f'<th scope="row">{escape(row[0].text)}</th>']
        for column, cell in zip(table.columns[1:], row[1:], strict=True):
            inner = f"<b>{escape(cell.text)}</b>"
            if cell.interval:
                inner += f' <span class="interval">{escape(cell.interval)}</span>'
            if cell.remark:
                inner += f' <span class="remark">{escape(cell.remark)}</span>'
            body_cell = f'<td data-label="{escape(column)}"><span class="value">{inner}</span></td>'
            cells.append(body_cell)
        body.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll"><table class="data"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{notes}"
    )


def render(tables: list[Table], form: Literal["markdown", "text"], width: int) -> str:
    """
    Write tables one below the other.

    Raises:
        ValueError: *form* is neither ``"markdown"`` nor ``"text"``.
    """
    if form == "text":
        return "\n\n".join(terminal(table, width) for table in tables)
    if form != "markdown":
        raise ValueError(f"form must be 'markdown' or 'text', not {form!r}")
    titled = [f"**{plain(table.title)}**\n\n{markdown(table)}" for table in tables]
    return "\n\n".join(titled)
