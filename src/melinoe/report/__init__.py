"""
Make tables and figures from measurement records, and from nothing else.

    records.py    read records, and check what they hold
    amounts.py    numbers, estimates and settings as text
    comparing.py  which model is compared with which; paired ratios
    table.py      a table as data, Markdown, text or HTML
    tables.py     the tables of a report, and those of benchmark results
    figures/      the figures, each with a sentence on what it shows
    contents.py   all of it in reading order, and the findings
    page.py       the HTML page, its Markdown twin, figures as files
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
from melinoe.report.tables import (
    benchmark_tables,
    comparison_table,
    corpus_table,
    main_table,
    score_table,
    servings,
)

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
    sources: Sources,
    form: Literal["markdown", "text"] = "text",
    width: int | None = None,
) -> str:
    """
    Write the main table of some records, one per cache configuration.

    Records without serve runs give what else they hold: perplexity per corpus, benchmarks.

    Args:
        sources: Records, paths of `.jsonl` and `.json` files, or both.
        form: ``"markdown"``, or ``"text"`` for a terminal.
        width: Columns of the terminal; ``None`` takes this terminal's, or 120 without one.

    Raises:
        DataError: a record is malformed, there is none, or none that makes a table.
        ValueError: *form* is neither of the two.
    """
    found = read_records(sources)
    tables = [main_table(found, serving) for serving in servings(found)]
    if not tables:
        others = (corpus_table(found), score_table(found), comparison_table(found))
        tables = [table for table in others if table] + benchmark_tables(found)
    if not tables:
        message = "no record makes a table; give records of kind serve, quality or a benchmark"
        raise DataError(message)
    columns = width if width is not None else shutil.get_terminal_size((120, 24)).columns
    return render(tables, form, columns)
