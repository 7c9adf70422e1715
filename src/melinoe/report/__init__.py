"""
Make tables and figures from measurement records, and from nothing else.

    records.py    read records, and check what they hold
    amounts.py    numbers, estimates and settings as text
    comparing.py  which model is compared with which; paired ratios
    table.py      a table as data, Markdown or text
    tables.py     the tables of a report, and those of benchmark results
    figures.py    the figures, each with a sentence on what it shows
    page.py       all of it in reading order: the HTML page, its Markdown twin, figures as files
    readme.py     the tables between a README's markers
    card.py       a fine-tuned checkpoint's model card
"""

import shutil
from typing import Literal

from melinoe.errors import DataError
from melinoe.report.page import figures_of, page_path, write_figures, write_report
from melinoe.report.readme import update_readme
from melinoe.report.records import Sources, read_records
from melinoe.report.table import render
from melinoe.report.tables import benchmark_tables, main_table, model_tables, servings

__all__ = [
    "figures_of",
    "page_path",
    "read_records",
    "render_table",
    "update_readme",
    "write_figures",
    "write_report",
]


def render_table(
    sources: Sources, form: Literal["markdown", "text"] = "text", width: int | None = None
) -> str:
    """
    Write the main table of some records, one per cache configuration.

    Records without serve runs give what else they hold: perplexity per corpus, benchmarks. *form*
    is ``"markdown"``, or ``"text"`` for a terminal of *width* columns; absent: this one's, or 120.

    Raises:
        DataError: a record is malformed, there is none, or none that makes a table.
    """
    found = read_records(sources)
    tables = [main_table(found, serving) for serving in servings(found)]
    tables = tables or model_tables(found) + benchmark_tables(found)
    if not tables:
        message = "no record makes a table; give records of kind serve, quality or a benchmark"
        raise DataError(message)
    columns = width if width is not None else shutil.get_terminal_size((120, 24)).columns
    return render(tables, form, columns)
