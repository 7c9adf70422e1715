"""
Turn matplotlib's drawings into inline SVG that follows the page: colours, fonts, dark mode.

Figures are drawn in stand-in colours that the page's style sheet names; here each is replaced by
``var(--name)``, so one drawing serves light, dark and paper. Text stays text.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any
from xml.etree import ElementTree

from melinoe.report.table import Table

# Stand-in colour -> name in the style sheet. Nothing but a key has such a colour by chance.
STAND_INS = {
    "#010203": "ink",
    "#040506": "muted",
    "#070809": "grid",
    "#101112": "base",
    "#131415": "control",
    "#161718": "tuned",
    "#191a1b": "other",
    "#1c1d1e": "page",
    "#1f2021": "rose",
    "#222324": "olive",
    "#252627": "slate",
}
COLOUR = {name: stand_in for stand_in, name in STAND_INS.items()}
WIDTH_IN, HEIGHT_IN = 5.0, 3.1

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": COLOUR["muted"],
    "axes.labelcolor": COLOUR["muted"],
    "axes.titlecolor": COLOUR["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": COLOUR["grid"],
    "grid.linewidth": 0.8,
    "text.color": COLOUR["ink"],
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Figure:
    """A figure: its panels as SVG, a sentence on what they show, and its numbers as a table."""

    name: str
    title: str
    panels: list[str]
    caption: str
    table: Table


@contextmanager
def panel(height_in: float = HEIGHT_IN, width_in: float = WIDTH_IN) -> Iterator[tuple[Any, Any]]:
    """
    Open one panel to draw on, in the report's style: a matplotlib figure and its axes.

    A third of the page's width is 3.5 inches, half of it 5: text then comes out equally large.
    """
    # Imported here: tables and README updates need no matplotlib, and it takes a second to load.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def finish(figure: Any, name: str, description: str) -> str:
    """
    Write a figure as an SVG element for use inside HTML.

    Args:
        figure: A matplotlib figure drawn within `panel`.
        name: Unique on the page; every id in the drawing begins with it.
        description: What a reader who cannot see it is told.
    """
    import matplotlib

    buffer = io.StringIO()
    quiet = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=quiet)
    root = ElementTree.fromstring(buffer.getvalue())
    width, height = root.get("viewBox", "0 0 360 220").split()[2:]
    body = "".join(_inline(child, name) for child in root)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
        f"{body}</svg>"
    )


def _inline(element: ElementTree.Element, name: str) -> str:
    """One element without namespaces, ids made unique, colours and fonts made variable."""
    tag = element.tag.rpartition("}")[2]
    if tag == "metadata":
        return ""
    attributes = []
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]  # xlink:href becomes href, which HTML understands
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href":
            value = value.replace("#", f"#{name}-", 1)
        else:
            value = value.replace("url(#", f"url(#{name}-")
        attributes.append(f' {key}="{escape(_themed(value))}"')
    inner = escape(_themed(element.text or ""), quote=False) if (element.text or "").strip() else ""
    inner += "".join(_inline(child, name) for child in element)
    return f"<{tag}{''.join(attributes)}>{inner}</{tag}>"


def _themed(text: str) -> str:
    for stand_in, colour in STAND_INS.items():
        text = text.replace(stand_in, f"var(--{colour})")
    return re.sub(r"(font: [^;]*?[\d.]+px) [^;]+", r"\1 var(--sans)", text)


def colour_of(model: str) -> str:
    """Return the colour of a model, the same on the whole page."""
    known = {"base": "base", "control": "control", "fine-tuned": "tuned"}
    return COLOUR[known.get(model, "other")]


def colours_of(names: list[str]) -> list[str]:
    """Return a colour for each line of a panel: models their own, others in turn."""
    others = ("other", "base", "tuned", "rose", "olive", "slate")
    own = [colour_of(name) for name in names]
    if len(set(own)) == len(own):
        return own
    return [COLOUR[others[index % len(others)]] for index in range(len(names))]


def marker(index: int) -> str:
    """Return the marker of the line drawn at this place."""
    return ("o", "s", "D", "^", "v")[index % 5]


def mark_models(axes: Any, models: list[str]) -> None:
    """Name the models once, in their colours and markers, on a line above the rows."""
    handles = [
        axes.plot([], [], marker(index), color=colour_of(model), label=model)[0]
        for index, model in enumerate(models)
    ]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.98),
        ncols=len(models),
        frameon=False,
        labelcolor=[colour_of(model) for model in models],
        handletextpad=0.2,
        columnspacing=1.4,
        borderpad=0,
    )
