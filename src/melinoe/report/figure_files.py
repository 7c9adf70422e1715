"""A report's drawings as files of their own, for documents that only embed pictures."""

from html import escape
from pathlib import Path

from melinoe.errors import DataError
from melinoe.report.page import style_sheet
from melinoe.report.records import Sources, read_records
from melinoe.report.sections import assemble
from melinoe.whole_file import write_whole


def write_figures(sources: Sources, directory: Path | str) -> list[Path]:
    """
    Write every panel of every figure as an SVG file that needs nothing else.

    A file is named after its figure, and where that has several panels, numbered from 1. It brings
    the page's colours, those of the dark theme too, and its background.

    Args:
        sources: Records, paths of `.jsonl` and `.json` files, or both.
        directory: Made if it is not there; files of the same names are replaced, others stay.

    Returns:
        The files, in the page's order.

    Raises:
        DataError: a record is malformed, none of them makes a figure, or *directory* cannot be
            written to.
    """
    report = assemble(read_records(sources))
    drawings = {
        f"{figure.name}-{number}.svg" if len(figure.panels) > 1 else f"{figure.name}.svg": panel
        for section in report.sections
        for figure in section.figures
        for number, panel in enumerate(figure.panels, 1)
    }
    if not drawings:
        raise DataError("none of these records makes a figure; give those of a demo or a study")
    colours = style_sheet("colours.css")
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawing in drawings.items():
            write_whole(folder / name, standalone(drawing, colours))
    except OSError as error:
        message = f"cannot write to {folder} ({error.strerror}); name a directory that can be"
        raise DataError(message) from error
    return [folder / name for name in drawings]


def standalone(drawing: str, colours: str) -> str:
    """Write an inline drawing as a document: with namespaces, its colours and a background."""
    head, body = drawing.split(">", 1)
    style = f"<style>{escape(colours, quote=False)}svg {{ color: var(--ink); }}</style>"
    ground = '<rect width="100%" height="100%" fill="var(--page)"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{ground}{body}\n'
