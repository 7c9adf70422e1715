# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""Make the tables of a report: strategies, times, transfers, perplexity, scores, benchmarks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from melinoe.report.amounts import hardware, label, plain, signed, spread
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
from melinoe.report.table import Cell, Table, cell
from melinoe.stats import Estimate

Link = tuple[float, float] | None  # bandwidth in GB/s and latency in us; None: unmodified


def link_of(record: Record) -> Link:
    """Return a record's emulated link; ``None`` where the link was not emulated."""
    link = record.get("link")
    return None if link is None else (float(link["bandwidth_gb_s"]), float(link["latency_us"]))


def link_text(link: Link) -> str:
    """Name a link: ``emulated link 2 GB/s, 50 µs``."""
    if link is None:
        return "unmodified link"
    return f"emulated link {link[0]:g} GB/s, {link[1]:g} µs"


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

    The all-resident run joins every configuration, as each is compared with it. Runs of
    `melinoe bench` have a table of their own and are left out.
    """
    records = [record for record in found.of("serve") if "predicted" not in record]
    bounded = [record for record in records if record["strategy"] != "all resident"]
    configurations: dict[tuple[int | None, str | None], Serving] = {}
    for record in bounded or records:
        slots = record.get("slots") if bounded else None
        key = (slots, record.get("policy"))
        if key not in configurations:
            configurations[key] = Serving(*key, record["num_experts"], {})
    repeated = 0
    for serving in configurations.values():
        for record in records:
            everyone = record["strategy"] == "all resident"
            same = (record.get("slots"), record.get("policy")) == (serving.slots, serving.policy)
            if everyone or same:
                runs = serving.runs.setdefault(record["strategy"], {})
                repeated += link_of(record) in runs
                runs[link_of(record)] = record
    if repeated:
        note = f"{repeated} serve record(s) repeat an earlier one; the later one stands."
        if note not in found.notes:
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
    base = serving.run("base")
    rows = []
    for strategy in serving.strategies:
        run = serving.run(strategy)
        assert run is not None
        is_base = strategy == "base"
        moved = estimate(run, "transfers_per_token")
        less = "" if is_base else factor(run, base, "transfers_per_token", "÷")
        row = [Cell(strategy), cell(estimate(run, "hit_rate"), "%")]
        row += [cell(estimate(run, "zero_miss_tokens"), "%"), cell(moved, remark=less)]
        if read:
            own = read.get(run["model"])
            less = "" if is_base else factor(own, read.get("base"), "transfers_per_token", "÷")
            row.append(cell(estimate(own, "transfers_per_token"), remark=less))
        for in_domain in (True, False):
            remark, of = "", reference(found, run["model"])
            if of is not None:
                ours, theirs = (quality(found, m, in_domain) for m in (run["model"], of))
                remark = increase(ours, theirs)
            value = perplexity(found, run["model"], in_domain)
            row.append(cell(value, digits=4, remark=remark))
        for link in serving.links:
            fast, slow = (serving.runs.get(name, {}).get(link) for name in (strategy, "base"))
            remark = "" if is_base else factor(fast, slow, "tokens_per_s", "×")
            row.append(cell(estimate(fast, "tokens_per_s"), remark=remark))
        rows.append(row)
    notes = [
        "Below or behind each mean: its 95 % interval. ÷: times fewer than base; ×: times as fast "
        "as base; in brackets their intervals, paired by prompt or text where the records list "
        "those.",
        quality_note(found),
    ]
    if read:
        notes.append(
            "Transfers per token are of the text that each model writes, greedily. Where all read "
            "the same held-out answers, nothing is prefetched, and a model that repeats itself "
            "gains nothing by it."
        )
    for strategy in serving.strategies:
        ahead = estimate(serving.run(strategy), "prefetch_transfers_per_token")
        if ahead is not None and ahead.mean > 0:
            mean, interval = spread(ahead)
            notes.append(
                f"Transfers are those that a token waited for; {strategy} copies "
                f"{mean} [{interval}] more per token ahead of need."
            )
    if sum(not in_domain for _, in_domain in domains(found)) > 1:
        notes.append("Out of domain: geometric mean over the other corpora, taken as independent.")
    return Table("main", serving.title, columns, rows, notes)


TIMES = {
    "ttft_s": "time to first token (s)",
    "tpot_s": "time per later token (s)",
    "stall_ms_per_token": "stall (ms / token)",
}
TRANSFERS = {
    "adjusted_hit_rate": ("adjusted hit rate", "%"),
    "transfers_per_token": ("demanded / token", ""),
    "prefetch_transfers_per_token": ("prefetched / token", ""),
    "prefetch_precision": ("precision of prefetch", "%"),
    "prefetch_recall": ("recall of prefetch", "%"),
    "prefetch_waste_per_token": ("prefetched in vain / token", ""),
    "prefill_transfers": ("transfers in prefill", ""),
}
OF_PREFETCHES = ("prefetch_precision", "prefetch_recall", "prefetch_waste_per_token")


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
    prefetched = any(estimate(run, "prefetch_precision") for run in runs.values())
    shown = {
        key: about for key, about in TRANSFERS.items() if prefetched or key not in OF_PREFETCHES
    }
    rows = [
        [Cell(strategy), *(cell(estimate(run, key), unit) for key, (_, unit) in shown.items())]
        for strategy, run in runs.items()
    ]
    columns = ["strategy", *(text for text, _ in shown.values())]
    return Table("transfers", f"Transfers: {serving.title}", columns, rows)


def corpus_table(found: Measurements) -> Table | None:
    """Make the table of every model's perplexity on every corpus; ``None`` without records."""
    records = {(r["model"], r["domain"]): r for r in found.of("quality")}
    if not records:
        return None
    models = in_order(r["model"] for r in found.of("quality"))
    rows = []
    for domain, in_domain in domains(found):
        row = [Cell(domain + (" (trained on)" if in_domain else ""))]
        for model in models:
            one, of = records.get((model, domain)), reference(found, model)
            other = records.get((of, domain)) if of else None
            remark = increase([one], [other]) if one and other else ""
            row.append(cell(estimate(one, "perplexity"), "", 4, remark))
        rows.append(row)
    return Table(
        "corpora", "Perplexity per corpus", ["corpus", *models], rows, [quality_note(found)]
    )


def score_table(found: Measurements) -> Table | None:
    """Make the table of every model's task scores; ``None`` without score records."""
    records = {(r["domain"], r["metric"], r["model"]): r for r in found.of("score")}
    if not records:
        return None
    models = in_order(model for _, _, model in records)
    rows = [
        [
            Cell(f"{domain}: {metric.replace('_', ' ')}"),
            *(_score(records.get((domain, metric, model))) for model in models),
        ]
        for domain, metric in dict.fromkeys(key[:2] for key in records)
    ]
    notes = {
        f"{r['metric'].replace('_', ' ')}: {r['how']}" for r in records.values() if r.get("how")
    }
    return Table("scores", "Task scores", ["text or task", *models], rows, sorted(notes))


def _score(record: Record | None) -> Cell:
    score = estimate(record, "score")
    if record is None or score is None:
        return cell(None)
    right = f"{record['right']:,} " if record.get("right") is not None else ""
    return cell(score, remark=f"{right}of {score.n:,}")


def comparison_table(found: Measurements) -> Table | None:
    """Make the table of paired differences of two models; the last of each stands."""
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


# --- benchmark results: JSON with ``benchmark``, its figures, and the machine ---------------------

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
INTERVALS = "Below or in brackets: a 95 % interval."
SEEN = "Below or in brackets: the range that the benchmark saw."
BOTH = (
    "Below or in brackets: a 95 % interval for a mean, "
    "the range that the benchmark saw for a median."
)


def benchmark_tables(found: Measurements) -> list[Table]:
    """Make the tables of all benchmarks; a later result of the same name replaces an earlier."""
    latest = {record["benchmark"]: record for record in found.of("benchmark")}
    return [benchmark_table(record) for record in latest.values()]


def benchmark_table(record: Record) -> Table:
    """
    Make the table of one benchmark's result.

    ``result`` (without it, every figure of the record) may be a list of rows or
    a mapping of figures, nested as deep as it likes; ``{mean, low, high}``, ``{median, min, max}``
    and ``{median, p5, p95}`` are one value with its range. Sentences in ``notes`` stand below it.
    Columns that hold nothing in any row are left out.
    """
    result = record.get("result")
    if result is None:
        result = {key: value for key, value in record.items() if key not in ABOUT}
    name = record["benchmark"].replace("_", "-")
    kinds = set(_kinds_of_ranges(result))
    notes = [BOTH if len(kinds) == 2 else INTERVALS if True in kinds else SEEN] if kinds else []
    notes += [str(note) for note in record.get("notes") or []]
    machine = hardware(record.get("machine") or {})
    notes += [f"Machine: {machine}."] if machine else []
    title = str(record.get("title") or name.replace("-", " ").capitalize())
    if isinstance(result, list) and result and all(isinstance(row, Mapping) for row in result):
        told = {key for row in result for key, value in row.items() if value is not None}
        columns = [key for key in dict.fromkeys(k for row in result for k in row) if key in told]
        cells = [[value_cell(key, row.get(key)) for key in columns] for row in result]
        return Table(name, title, [label(key) for key in columns], cells, notes)
    figures = result if isinstance(result, Mapping) else {"result": result}
    rows = [[Cell(text), value] for text, value in _figures(figures)]
    return Table(name, title, ["figure", "value"], rows, notes)


def spread_of(value: Any) -> Estimate | None:
    """Return an estimate, or a median with its range, if a value is a mapping that holds one."""
    if isinstance(value, Mapping):
        for names in RANGES:
            ends = [value.get(name) for name in names]
            if all(isinstance(end, int | float) for end in ends):
                centre, low, high = (float(end) for end in ends if end is not None)
                return Estimate(centre, low, high, int(value.get("n", 0)))
    return None


def _kinds_of_ranges(value: Any) -> Iterator[bool]:
    """For each range within *value*, whether it is an interval: a mean between low and high."""
    if spread_of(value) is not None:
        yield {"mean", "low", "high"} <= value.keys()
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _kinds_of_ranges(one)


def value_cell(key: str, value: Any) -> Cell:
    """Make the cell of one figure: an estimate, a median with its range, a number or a text."""
    scale = 1 / 2**30 if key.endswith("_bytes") else 1.0
    if (found := spread_of(value)) is not None:
        return cell(Estimate(scale * found.mean, scale * found.low, scale * found.high, found.n))
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{label(k)} {value_cell(k, v).inline()}" for k, v in value.items()))
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int) and scale == 1:
        return Cell(f"{value:,}")
    if isinstance(value, int | float):
        return Cell(plain(scale * value))
    if isinstance(value, list | tuple):
        return Cell(", ".join(value_cell(key, item).inline() for item in value))
    return Cell("n/a" if value is None else str(value))


def _figures(
    result: Mapping[str, Any], path: tuple[str, ...] = (), unit: str = ""
) -> Iterator[tuple[str, Cell]]:
    """Nested figures, each as name and cell: ``request, lru, all hits (µs)``."""
    for key, value in result.items():
        own = unit if label(key) == key.replace("_", " ") else key
        names = (*path, str(key))
        if isinstance(value, Mapping) and spread_of(value) is None and value:
            yield from _figures(value, names, own)
            continue
        bare = [label(one).partition(" (")[0] if one == own else label(one) for one in names]
        ending = label(own).partition(" (")[2]
        name = ", ".join(bare) + (f" ({ending}" if ending else "")
        yield name, value_cell(own or str(key), value)
