"""Draw the recall of the predictor beside that of rivals that cost nothing."""

from collections.abc import Mapping

from melinoe.report.amounts import apart, inline, signed
from melinoe.report.comparing import in_order
from melinoe.report.figures.svg import COLOUR, Figure, colour_of, finish, mark_models, marker, panel
from melinoe.report.records import Measurements, Record, estimate, read_estimate
from melinoe.report.table import Cell, Table, cell

PREDICTIONS = {
    "empty": "an empty start",
    "popularity": "global popularity",
    "prefill": "the prefill's experts",
    "learned": "the learned predictor",
}


def predictor(found: Measurements) -> Figure | None:
    """Draw the recall of the predictor and of its rivals, a row each, a colour per model."""
    records = found.by_model("predictor")
    if not records:
        return None
    models = in_order(records)
    names = list(dict.fromkeys(name for record in records.values() for name in record["recall"]))
    caption = predictor_caption(records)
    with panel(1.0 + 0.46 * len(names)) as (figure, axes):
        for index, model in enumerate(models):
            for row, name in enumerate(reversed(names)):
                item = records[model]["recall"].get(name)
                if item is None:
                    continue
                y = row + 0.24 * ((len(models) - 1) / 2 - index)
                colour = colour_of(model)
                axes.plot([0, 100 * item["mean"]], [y, y], color=colour, lw=1, alpha=0.5)
                axes.plot([100 * item["low"], 100 * item["high"]], [y, y], color=colour, lw=3)
                mean = 100 * item["mean"]
                axes.plot([mean], [y], marker(index), color=colour, ms=6, clip_on=False)
                at, said = 100 * item["high"] + 1.6, f"{mean:.0f} %"
                axes.text(at, y, said, color=colour, va="center", fontsize=9.5)
        mark_models(axes, models)
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.tick_params(axis="y", labelcolor=COLOUR["ink"], pad=7)
        axes.set(xlim=(0, 108), ylim=(-0.5, len(names) - 0.4), xticks=range(0, 101, 20))
        slots = records[models[0]]["slots"]
        axes.set_xlabel(f"recall (%) of the completion's experts at {slots} slots")
        axes.grid(axis="x")
        axes.grid(False, axis="y")
        drawing = finish(figure, "fig-predictor", caption)
    rows = [
        [Cell(name), *(cell(read_estimate(records[m]["recall"].get(name)), "%") for m in models)]
        for name in names
    ]
    if any(record.get("ceiling") for record in records.values()):
        best = [cell(estimate(records[m], "ceiling"), "%") for m in models]
        rows.append([Cell("ceiling: the best unchanging choice"), *best])
    table = Table("predictor", "Recall", ["prediction from", *models], rows)
    return Figure("predictor", "Predictor against its free rivals", [drawing], caption, table)


def predictor_caption(records: Mapping[str, Record]) -> str:
    """Say which prediction finds the most experts, and whether learning one paid."""
    sentences = []
    for model, record in records.items():
        recall = {name: read_estimate(item) for name, item in record["recall"].items()}
        known = {name: item for name, item in recall.items() if item is not None}
        best = max(known, key=lambda name: known[name].mean)
        text = f"{model}: best {PREDICTIONS.get(best, best)}, {inline(known[best], '%')}"
        if (ceiling := estimate(record, "ceiling")) is not None:
            text += f" of at most {inline(ceiling, '%')}"
        rivals = [other for other in known if other != best]
        if rivals:
            second = max(rivals, key=lambda other: known[other].mean)
            text += f", then {PREDICTIONS.get(second, second)}, {inline(known[second], '%')}"
            if record.get("gain") is None and not apart(known[best], known[second]):
                text += " (intervals overlap)"
        if (gain := estimate(record, "gain")) is not None:
            text += f"; learned minus best rival, paired: {signed(gain).replace(' %', ' points')}"
            text += "" if gain.low > 0 else ", so learning did not measurably pay"
        winner = str(record.get("winner"))
        if (saved := read_estimate((record.get("saved") or {}).get(winner))) is not None:
            text += f"; loaded ahead, {PREDICTIONS.get(winner, winner)} saves {inline(saved)} "
            text += "transfers a token"
            text += "" if saved.low > 0 else ", so loading ahead was not shown to save any"
        sentences.append(text)
    slots = next(iter(records.values()))["slots"]
    return f"Recall with {slots} experts named per layer. {'. '.join(sentences)}."
