"""Make tables and figures from measurement records, and from nothing else."""

import shutil
from typing import Literal

from melinoe.errors import DataError
from melinoe.report.page import figures_of, page_path, write_figures, write_report
from melinoe.report.readme import update_readme
from melinoe.report.records import Sources, read_records
from melinoe.report.table import render
from melinoe.report.tables import benchmark_tables, main_table, model_tables, servings


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
