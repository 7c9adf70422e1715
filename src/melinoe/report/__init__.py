"""
Tables and figures from measurement records, and from nothing else.

    schema.py      what a record holds   records.py      read and check
    amounts.py     numbers as text       facts.py        settings and machines as text
    tables.py      tables as data        benchmarks.py   tables of benchmark results
    controls.py    what kind of control the records hold
    pairs.py       ratios, paired        scores.py       tables of task scores, comparisons
    captions.py    sentences, computed   figures.py   drawings     svg.py  drawings that fit a page
    glossary.py    what words mean       sections.py  all of it in order
    render.py      a table as Markdown, text or HTML
    page.py        the page and its twin readme.py    tables between a README's markers
    figure_files.py  drawings as files   study/       tables and frontiers of fine-tunings
    card/          a checkpoint's model card
"""

import shutil
from typing import Literal

from melinoe.errors import DataError
from melinoe.report import render
from melinoe.report.benchmarks import benchmark_tables
from melinoe.report.figure_files import write_figures
from melinoe.report.page import page_path, write_report
from melinoe.report.readme import update_readme
from melinoe.report.records import Sources, read_records
from melinoe.report.scores import comparison_table, score_table
from melinoe.report.tables import corpus_table, main_table, servings

__all__ = [
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
        width: Columns of the terminal; this terminal's own if ``None``, 120
            where there is none.

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
    return render.render(tables, form, columns)
