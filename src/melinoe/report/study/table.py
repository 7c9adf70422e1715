"""The tables of a study: one row per setting, in the order tried."""

from collections.abc import Iterator

from melinoe.report.amounts import DASH, plain, signed
from melinoe.report.records import Measurements
from melinoe.report.schema import Record
from melinoe.report.study.compare import average, fewer, increase, transfers
from melinoe.report.study.runs import Setting, Study, gather
from melinoe.report.tables import Cell, Table, cell
from melinoe.stats import Estimate

NOTE = (
    "In brackets: 95 % over seeds and items together. Prices are perplexity over the control with "
    "the same seed, which is the same training without cache losses; out of domain is the "
    "geometric mean over the other corpora. Transfers are per generated token, all layers, each "
    "prompt from an empty cache, simulated from what the model really chose."
)


def study_tables(found: Measurements) -> list[Table]:
    """Make one table per group of the study, with base and control above; none without records."""
    study = gather(found)
    if study is None:
        return []
    return [_table(study, group) for group in study.groups]


def _table(study: Study, group: str) -> Table:
    some = study.tried(group)[0]
    record = next(iter(some.runs.values()))
    caches = [name for name in record["transfers"] if not name.startswith("belady")]
    experts = int(record["num_experts"])
    columns = ["setting", "seeds", "price in domain", "price out of domain"]
    columns += [_cache_title(name, experts) for name in caches]
    columns += ["times fewer than base", "experts per sequence", "distinct over the whole set"]
    quarter = quarter_cache(record)
    rows = []
    for one in _rows(study, group):
        # Where there are no runs to pair with, the row itself is what others are compared to.
        paired = one.name != "base" and bool(study.pairs(one))
        row = [Cell(one.name), Cell(str(len(one.runs)))]
        row += [
            _signed(increase(study, one, inside) if paired else None) for inside in (True, False)
        ]
        row += [cell(transfers(one, name)) for name in caches]
        row.append(cell(fewer(study, one, quarter) if one.name != "base" else None))
        row.append(Cell(plain(average(one, "experts_per_sequence"))))
        row.append(Cell(f"{plain(average(one, 'distinct_experts'))} of {experts}"))
        rows.append(row)
    note = f"Times fewer: with {_cache_title(quarter, experts)}."
    return Table(f"study-{group}", f"Study: {group}", columns, rows, [NOTE, note])


def _rows(study: Study, group: str) -> Iterator[Setting]:
    if study.base is not None:
        yield Setting("base", "base", None, "base", "", {0: study.base})
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
    return f"transfers, {policy}, {100 * _slots(cache) / experts:g} % slots"


def _signed(price: Estimate | None) -> Cell:
    return Cell(DASH if price is None else signed(price))
