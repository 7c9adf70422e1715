"""
Read measurement records: JSON objects from files or from memory, checked before they are used.

A record is a plain dict with a ``kind``; a benchmark's result has ``benchmark`` instead. Every mean
is an estimate ``{"mean", "low", "high", "n"}``: its 95 % interval over *n* items.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from melinoe.errors import DataError
from melinoe.foreign import SUFFIXES as TABLES
from melinoe.schema import Schema, fields, problem
from melinoe.stats import Estimate
from melinoe.whole_file import parse_json

Record = Mapping[str, Any]

_LINK: Schema = fields("number", "bandwidth_gb_s", "latency_us")
# The fields of each kind of record; see `melinoe.schema`.
FIELDS: dict[str, dict[str, Schema]] = {
    "serve": {
        **fields("text", "model", "strategy", "policy?"),
        **fields("count", "num_experts", "slots?"),
        "link?": _LINK,
        **fields("estimate", "hit_rate?", "adjusted_hit_rate?", "zero_miss_tokens?",
                 "transfers_per_token?", "prefetch_transfers_per_token?", "prefill_transfers?",
                 "tokens_per_s?", "tpot_s?", "ttft_s?", "stall_ms_per_token?"),
    },
    "quality": {
        **fields("text", "model", "domain"),
        **{"in_domain": "flag", "perplexity": "estimate", "per_sequence?": "object"},
    },
    "comparison": {
        **fields("text", "model", "other", "domain", "metric", "better?"),
        **{"change": "estimate", "relative": "flag"},
    },
    "locality": {
        **{"model": "text", "experts_per_sequence": ["number"], "num_experts": "count"},
        **{"reuse?": "estimate", "distinct_experts?": "number"},
    },
    "reading": {
        **fields("text", "model", "policy"),
        **{"slots": "count", "transfers_per_token": "estimate", "per_prompt?": "object"},
    },
    "curve": {
        **fields("text", "model", "policy"),
        **{"slots": ["count"], "hit_rate": ["estimate"], "num_experts": "count"},
    },
    "predictor": {
        **fields("text", "model", "winner?"),
        **{"slots": "count", "recall": {"*?": "estimate"}, "saved?": {"*?": "estimate"}},
        **fields("estimate", "ceiling?", "gain?"),
    },
    "training": {
        "model": "text",
        "log": [{"step": "count"}],
        "settings?": "object",
    },
    "demo": fields("object", "settings?", "seconds?", "machine?"),
    "benchmark": {"benchmark": "text", "machine?": "object"},
}  # fmt: skip


@dataclass
class Measurements:
    """Checked records by kind, in the order read, and remarks for the reader of a report."""

    by_kind: dict[str, list[Record]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Record]:
        """Return the records of one *kind*; an empty list where none was read."""
        return self.by_kind.get(kind, [])

    def by_model(self, kind: str) -> dict[str, Record]:
        """Return the last record of each model."""
        return {record["model"]: record for record in self.of(kind)}


Sources = Measurements | Iterable[Record | Path | str] | Record | Path | str


def read_records(sources: Sources) -> Measurements:
    """
    Read and check records.

    *sources* are records, paths of `.jsonl` and `.json` files or of directories of them, or both;
    what this function returned passes through. Kinds that a report does not show are left out,
    with a note. DataError: a file cannot be read, or holds no record or a malformed one.
    """
    if isinstance(sources, Measurements):
        return sources
    if isinstance(sources, str | Path | Mapping):
        sources = [sources]
    found = Measurements()
    unknown: Counter[str] = Counter()
    for number, source in enumerate(sources, start=1):
        if isinstance(source, str | Path):
            items = [item for path in _files(Path(source)) for item in _items(path)]
            if not items:
                raise DataError(f"{source} holds no record; run the measurement that writes it")
        else:
            items = [(source, f"record {number}")]
        for record, where in items:
            kind = check(record, where)
            if kind is None:
                unknown[record["kind"]] += 1
            else:
                found.by_kind.setdefault(kind, []).append(record)
    for kind, count in unknown.items():
        plural = "records" if count > 1 else "record"
        found.notes.append(f"{count} {plural} of unknown kind {kind!r} ignored.")
    if not found.by_kind and not unknown:
        raise DataError("there are no records to report; run a measurement first")
    return found


def _files(source: Path) -> list[Path]:
    """Return the file itself, or a directory's record files in the order of their names."""
    if not source.is_dir():
        return [source]
    found = sorted(path for path in source.iterdir() if path.suffix in (".json", ".jsonl"))
    if not found:
        ways = filter(None, map(_way_to_records, sorted(source.iterdir())))
        way = next(ways, "name where records are")
        raise DataError(f"{source} has no .json or .jsonl file; {way}")
    return found


def _way_to_records(path: Path) -> str | None:
    """Say what makes records of a file that holds none; None where nothing does."""
    if path.suffix == ".safetensors":
        return f"if it is a trace, name {path} itself"
    if path.suffix in TABLES and path.suffix != ".jsonl":
        return f"make a trace of the table: melinoe import-trace {path} --out trace.safetensors"
    return None


def _items(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield each record of a file, and where it stands."""
    if path.suffix not in (".json", ".jsonl"):
        way = _way_to_records(path) or "name a file of records"
        raise DataError(f"{path} is neither .jsonl nor .json; {way}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); name a file of records") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; name a file of JSON records") from error
    if path.suffix == ".jsonl":
        # Not splitlines: strings may hold Unicode's own line ends, which JSON leaves as they are.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _parse(line, where := f"{path}, line {number}"), where
    elif isinstance(whole := _parse(text, str(path)), list):
        yield from ((item, f"{path}, record {index}") for index, item in enumerate(whole, start=1))
    else:
        yield whole, str(path)


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        message = f"{where}: not JSON ({error}); measure again, or take this record out"
        raise DataError(message) from error


def estimate(record: Record | None, name: str) -> Estimate | None:
    """Take an estimate out of a record; ``None`` where there is no record, or it has none."""
    value = None if record is None else record.get(name)
    return None if value is None else Estimate.from_dict(value)


def check(record: Any, where: str) -> str | None:
    """Check one record, and return its kind; ``None`` if it is of none that a report shows."""

    def fail(what: str) -> DataError:
        return DataError(f"{where}: {what}; measure again, or take this record out")

    if not isinstance(record, Mapping):
        raise fail("a record must be a JSON object")
    kind = record.get("kind", "benchmark" if "benchmark" in record else None)
    if not isinstance(kind, str):
        raise fail("the record says no 'kind'")
    if kind not in FIELDS:
        return None
    if wrong := problem(record, FIELDS[kind]):
        raise fail(f"the {kind} record is malformed: {wrong}")
    if any(not record[name] for name, of in FIELDS[kind].items() if isinstance(of, list)):
        raise fail(f"the {kind} record has an empty list")
    if kind == "curve" and len(record["slots"]) != len(record["hit_rate"]):
        raise fail("'slots' and 'hit_rate' of the curve record differ in length")
    return kind
