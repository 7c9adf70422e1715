"""The tables of a study: one row per setting, in the order tried."""

from collections.abc import Iterator

from melinoe.config.likeness import for_locality
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

NO_CONTROL = "no control run"

NOTE = (
    "In brackets: 95 % over seeds and items together. A price is perplexity over the like-for-like "
    "control with the same seed, trained alike without the locality terms; out of domain it is the "
    "geometric mean over the other corpora. Transfers are per completion token, all layers, each "
    "text from an empty cache, with "
)
UNPRICED = f"{NO_CONTROL}: this setting has no price, because its control was never trained."
OVER_PLAIN = (
    "Over plain fine-tuning: perplexity over a run on next tokens alone. It is no price of the "
    "locality terms, since it holds what teacher, replay and anchors do."
)


def study_tables(found: Measurements) -> list[Table]:
    """Make the tables of each group of the study; none without records."""
    study = gather(found)
    if study is None:
        return []
    made = (price_table, texts_table, caches_table)
    tables = [make(study, group) for group in study.groups for make in made]
    return [table for table in tables if table is not None]


def price_table(study: Study, group: str) -> Table:
    """What each setting of a group costs and saves, base and plain fine-tunings above."""
    record = next(iter(study.tried(group)[0].runs.values()))
    quarter, experts = quarter_cache(record), int(record["num_experts"])
    inside = corpora(record)[0]
    columns = ["setting", "seeds", *(f"perplexity, {text}" for text in inside)]
    columns += ["price in domain", "price out of domain"]
    tried = study.tried(group)
    # Where every control is the plain run, the change over that is the price, and said once.
    apart = any(study.control(one) is not study.plain(one) for one in tried)
    columns += [f"over plain fine-tuning, {where} domain" for where in ("in", "out of") if apart]
    columns += ["transfers / token", "times fewer than base"]
    columns += ["experts per sequence", "distinct over the whole set"]
    rows = []
    for one in _rows(study, group):
        over = [increase(one, study.plain(one), inside) for inside in (True, False) if apart]
        distinct = plain(average(one, "distinct_experts"))
        rows.append(
            [
                Cell(one.name),
                Cell(str(len(one.runs))),
                *(cell(perplexity(one, text)) for text in inside),
                *(_price(study, one, inside) for inside in (True, False)),
                *(_signed(change) for change in over),
                cell(transfers(one, quarter)),
                cell(fewer(study, one, quarter)) if one.name != BASE else Cell(DASH),
                Cell(plain(average(one, "experts_per_sequence"))),
                Cell(f"{distinct} of {experts}"),
            ]
        )
    notes = [f"{NOTE}{_cache_title(quarter, experts)}."]
    notes += [UNPRICED] if any(one.text == NO_CONTROL for row in rows for one in row) else []
    notes += [OVER_PLAIN] if apart else []
    return Table(f"study-{group}", f"Study, {group}: what it costs and saves", columns, rows, notes)


def texts_table(study: Study, group: str) -> Table | None:
    """What each setting with a control costs on each text, the one trained on first."""
    priced = [(one, other) for one in study.tried(group) if (other := study.control(one))]
    if not priced:
        return None
    inside, outside = corpora(next(iter(priced[0][0].runs.values())))
    texts = [*inside, *outside]
    rows = [
        [Cell(one.name), *(_signed(increase_on(one, other, text)) for text in texts)]
        for one, other in priced
    ]
    columns = ["setting", *texts]
    title = f"Study, {group}: price by text"
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
    for name in dict.fromkeys(one.plain for one in tried):
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


def _price(study: Study, setting: Setting, in_domain: bool) -> Cell:
    control = study.control(setting)
    if control is None and for_locality(setting.settings):
        return Cell(NO_CONTROL)
    return _signed(increase(setting, control, in_domain))


def _signed(price: Estimate | None) -> Cell:
    if price is None:
        return Cell(DASH)
    mean, interval = signed(price).removesuffix("]").split(" [")
    return Cell(mean, interval)
