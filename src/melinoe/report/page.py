"""Write a report: one HTML page that needs nothing else, its Markdown twin, figures as files."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from melinoe.errors import DataError
from melinoe.report.contents import Report, assemble
from melinoe.report.figures.svg import Figure
from melinoe.report.records import Sources, read_records
from melinoe.report.table import html, literal, markdown
from melinoe.whole_file import write_whole


def page_path(out: Path | str) -> Path:
    """
    Return the path of a page, if it is named as one; call it before minutes of replays.

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
    Each file appears whole or not at all; older ones are replaced. Takes some seconds for a demo.

    Args:
        sources: Records, paths of `.jsonl` and `.json` files, or both.
        out: Path of the page; its directory is made if it does not exist.

    Raises:
        DataError: a record is malformed (the message names file and line), there is none, or
            *out* cannot be written.
    """
    out = page_path(out)
    report = assemble(read_records(sources))
    _write({out: html_page(report), out.with_suffix(".md"): markdown_page(report)}, out)


def figures_of(sources: Sources) -> list[Figure]:
    """Return the figures of the page that these records make, in the page's order."""
    report = assemble(read_records(sources))
    return [figure for section in report.sections for figure in section.figures]


def write_figures(figures: Sequence[Figure], directory: Path | str) -> list[Path]:
    """
    Write every panel of every figure as an SVG file that needs nothing else.

    A file is named after its figure, and where that has several panels, numbered from 1. It brings
    the page's colours, those of the dark theme too, and its background.

    Args:
        figures: From `figures_of`.
        directory: Made if it does not exist; files of the same names are replaced, others stay.

    Returns:
        The files, in the order of *figures*.

    Raises:
        DataError: there is no figure, or *directory* cannot be written to.
    """
    drawings = svg_files(figures)
    if not drawings:
        raise DataError("none of these records makes a figure; give those of a demo")
    texts = {Path(directory) / name: text for name, text in drawings.items()}
    _write(texts, directory)
    return [*texts]


def svg_files(figures: Sequence[Figure]) -> dict[str, str]:
    """Return the files of `write_figures` by name."""
    colours = escape(_environment().get_template("colours.css").render(), quote=False)
    files = {}
    for figure in figures:
        for number, panel in enumerate(figure.panels, 1):
            head, body = panel.split(">", 1)
            name = f"{figure.name}-{number}" if len(figure.panels) > 1 else figure.name
            files[f"{name}.svg"] = (
                f'{head} xmlns="http://www.w3.org/2000/svg">'
                f"<style>{colours}svg {{ color: var(--ink); }}</style>"
                f'<rect width="100%" height="100%" fill="var(--page)"/>{body}\n'
            )
    return files


def _write(texts: Mapping[Path, str], named: Path | str) -> None:
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
    except OSError as error:
        message = f"cannot write {named} ({error.strerror}); name a place that can be written to"
        raise DataError(message) from error


def html_page(report: Report) -> str:
    """Write a report as one HTML document."""
    from markupsafe import Markup

    environment = _environment()
    # Tables and drawings arrive as markup whose texts are escaped already.
    environment.filters["table"] = lambda table: Markup(html(table))
    environment.filters["drawing"] = Markup
    style = Markup(environment.get_template("style.css").render())
    page = environment.get_template("page.html")
    return str(page.render(report=report, style=style, glossary=glossary()))


def glossary() -> list[tuple[str, str]]:
    """Return the terms of a report and what they mean."""
    lines = _environment().get_template("glossary.md").render().splitlines()
    terms = [line.removeprefix("**").partition("**: ") for line in lines]
    return [(term, meaning) for term, _, meaning in terms]


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

    def listed(facts: Sequence[tuple[str, str]]) -> str:
        return "\n".join(f"- {literal(name)}: {literal(text)}" for name, text in facts)

    def bullets(texts: Sequence[str]) -> str:
        return "\n".join(f"- {literal(text)}" for text in texts)

    parts = [f"# {literal(report.title)}", listed(report.facts), bullets(report.findings)]
    for section in report.sections:
        parts.append(f"## {literal(section.title)}")
        for table in section.tables:
            parts += [f"**{literal(table.title)}**", markdown(table)]
        for figure in section.figures:
            parts.append(literal(figure.caption))
            if figure.table not in section.tables:
                parts.append(markdown(figure.table))
        for title, facts in section.facts.items():
            parts += [f"**{literal(title)}**", listed(facts)]
    parts.append("## How to read this")
    parts.append("\n".join(f"- **{term}**: {text}" for term, text in glossary()))
    parts += ["## Limits and omissions", bullets([*report.limits, *report.notes])]
    return "\n\n".join(part for part in parts if part) + "\n"
