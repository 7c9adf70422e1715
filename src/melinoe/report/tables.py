# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""The tables of a report, as data: what stands in each cell, before any markup."""

from dataclasses import dataclass, field
from typing import Any

from melinoe.report.amounts import (
    NOT_MEASURED,
    geometric_mean,
    spread,
)
from melinoe.report.controls import note, reference
from melinoe.report.pairs import factor, increase
from melinoe.report.records import Measurements
from melinoe.report.schema import Record, read_estimate
from melinoe.stats import Estimate

STRATEGIES = ("base", "control", "fine-tuned", "fine-tuned + prefetch", "all resident")
Link = tuple[float, float] | None


@dataclass(frozen=True)
class Cell:
    """One cell: the mean (or a text), its interval, and a remark such as a ratio to base."""

    text: str
    interval: str = ""
    remark: str = ""

    def inline(self) -> str:
        """Write the cell on one line: ``4.81 [4.60, 5.02] (÷ 3.1)``."""
        interval = f" [{self.interval}]" if self.interval else ""
        return self.text + interval + (f" ({self.remark})" if self.remark else "")


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; the first column names the row."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)


def cell(estimate: Estimate | None, unit: str = "", digits: int = 3, remark: str = "") -> Cell:
    """Make the cell of an estimate; one that was not measured says so."""
    if estimate is None:
        return Cell(NOT_MEASURED)
    mean, interval = spread(estimate, unit, digits)
    return Cell(mean, interval, remark)


def estimate(record: Record | None, name: str) -> Estimate | None:
    """Take an estimate out of a record, if both are there."""
    return None if record is None else read_estimate(record.get(name))


def link_of(record: Record) -> Link:
    """Give (bandwidth in GB/s, latency in us) of a record's emulated link; ``None`` without one."""
    link = record.get("link")
    return None if link is None else (float(link["bandwidth_gb_s"]), float(link["latency_us"]))


def link_text(link: Link) -> str:
    """Name a link: ``emulated link 2 GB/s, 50 µs``."""
    if link is None:
        return "unmodified link"
    return f"emulated link {link[0]:g} GB/s, {link[1]:g} µs"


@dataclass
class Serving:
    """The serve records of one cache configuration: by strategy and link."""

    slots: int | None
    policy: str | None
    num_experts: int
    runs: dict[str, dict[Link, Record]]

    @property
    def strategies(self) -> list[str]:
        """Known strategies in their fixed order, then the others as they came."""
        known = [name for name in STRATEGIES if name in self.runs]
        return known + [name for name in self.runs if name not in STRATEGIES]

    @property
    def links(self) -> list[Link]:
        """The unmodified link first, then emulated ones."""
        found = {link for runs in self.runs.values() for link in runs}
        return sorted(found, key=lambda link: (link is not None, link or ()))

    def run(self, strategy: str) -> Record | None:
        """The run whose counts stand for the strategy: over the unmodified link if there is one."""
        runs = self.runs.get(strategy, {})
        return runs.get(None) or next(iter(runs.values()), None)

    @property
    def title(self) -> str:
        """Say the configuration in words."""
        if self.slots is None:
            return "All experts resident"
        share = f"{100 * self.slots / self.num_experts:.0f} %"
        policy = f", {self.policy.upper()}" if self.policy else ""
        return f"{self.slots} of {self.num_experts} experts per layer resident ({share}){policy}"


def servings(found: Measurements) -> list[Serving]:
    """
    Sort the serve records into configurations; where two say the same, the later one stands.

    The all-resident run joins every configuration, as it is what each is compared with. Runs of
    `melinoe bench`, which are of one model and have a table of their own, are not among them.
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


def perplexity(found: Measurements, model: str, in_domain: bool) -> Estimate | None:
    """Perplexity of *model*: over one domain as measured, over several their geometric mean."""
    latest = {
        record["domain"]: read_estimate(record["perplexity"])
        for record in found.of("quality")
        if record["model"] == model and record["in_domain"] is in_domain
    }
    estimates = [item for item in latest.values() if item is not None]
    if len(estimates) == 1:
        return estimates[0]
    return geometric_mean(estimates) if estimates else None


def domains(found: Measurements) -> list[tuple[str, bool]]:
    """Corpora in order, the ones trained on first: (name, in domain)."""
    seen = dict.fromkeys((r["domain"], r["in_domain"]) for r in found.of("quality"))
    return sorted(seen, key=lambda item: not item[1])


def change(value: Estimate | None, base: Estimate | None) -> str:
    """Write how far a mean lies from the base's, in percent with its sign."""
    if value is None or base is None or base.mean == 0:
        return ""
    return f"{100 * (value.mean / base.mean - 1):+.1f} %".replace("-", "−")


def quality(found: Measurements, model: str, in_domain: bool) -> list[Record]:
    """Give the quality records of *model*, the last of each corpus."""
    records = [r for r in found.of("quality") if r["model"] == model]
    return list({r["domain"]: r for r in records if r["in_domain"] is in_domain}.values())


def main_table(found: Measurements, serving: Serving) -> Table:
    """One row per strategy: what it hits, moves, answers and how fast, beside the base."""
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
        note(found),
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


def time_table(serving: Serving) -> Table:
    """Where the time of a token went, one row per strategy, over each link."""
    rows = []
    for strategy in serving.strategies:
        runs = [serving.runs[strategy].get(link) for link in serving.links]
        rows.append([Cell(strategy), *(cell(estimate(run, key)) for key in TIMES for run in runs)])
    columns = [f"{text}, {link_text(link)}" for text in TIMES.values() for link in serving.links]
    return Table("times", f"Time: {serving.title}", ["strategy", *columns], rows)


def transfer_table(serving: Serving) -> Table:
    """What was moved and when, one row per strategy; the link changes none of it."""
    rows = []
    ahead = any(estimate(serving.run(one), "prefetch_precision") for one in serving.strategies)
    shown = {
        key: about
        for key, about in TRANSFERS.items()
        if ahead or key not in ("prefetch_precision", "prefetch_recall", "prefetch_waste_per_token")
    }
    for strategy in serving.strategies:
        run = serving.run(strategy)
        values = [cell(estimate(run, key), unit) for key, (_, unit) in shown.items()]
        rows.append([Cell(strategy), *values])
    columns = ["strategy", *(text for text, _ in shown.values())]
    return Table("transfers", f"Transfers: {serving.title}", columns, rows)


def corpus_table(found: Measurements) -> Table | None:
    """Perplexity of every model on every corpus, or ``None`` without quality records."""
    records = {(r["model"], r["domain"]): r for r in found.of("quality")}
    if not records:
        return None
    models = ordered_models(r["model"] for r in found.of("quality"))
    rows = []
    for domain, in_domain in domains(found):
        row = [Cell(domain + (" (trained on)" if in_domain else ""))]
        for model in models:
            one, of = records.get((model, domain)), reference(found, model)
            other = records.get((of, domain)) if of else None
            remark = increase([one], [other]) if one and other else ""
            row.append(cell(estimate(one, "perplexity"), "", 4, remark))
        rows.append(row)
    return Table("corpora", "Perplexity per corpus", ["corpus", *models], rows, [note(found)])


def ordered_models(names: Any) -> list[str]:
    """Models without repetition: base, control and fine-tuned first, others as they came."""
    seen = dict.fromkeys(names)
    return [n for n in STRATEGIES if n in seen] + [n for n in seen if n not in STRATEGIES]
