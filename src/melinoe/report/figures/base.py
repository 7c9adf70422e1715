"""What a figure is, what colours stand for, and how a drawing names its models."""

from dataclasses import dataclass
from typing import Any

from melinoe.report.figures.svg import COLOUR
from melinoe.report.schema import Record
from melinoe.report.tables import Table


@dataclass(frozen=True)
class Figure:
    """One figure: its panels as SVG, its sentence, and its numbers as a table."""

    name: str
    title: str
    panels: list[str]
    caption: str
    table: Table


def colour_of(model: str) -> str:
    """Give the colour that stands for a model on the whole page."""
    known = {"base": "base", "control": "control", "fine-tuned": "tuned"}
    return COLOUR[known.get(model, "other")]


def colours_of(names: list[str]) -> list[str]:
    """Give colours to what is drawn in one panel: models their own, others one after the other."""
    others = ("other", "base", "tuned", "rose", "olive", "slate")
    own = [colour_of(name) for name in names]
    if len(set(own)) == len(own):
        return own
    return [COLOUR[others[index % len(others)]] for index in range(len(names))]


def last(records: list[Record], *keys: str) -> dict[tuple[str, ...], Record]:
    """Records by these fields; where several agree in them, the last stands."""
    return {tuple(record[key] for key in keys): record for record in records}


def marker(index: int) -> str:
    """Give the marker of the model drawn at this place."""
    return ("o", "s", "D", "^", "v")[index % 5]


def mark_models(axes: Any, models: list[str]) -> None:
    """Name the models once, in their colours and markers, on a line above the rows."""
    handles = []
    for index, model in enumerate(models):
        (line,) = axes.plot([], [], marker(index), color=colour_of(model), label=model)
        handles.append(line)
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
