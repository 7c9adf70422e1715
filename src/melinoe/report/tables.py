# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""Make the tables of a report: strategies, times, transfers, perplexity, comparisons."""

from collections.abc import Iterable
from dataclasses import dataclass

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
    Cell,
    Table,
    cell,
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
READING = "transfers / token, reading the same text"
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


def _table(name: str, title: str, rows: list[dict[str, Cell]], notes: Iterable[str] = ()) -> Table:
    """Make a table of rows with the same headings, as mappings from those to cells."""
    return Table(name, title, [*rows[0]], [[*row.values()] for row in rows], [*notes])


def main_table(found: Measurements, serving: Serving) -> Table:
    """Make the main table: per strategy hits, transfers, perplexity and speed, beside the base."""
    read = {
        record["model"]: record
        for record in found.of("reading")
        if (record["slots"], record["policy"]) == (serving.slots, serving.policy)
    }

    def beside(value: Record | None, base: Record | None, name: str, sign: str) -> Cell:
        remark = "" if value is base else factor(value, base, name, sign)
        return cell(estimate(value, name), remark=remark)

    base = serving.run("base")
    rows, ahead = [], []
    for strategy in serving.strategies:
        run = serving.run(strategy)
        assert run is not None
        row = {"strategy": Cell(strategy), "hit rate": cell(estimate(run, "hit_rate"), "%")}
        row["zero-miss tokens"] = cell(estimate(run, "zero_miss_tokens"), "%")
        row["transfers / token"] = beside(run, base, "transfers_per_token", "÷")
        if read:
            of = (read.get(run["model"]), read.get("base"))
            row[READING] = beside(*of, "transfers_per_token", "÷")
        for in_domain, where in ((True, "in"), (False, "out of")):
            other = reference(found, run["model"]) or ""
            ours, theirs = (quality(found, m, in_domain) for m in (run["model"], other))
            value = perplexity(found, run["model"], in_domain)
            remark = increase(ours, theirs)
            row[f"perplexity {where} domain"] = cell(value, digits=4, remark=remark)
        for link in serving.links:
            fast, slow = (serving.runs.get(name, {}).get(link) for name in (strategy, "base"))
            row[f"tokens/s, {link_text(link)}"] = beside(fast, slow, "tokens_per_s", "×")
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
    return _table("main", serving.title, rows, notes)


def time_table(serving: Serving) -> Table:
    """Make the table of times and stalls, one row per strategy, over each link."""
    rows = [
        {"strategy": Cell(name)}
        | {
            f"{text}, {link_text(link)}": cell(estimate(serving.runs[name].get(link), key))
            for key, text in TIMES.items()
            for link in serving.links
        }
        for name in serving.strategies
    ]
    return _table("times", f"Time: {serving.title}", rows)


def transfer_table(serving: Serving) -> Table:
    """Make the table of what was copied and when, one row per strategy, the same on any link."""
    runs = {strategy: serving.run(strategy) for strategy in serving.strategies}
    rows = [
        {"strategy": Cell(strategy)}
        | {text: cell(estimate(run, key), unit) for key, (text, unit) in TRANSFERS.items()}
        for strategy, run in runs.items()
    ]
    return _table("transfers", f"Transfers: {serving.title}", rows)


def model_tables(found: Measurements) -> list[Table]:
    """Make the tables of perplexity per corpus, and of paired comparisons."""
    made = (corpus_table(found), comparison_table(found))
    return [table for table in made if table is not None]


def corpus_table(found: Measurements) -> Table | None:
    """Make the table of every model's perplexity on every corpus; ``None`` without records."""
    records = {(r["model"], r["domain"]): r for r in found.of("quality")}
    rows = []
    for domain, in_domain in domains(found):
        row = {"corpus": Cell(domain + (" (trained on)" if in_domain else ""))}
        for model in in_order(model for model, _ in records):
            one, other = (records.get((m, domain)) for m in (model, reference(found, model) or ""))
            remark = increase([one], [other]) if one and other else ""
            row[model] = cell(estimate(one, "perplexity"), "", 4, remark)
        rows.append(row)
    return _table("corpora", "Perplexity per corpus", rows, [quality_note(found)]) if rows else None


def comparison_table(found: Measurements) -> Table | None:
    """Make the table of paired differences of two models; the last of each stands."""
    records = {
        f"{r['metric'].replace('_', ' ')}, {r['domain']}: {r['model']} against {r['other']}": r
        for r in found.of("comparison")
    }
    rows = []
    for name, record in records.items():
        change = Estimate.from_dict(record["change"])
        shown = Cell(signed(change)) if record["relative"] else Cell(*spread(change))
        better = Cell(record.get("better") or "no difference shown")
        rows.append({"comparison": Cell(name), "change": shown, "better": better})
    note = "Paired by example; no difference is shown where the interval holds none."
    title = "Two models on the same examples"
    return _table("comparisons", title, rows, [note]) if rows else None


def predictor_table(found: Measurements) -> Table | None:
    """Make the table of what the predictor and its rivals find, and what loading ahead saves."""
    records = found.by_model("predictor")
    names = dict.fromkeys(name for record in records.values() for name in record["recall"])
    said = {name: PREDICTIONS.get(name, name) for name in names}
    asked: list[tuple[str, str | None, str, str]] = [
        *((f"recall of {text}", "recall", name, "%") for name, text in said.items()),
        ("recall of the best unchanging choice", None, "ceiling", "%"),
        ("recall, learned minus best rival", None, "gain", "%"),
        *((f"transfers a token saved by {text}", "saved", n, "") for n, text in said.items()),
    ]
    rows = []
    for text, inside, key, unit in asked:
        values = {
            model: estimate(records[model].get(inside) if inside else records[model], key)
            for model in in_order(records)
        }
        if any(values.values()):
            cells = {model: cell(value, unit) for model, value in values.items()}
            rows.append({"measure": Cell(text)} | cells)
    if not rows:
        return None
    slots = next(iter(records.values()))["slots"]
    notes = [f"{slots} experts named per layer. An interval that contains 0 shows no gain."]
    return _table("predictor", "Predictor beside free rivals", rows, notes)
