"""Tables of task scores, and of what paired comparisons of two models say."""

from melinoe.report.amounts import signed, spread
from melinoe.report.records import Measurements
from melinoe.report.schema import Record, read_estimate
from melinoe.report.tables import Cell, Table, cell, ordered_models
from melinoe.stats import Estimate


def score_table(found: Measurements) -> Table | None:
    """Score of every model on every text or task and metric; ``None`` without score records."""
    records = {(r["domain"], r["metric"], r["model"]): r for r in found.of("score")}
    if not records:
        return None
    models = ordered_models(r["model"] for r in found.of("score"))
    rows = []
    for domain, metric in dict.fromkeys(key[:2] for key in records):
        row = [Cell(f"{domain}: {metric.replace('_', ' ')}")]
        for model in models:
            record = records.get((domain, metric, model))
            row.append(Cell("n/a") if record is None else _score(record))
        rows.append(row)
    said = sorted({f"{r['metric'].replace('_', ' ')}: {r['how']}" for r in records.values()
                   if r.get("how")})  # fmt: skip
    return Table("scores", "Task scores", ["text or task", *models], rows, said)


def _score(record: Record) -> Cell:
    estimate = read_estimate(record["score"])
    remark = f"of {estimate.n:,}" if estimate is not None else ""
    if record.get("right") is not None and estimate is not None:
        remark = f"{record['right']:,} of {estimate.n:,}"
    return cell(estimate, remark=remark)


def comparison_table(found: Measurements) -> Table | None:
    """Paired differences of two models, and which of them is better; the last of each stands."""
    records = {
        (r["domain"], r["metric"], r["model"], r["other"]): r for r in found.of("comparison")
    }
    if not records:
        return None
    rows = []
    for (domain, metric, model, other), record in records.items():
        change = Estimate.from_dict(dict(record["change"]))
        if record["relative"]:
            shown = Cell(signed(change))
        else:
            mean, interval = spread(change)
            shown = Cell(mean, interval)
        better = record.get("better") or "no difference shown"
        name = f"{metric.replace('_', ' ')}, {domain}: {model} against {other}"
        rows.append([Cell(name), shown, Cell(better)])
    note = "Paired by example; no difference is shown where the interval holds none."
    columns = ["comparison", "change", "better"]
    return Table("comparisons", "Two models on the same examples", columns, rows, [note])
