"""Make tables and figures from measurement records, and from nothing else."""

from typing import Literal

from melinoe.errors import DataError
from melinoe.report.page import figures_of, page_path, write_report
from melinoe.report.records import Sources, read_records
from melinoe.report.table import render
from melinoe.report.tables import main_table, model_tables, servings


def render_table(sources: Sources, form: Literal["markdown", "text"] = "text") -> str:
    """
    Write the main table of some records, one per cache configuration.

    Records without serve runs give what else they hold: perplexity per corpus. *form*
    is ``"markdown"``, or ``"text"`` for a terminal: a line for each figure.

    Raises:
        DataError: a record is malformed, there is none, or none that makes a table.
    """
    found = read_records(sources)
    tables = [main_table(found, serving) for serving in servings(found)]
    tables = tables or model_tables(found)
    if not tables:
        message = "no record makes a table; give records of kind serve or quality"
        raise DataError(message)
    return render(tables, form)
