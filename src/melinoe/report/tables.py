# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""Make the tables of a report: strategies, times, transfers, perplexity, scores, benchmarks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from melinoe.report.comparing import (
    domains,
    factor,
    in_order,
    increase,
    perplexity,
    quality,
    quality_note,
    reference,
)
from melinoe.report.records import Measurements, Record, estimate
from melinoe.report.table import (
    NOT_MEASURED,
    Cell,
    Table,
    cell,
    hardware,
    label,
    plain,
    signed,
    spread,
)
from melinoe.stats import Estimate

Link = tuple[float, float] | None  # bandwidth in GB/s and latency in us; None: unmodified

TIMES = {
    "ttft_s": "time to first token (s)",
    "tpot_s": "time per later token (s)",
    "stall_ms_per_token": "stall (ms / token)",
}
TRANSFERS = {
    "adjusted_hit_rate": ("adjusted hit rate", "%"),
    "transfers_per_token": ("demanded / token", ""),
    "prefetch_transfers_per_token": ("prefetched / token", ""),
    "prefill_transfers": ("transfers in prefill", ""),
}
PREDICTIONS = {
    "empty": "an empty start",
    "popularity": "global popularity",
    "prefill": "the prefill's experts",
    "learned": "the learned predictor",
}
MAIN_NOTE = (
    "Below or behind each mean: its 95 % interval. ÷: times fewer than base; ×: times as fast as "
    "base; in brackets their intervals, paired by prompt or text where the records list those."
)
READING_NOTE = (
    "Transfers per token are of the text that each model writes, greedily. Where all read the same "
    "held-out answers, nothing is prefetched, and a model that repeats itself gains nothing by it."
)


def link_of(record: Record) -> Link:
    """Return a record's emulated link; ``None`` where the link was not emulated."""
    link = record.get("link")
    return None if link is None else (float(link["bandwidth_gb_s"]), float(link["latency_us"]))


def link_text(link: Link) -> str:
    """Name a link: ``emulated link 2 GB/s, 50 µs``."""
    return f"emulated link {link[0]:g} GB/s, {link[1]:g} µs" if link else "unmodified link"


@dataclass
class Serving:
    """The serve records of one cache configuration, by strategy and link."""

    slots: int | None
    policy: str | None
    num_experts: int
    runs: dict[str, dict[Link, Record]]

    @property
    def strategies(self) -> list[str]:
        """Known strategies in their fixed order, then the others as they came."""
        return in_order(self.runs)

    @property
    def links(self) -> list[Link]:
        """The unmodified link first, then emulated ones."""
        found = {link for runs in self.runs.values() for link in runs}
        return sorted(found, key=lambda link: (link is not None, link or ()))

    def run(self, strategy: str) -> Record | None:
        """Return the strategy's run over the unmodified link, else over another: counts agree."""
        runs = self.runs.get(strategy, {})
        return runs.get(None) or next(iter(runs.values()), None)

    @property
    def title(self) -> str:
        """The configuration in words."""
        if self.slots is None:
            return "All experts resident"
        share = f"{100 * self.slots / self.num_experts:.0f} %"
        policy = f", {self.policy.upper()}" if self.policy else ""
        return f"{self.slots} of {self.num_experts} experts per layer resident ({share}){policy}"


def servings(found: Measurements) -> list[Serving]:
    """
    Sort the serve records by configuration; of two alike, the later one stands.

    The all-resident run joins every configuration, as each is compared with it. Runs that hold what
    was ``predicted`` of them have a table of their own and are left out.
    """
    records = [record for record in found.of("serve") if "predicted" not in record]
    bounded = [record for record in records if record["strategy"] != "all resident"]
    configurations: dict[tuple[int | None, str | None], Serving] = {}
    for record in bounded or records:
        key = (record.get("slots") if bounded else None, record.get("policy"))
        configurations.setdefault(key, Serving(*key, record["num_experts"], {}))
    repeated = 0
    for key, serving in configurations.items():
        for record in records:
            same = (record.get("slots"), record.get("policy")) == key
            if same or record["strategy"] == "all resident":
                runs = serving.runs.setdefault(record["strategy"], {})
                repeated += link_of(record) in runs
                runs[link_of(record)] = record
    note = f"{repeated} serve record(s) repeat an earlier one; the later one stands."
    if repeated and note not in found.notes:
        found.notes.append(note)
    return list(configurations.values())


def main_table(found: Measurements, serving: Serving) -> Table:
    """Make the main table: per strategy hits, transfers, perplexity and speed, beside the base."""
    read = {
        record["model"]: record
        for record in found.of("reading")
        if (record["slots"], record["policy"]) == (serving.slots, serving.policy)
    }
    columns = ["strategy", "hit rate", "zero-miss tokens", "transfers / token"]
    columns += ["transfers / token, reading the same text"] if read else []
    columns += ["perplexity in domain", "perplexity out of domain"]
    columns += [f"tokens/s, {link_text(link)}" for link in serving.links]

    def beside(value: Record | None, base: Record | None, name: str, sign: str) -> Cell:
        remark = "" if value is base else factor(value, base, name, sign)
        return cell(estimate(value, name), remark=remark)

    base = serving.run("base")
    rows, ahead = [], []
    for strategy in serving.strategies:
        run = serving.run(strategy)
        assert run is not None
        row = [Cell(strategy), cell(estimate(run, "hit_rate"), "%")]
        row.append(cell(estimate(run, "zero_miss_tokens"), "%"))
        row.append(beside(run, base, "transfers_per_token", "÷"))
        if read:
            own = read.get(run["model"])
            row.append(beside(own, read.get("base"), "transfers_per_token", "÷"))
        for in_domain in (True, False):
            other = reference(found, run["model"]) or ""
            ours, theirs = (quality(found, m, in_domain) for m in (run["model"], other))
            value = perplexity(found, run["model"], in_domain)
            row.append(cell(value, digits=4, remark=increase(ours, theirs)))
        for link in serving.links:
            fast, slow = (serving.runs.get(name, {}).get(link) for name in (strategy, "base"))
            row.append(beside(fast, slow, "tokens_per_s", "×"))
        rows.append(row)
        copied = estimate(run, "prefetch_transfers_per_token")
        if copied is not None and copied.mean > 0:
            ahead.append(
                f"Transfers are those that a token waited for; {strategy} copies "
                f"{cell(copied).inline()} more per token ahead of need."
            )
    notes = [MAIN_NOTE, quality_note(found), *([READING_NOTE] if read else []), *ahead]
    if sum(not in_domain for _, in_domain in domains(found)) > 1:
        notes.append("Out of domain: geometric mean over the other corpora, taken as independent.")
    return Table("main", serving.title, columns, rows, notes)


def time_table(serving: Serving) -> Table:
    """Make the table of times and stalls, one row per strategy, over each link."""
    rows = []
    for strategy in serving.strategies:
        runs = [serving.runs[strategy].get(link) for link in serving.links]
        rows.append([Cell(strategy), *(cell(estimate(run, key)) for key in TIMES for run in runs)])
    columns = [f"{text}, {link_text(link)}" for text in TIMES.values() for link in serving.links]
    return Table("times", f"Time: {serving.title}", ["strategy", *columns], rows)


def transfer_table(serving: Serving) -> Table:
    """Make the table of what was copied and when, one row per strategy, the same on any link."""
    runs = {strategy: serving.run(strategy) for strategy in serving.strategies}
    rows = [
        [Cell(strategy), *(cell(estimate(run, key), unit) for key, (_, unit) in TRANSFERS.items())]
        for strategy, run in runs.items()
    ]
    columns = ["strategy", *(text for text, _ in TRANSFERS.values())]
    return Table("transfers", f"Transfers: {serving.title}", columns, rows)


def model_tables(found: Measurements) -> list[Table]:
    """Make the tables of perplexity per corpus, of task scores, and of paired comparisons."""
    made = (corpus_table(found), score_table(found), comparison_table(found))
    return [table for table in made if table is not None]


def corpus_table(found: Measurements) -> Table | None:
    """Make the table of every model's perplexity on every corpus; ``None`` without records."""
    records = {(r["model"], r["domain"]): r for r in found.of("quality")}
    if not records:
        return None
    models = in_order(model for model, _ in records)
    rows = []
    for domain, in_domain in domains(found):
        row = [Cell(domain + (" (trained on)" if in_domain else ""))]
        for model in models:
            one, other = (records.get((m, domain)) for m in (model, reference(found, model) or ""))
            remark = increase([one], [other]) if one and other else ""
            row.append(cell(estimate(one, "perplexity"), "", 4, remark))
        rows.append(row)
    columns = ["corpus", *models]
    return Table("corpora", "Perplexity per corpus", columns, rows, [quality_note(found)])


def score_table(found: Measurements) -> Table | None:
    """Make the table of every model's task scores; ``None`` without score records."""
    records = {(r["domain"], r["metric"], r["model"]): r for r in found.of("score")}
    if not records:
        return None
    models = in_order(model for _, _, model in records)

    def score(record: Record | None) -> Cell:
        value = estimate(record, "score")
        if record is None or value is None:
            return cell(None)
        right = f"{record['right']:,} " if record.get("right") is not None else ""
        return cell(value, remark=f"{right}of {value.n:,}")

    rows = [
        [Cell(f"{domain}: {words(metric)}")]
        + [score(records.get((domain, metric, model))) for model in models]
        for domain, metric in dict.fromkeys(key[:2] for key in records)
    ]
    notes = {f"{words(r['metric'])}: {r['how']}" for r in records.values() if r.get("how")}
    return Table("scores", "Task scores", ["text or task", *models], rows, sorted(notes))


def comparison_table(found: Measurements) -> Table | None:
    """Make the table of paired differences of two models; the last of each stands."""
    records = {
        (r["domain"], r["metric"], r["model"], r["other"]): r for r in found.of("comparison")
    }
    rows = []
    for (domain, metric, model, other), record in records.items():
        change = Estimate.from_dict(record["change"])
        shown = Cell(signed(change)) if record["relative"] else Cell(*spread(change))
        name = f"{words(metric)}, {domain}: {model} against {other}"
        rows.append([Cell(name), shown, Cell(record.get("better") or "no difference shown")])
    note = "Paired by example; no difference is shown where the interval holds none."
    columns = ["comparison", "change", "better"]
    title = "Two models on the same examples"
    return Table("comparisons", title, columns, rows, [note]) if rows else None


def words(metric: str) -> str:
    """Write a metric's name for people."""
    return metric.replace("_", " ")


def predictor_table(found: Measurements) -> Table | None:
    """Make the table of what the predictor and its rivals find, and what loading ahead saves."""
    records = found.by_model("predictor")
    if not records:
        return None
    models = in_order(records)
    rows = []

    def add(text: str, key: str, inside: str | None = None, unit: str = "%") -> None:
        found = [records[m].get(inside) if inside else records[m] for m in models]
        if any(estimate(one, key) for one in found):
            rows.append([Cell(text), *(cell(estimate(one, key), unit) for one in found)])

    names = dict.fromkeys(name for record in records.values() for name in record["recall"])
    for name in names:
        add(f"recall of {PREDICTIONS.get(name, name)}", name, "recall")
    add("recall of the best unchanging choice", "ceiling")
    add("recall, learned minus best rival", "gain")
    for name in names:
        add(f"transfers a token saved by {PREDICTIONS.get(name, name)}", name, "saved", "")
    slots = next(iter(records.values()))["slots"]
    notes = [f"{slots} experts named per layer. An interval that contains 0 shows no gain."]
    return Table("predictor", "Predictor beside free rivals", ["measure", *models], rows, notes)


# --- benchmark results: JSON with ``benchmark``, its rows, and the machine -----------------------

# Keys that describe a result file and are no figures.
ABOUT = frozenset(
    {"benchmark", "kind", "machine", "versions", "commit", "date", "command", "question", "note"}
    | {"notes", "settings", "title", "floor", "bad_news", "not_measured"}
)
# The middle of a figure and its two ends, by the names that benchmarks give them.
RANGES = tuple(
    (middle, low, high)
    for middle in ("mean", "median")
    for low, high in (("low", "high"), ("p5", "p95"), ("min", "max"))
)
RANGE_NOTE = (
    "Below or in brackets: the 95 % interval of a mean, or of a median the range that was seen."
)


def benchmark_tables(found: Measurements) -> list[Table]:
    """Make the tables of all benchmarks; a later result of the same name replaces an earlier."""
    latest = {record["benchmark"]: record for record in found.of("benchmark")}
    return [benchmark_table(record) for record in latest.values()]


def benchmark_table(record: Record) -> Table:
    """
    Make the table of one benchmark's result.

    ``result`` is a list of rows, or a mapping, which is one row; without it, the figures of the
    record are. ``{mean, low, high}``, ``{median, min, max}`` and ``{median, p5, p95}`` are a value
    with its range. Columns that are empty are left out.
    """
    result = record.get("result") or {key: v for key, v in record.items() if key not in ABOUT}
    rows = [result] if isinstance(result, Mapping) else result
    named = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in named if any(row.get(key) is not None for row in rows)]
    name = record["benchmark"].replace("_", "-")
    ranges = any(spread_of(value) for row in rows for value in row.values())
    notes = [RANGE_NOTE] * ranges + [str(note) for note in record.get("notes") or []]
    if machine := hardware(record.get("machine") or {}):
        notes.append(f"Machine: {machine}.")
    title = str(record.get("title") or name.replace("-", " ").capitalize())
    cells = [[value_cell(key, row.get(key)) for key in columns] for row in rows]
    return Table(name, title, [label(key) for key in columns], cells, notes)


def spread_of(value: Any) -> Estimate | None:
    """Return an estimate, or a median with its range, if a value is a mapping that holds one."""
    if isinstance(value, Mapping):
        for names in RANGES:
            ends = [value.get(name) for name in names]
            if all(isinstance(end, int | float) for end in ends):
                centre, low, high = (float(end) for end in ends if end is not None)
                return Estimate(centre, low, high, int(value.get("n", 0)))
    return None


def value_cell(key: str, value: Any) -> Cell:
    """Make the cell of one figure: an estimate, a median with its range, a number or a text."""
    scale = 1 / 2**30 if key.endswith("_bytes") else 1.0
    if (found := spread_of(value)) is not None:
        return cell(Estimate(scale * found.mean, scale * found.low, scale * found.high, found.n))
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{label(k)} {value_cell(k, v).inline()}" for k, v in value.items()))
    if isinstance(value, list | tuple):
        return Cell(", ".join(value_cell(key, item).inline() for item in value))
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int) and scale == 1:
        return Cell(f"{value:,}")
    if isinstance(value, int | float):
        return Cell(plain(scale * value))
    return Cell(NOT_MEASURED if value is None else str(value))
