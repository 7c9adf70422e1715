"""The tables of a study: one row per setting, in the order tried."""

from collections.abc import Iterator

from melinoe.report.amounts import DASH, plain, signed
from melinoe.report.records import Measurements
from melinoe.report.schema import Record
from melinoe.report.study.compare import (
    average,
    fewer,
    increase,
    increase_on,
    perplexity,
    transfers,
)
from melinoe.report.study.runs import BASE, Setting, Study, corpora, gather
from melinoe.report.tables import Cell, Table, cell
from melinoe.stats import Estimate

NOTE = (
    "In brackets: 95 % over seeds and items together. Prices are perplexity over the control with "
    "the same seed, which is the same training without cache losses; out of domain is the "
    "geometric mean over the other corpora. Transfers are per completion token, all layers, each "
    "text from an empty cache, simulated from what the model really chose. Items are resampled; of "
    "seeds, which are few, the standard error of their mean counts, with Student's t. With one "
    "seed the interval holds items alone."
)


def study_tables(found: Measurements) -> list[Table]:
    """Make the tables of each group of the study; none without records."""
    study = gather(found)
    if study is None:
        return []
    made = (price_table, texts_table, caches_table)
    return [make(study, group) for group in study.groups for make in made]


def price_table(study: Study, group: str) -> Table:
    """What each setting of a group costs and saves, base and controls above."""
    record = next(iter(study.tried(group)[0].runs.values()))
    quarter, experts = quarter_cache(record), int(record["num_experts"])
    inside = corpora(record)[0]
    columns = ["setting", "seeds", *(f"perplexity, {text}" for text in inside)]
    columns += ["price in domain", "price out of domain"]
    columns += ["transfers / token", "times fewer than base"]
    columns += ["experts per sequence", "distinct over the whole set"]
    rows = []
    for one in _rows(study, group):
        prices = [increase(study, one, inside) for inside in (True, False)]
        distinct = plain(average(one, "distinct_experts"))
        rows.append(
            [
                Cell(one.name),
                Cell(str(len(one.runs))),
                *(cell(perplexity(one, text)) for text in inside),
                *(_signed(price) for price in prices),
                cell(transfers(one, quarter)),
                cell(fewer(study, one, quarter)) if one.name != BASE else Cell(DASH),
                Cell(plain(average(one, "experts_per_sequence"))),
                Cell(f"{distinct} of {experts}"),
            ]
        )
    notes = [NOTE, f"Transfers: {_cache_title(quarter, experts)}."]
    return Table(f"study-{group}", f"Study, {group}: what it costs and saves", columns, rows, notes)


def texts_table(study: Study, group: str) -> Table:
    """What each setting of a group costs on each text, the one trained on first."""
    tried = study.tried(group)
    inside, outside = corpora(next(iter(tried[0].runs.values())))
    texts = [*inside, *outside]
    rows = [
        [Cell(one.name), *(_signed(increase_on(study, one, text)) for text in texts)]
        for one in tried
    ]
    columns = ["setting", *texts]
    title = f"Study, {group}: perplexity over the control, by text"
    notes = [f"Trained on: {', '.join(inside)}."] if inside else []
    return Table(f"study-{group}-texts", title, columns, rows, notes)


def caches_table(study: Study, group: str) -> Table:
    """Transfers per token of each setting for every cache that was simulated."""
    record = next(iter(study.tried(group)[0].runs.values()))
    caches = sorted(record["transfers"], key=_slots)
    experts = int(record["num_experts"])
    rows = [
        [Cell(one.name), *(cell(transfers(one, name)) for name in caches)]
        for one in _rows(study, group)
    ]
    columns = ["setting", *(_cache_title(name, experts) for name in caches)]
    title = f"Study, {group}: transfers per token by cache"
    return Table(f"study-{group}-caches", title, columns, rows)


def _rows(study: Study, group: str) -> Iterator[Setting]:
    if study.base is not None:
        yield study.base_setting
    tried = study.tried(group)
    for name in dict.fromkeys(one.control for one in tried):
        yield study.settings[name]
    yield from tried


def quarter_cache(record: Record) -> str:
    """Choose the cache that results are stated for: LFU with the slots nearest to a quarter."""
    quarter = record["num_experts"] / 4
    return min(
        record["transfers"], key=lambda name: (abs(_slots(name) - quarter), name[:3] != "lfu")
    )


def _slots(cache: str) -> int:
    return int(cache.rpartition("-")[2])


def _cache_title(cache: str, experts: int) -> str:
    policy = cache.rpartition("-")[0].upper()
    return f"{policy}, {100 * _slots(cache) / experts:g} % of the experts resident"


def _signed(price: Estimate | None) -> Cell:
    if price is None:
        return Cell(DASH)
    mean, interval = signed(price).removesuffix("]").split(" [")
    return Cell(mean, interval)
