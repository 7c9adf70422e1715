"""Write a report: one HTML page that needs nothing else, and its Markdown twin."""

from pathlib import Path
from typing import Any

from melinoe.errors import DataError
from melinoe.report import render
from melinoe.report.records import Sources, read_records
from melinoe.report.sections import Report, assemble
from melinoe.whole_file import write_whole


def page_path(out: Path | str) -> Path:
    """
    The path of a page, if it is named as one; ask before minutes of replays.

    Raises:
        DataError: it does not end in .html or .htm.
    """
    path = Path(out)
    if path.suffix not in (".html", ".htm"):
        raise DataError(f"{path} is not the name of an HTML page; let it end in .html")
    return path


def write_report(sources: Sources, out: Path | str) -> None:
    """
    Write the report of some records as *out* (HTML) and beside it as Markdown (``.md``).

    The page makes no request: style and figures are inside. The same records give the same bytes.
    Both files appear whole or not at all; older ones are replaced. Takes some seconds for a demo.

    Args:
        sources: Records, paths of `.jsonl` and `.json` files, or both.
        out: Path of the page; its directory is made if it is not there.

    Raises:
        DataError: a record is malformed (the message names file and line), there is none, or
            *out* cannot be written.
    """
    out = page_path(out)
    report = assemble(read_records(sources))
    texts = {out: html_page(report), out.with_suffix(".md"): markdown_page(report)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            write_whole(path, text)
    except OSError as error:
        message = f"cannot write {out} ({error.strerror}); name a place that can be written to"
        raise DataError(message) from error


def html_page(report: Report) -> str:
    """Write a report as one HTML document."""
    from markupsafe import Markup

    environment = _environment()
    # Tables and drawings arrive as markup whose texts are escaped already.
    environment.filters["table"] = lambda table: Markup(render.html(table))
    environment.filters["drawing"] = Markup
    style = Markup(environment.get_template("style.css").render())
    return str(environment.get_template("page.html").render(report=report, style=style))


def style_sheet(name: str) -> str:
    """Give one of the page's style sheets by the name of its file."""
    return str(_environment().get_template(name).render())


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("melinoe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def markdown_page(report: Report) -> str:
    """Write a report as Markdown: the same words and numbers, figures as tables."""
    parts = [f"# {render.plain(report.title)}"]
    parts.append("\n".join(f"- {render.plain(k)}: {render.plain(v)}" for k, v in report.facts))
    parts.append("\n".join(f"- {render.plain(text)}" for text in report.findings))
    for section in report.sections:
        parts.append(f"## {render.plain(section.title)}")
        for table in section.tables:
            parts += [f"**{render.plain(table.title)}**", render.markdown(table)]
        for figure in section.figures:
            parts.append(render.plain(figure.caption))
            if figure.table not in section.tables:
                parts.append(render.markdown(figure.table))
        for title, facts in section.facts.items():
            parts.append(f"**{render.plain(title)}**")
            parts.append("\n".join(f"- {render.plain(k)}: {render.plain(v)}" for k, v in facts))
    parts.append("## How to read this")
    parts.append("\n".join(f"- **{term}**: {text}" for term, text in report.glossary))
    parts.append("## Limits and omissions")
    said = [*report.limits, *report.notes]
    parts.append("\n".join(f"- {render.plain(text)}" for text in said))
    return "\n\n".join(part for part in parts if part) + "\n"
