# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""Numbers, estimates, settings and machines as text; a table of them as Markdown or plain text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from melinoe.stats import Estimate

DASH = "–"
NOT_MEASURED = "n/a"
UNITS = {"_gb_s": "GB/s", "_us": "µs", "_ms": "ms", "_s": "s", "_bytes": "GiB", "_gib": "GiB"}
UNITS |= {"_mib": "MiB", "_percent": "%"}


def label(key: str) -> str:
    """Write a name for people: ``decide_us`` becomes ``decide (µs)``."""
    for ending, unit in UNITS.items():
        if key.endswith(ending) and not key.endswith("per_s"):
            return f"{key.removesuffix(ending).replace('_', ' ')} ({unit})"
    return key.replace("_", " ").replace(" per s", " / s")


def decimals(value: float, digits: int = 3) -> int:
    """Return how many decimals show *value* with *digits* significant digits; 0 to 5."""
    if value == 0 or not math.isfinite(value):
        return max(0, digits - 1)
    return min(5, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def plain(value: float, digits: int = 3) -> str:
    """Write *value* with *digits* significant digits, thousands apart, never an exponent."""
    return f"{value:,.{decimals(value, digits)}f}"


def spread(estimate: Estimate, unit: str = "", digits: int = 3) -> tuple[str, str]:
    """Write mean and interval with the mean's decimals; unit ``"%"`` shows a share times 100."""
    scale = 100.0 if unit == "%" else 1.0
    places = 1 if unit == "%" else decimals(estimate.mean, digits)
    low, high = (f"{scale * end:,.{places}f}" for end in (estimate.low, estimate.high))
    mean = f"{scale * estimate.mean:,.{places}f}" + (" %" if unit == "%" else "")
    return mean, f"{low} to {high}" if estimate.low < 0 else f"{low}{DASH}{high}"


def inline(estimate: Estimate, unit: str = "", digits: int = 3) -> str:
    """Write mean and interval for use in a sentence: ``9.81 [9.40, 10.22]``."""
    mean, interval = spread(estimate, unit, digits)
    return f"{mean} [{interval.replace(' to ', ', ').replace(DASH, ', ')}]"


def signed(change: Estimate) -> str:
    """Write a relative change in percent, with signs: ``+1.8 % [+0.9, +2.6]``."""
    ends = (change.mean, change.low, change.high)
    mean, low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in ends)
    return f"{mean} % [{low}, {high}]"


def join(parts: Sequence[str]) -> str:
    """Join phrases: ``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def say(value: Any) -> str:
    """Write a setting: ``none``, ``yes``, four significant digits, or as it is."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(say, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Write a mapping as names and texts, nested names joined: ``link bandwidth (GB/s)``."""
    facts: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{label(key)}"
        facts |= flat(value, f"{name} ") if isinstance(value, Mapping) else {name: say(value)}
    return facts


def hardware(machine: Mapping[str, Any]) -> str:
    """Write a machine on one line, leaving out what it does not have."""
    parts = {k: item for k, item in machine.items() if k not in ("versions", "commit", "date")}
    facts = flat(parts).items()
    return "; ".join(f"{name}: {text}" for name, text in facts if text not in ("none", ""))


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


def terminal(table: Table) -> str:
    """Write a table for a terminal of any width: one line a figure, row by row."""
    lines, widest = [table.title], max(map(len, table.columns))
    for cells in table.rows:
        named = zip(table.columns[1:], cells[1:], strict=True)
        lines += ["", cells[0].inline()]
        lines += [f"  {column:<{widest}}  {one.inline()}" for column, one in named]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])


def render(tables: Sequence[Table], form: Literal["markdown", "text"]) -> str:
    """Write tables one below the other, as ``"markdown"`` or ``"text"``."""
    if form == "text":
        return "\n\n".join(map(terminal, tables))
    if form != "markdown":
        raise ValueError(f"form must be 'markdown' or 'text', not {form!r}")
    return "\n\n".join(f"**{literal(table.title)}**\n\n{markdown(table)}" for table in tables)
