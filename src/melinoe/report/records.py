"""
Read measurement records: JSON objects from files or from memory, checked before they are used.

A `.jsonl` file holds one record a line, a `.json` file one record or a list of them. A record is
a plain dict with a ``kind``; a benchmark's result has ``benchmark`` instead. Every mean is an
estimate ``{"mean", "low", "high", "n"}``: *low* and *high* are its 95 % interval over *n* items.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from melinoe.errors import DataError
from melinoe.stats import Estimate

Record = Mapping[str, Any]
Source = Record | Path | str


@dataclass
class Measurements:
    """Checked records by kind, in the order read, and remarks for the reader of a report."""

    by_kind: dict[str, list[Record]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Record]:
        """Return the records of one *kind*; an empty list where none was read."""
        return self.by_kind.get(kind, [])

    def first(self, kind: str) -> Record | None:
        """Return the first record of one *kind*, or ``None``."""
        return next(iter(self.of(kind)), None)

    def by_model(self, kind: str) -> dict[str, Record]:
        """Return the last record of each model."""
        return {record["model"]: record for record in self.of(kind)}


Sources = Measurements | Iterable[Source] | Source


def read_records(sources: Sources) -> Measurements:
    """
    Read and check records.

    Args:
        sources: Records, paths of `.jsonl` and `.json` files or of directories of them, or both;
            a single one may stand alone. What this function returned passes through.

    Returns:
        The records by kind. Kinds that a report does not show are left out, with a note.

    Raises:
        DataError: a file cannot be read, holds no record at all, or holds a malformed one; the
            message names file and line.
    """
    if isinstance(sources, Measurements):
        return sources
    if isinstance(sources, str | Path | Mapping):
        sources = [sources]
    found = Measurements()
    unknown: dict[str, int] = {}
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
                unknown[record["kind"]] = unknown.get(record["kind"], 0) + 1
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
        raise DataError(f"{source} has no .json or .jsonl file; name where records are")
    return found


def _items(path: Path) -> Iterator[tuple[Any, str]]:
    """Each record of a file, and where it stands."""
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
                where = f"{path}, line {number}"
                yield _parse(line, where), where
    elif path.suffix == ".json":
        whole = _parse(text, str(path))
        if isinstance(whole, list):
            for index, item in enumerate(whole, start=1):
                yield item, f"{path}, record {index}"
        else:
            yield whole, str(path)
    else:
        raise DataError(f"{path} is neither .jsonl nor .json; name a file of records")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        message = f"{where}: not JSON ({error}); measure again, or take this record out"
        raise DataError(message) from error


def read_estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    """Turn a checked record's estimate into an `Estimate`; ``None``, not measured, stays so."""
    return None if value is None else Estimate.from_dict(dict(value))


def estimate(record: Record | None, name: str) -> Estimate | None:
    """Take an estimate out of a record, if both exist."""
    return None if record is None else read_estimate(record.get(name))


# --- what a record must hold ----------------------------------------------------------------------

# Losses that a training log may hold, with their names for people.
TRAINING_TERMS = {
    "nll": "next-token loss (nats)",
    "cache": "cache loss",
    "anchor": "anchor loss",
    "reuse": "reuse loss",
    "distill": "distillation loss",
    "match": "hidden-state distance",
    "replay": "replay loss (nats)",
}

# Kind -> type -> fields. A trailing "?": may be null or absent, because it was not measured.
FIELDS = {
    "serve": {
        "text": "model strategy policy? miss? prefetch?",
        "count": "slots? num_experts",
        "link": "link?",
        "list of estimates or null": "hit_rate_by_layer?",
        "estimate": "hit_rate? adjusted_hit_rate? zero_miss_tokens? transfers_per_token? "
        "prefetch_transfers_per_token? prefetch_precision? prefetch_recall? "
        "prefetch_waste_per_token? computed_there_per_token? prefill_transfers? tokens_per_s? "
        "tpot_s? ttft_s? stall_ms_per_token?",
    },
    "quality": {
        "text": "model domain",
        "flag": "in_domain",
        "estimate": "perplexity increase_over_control?",
        "object": "per_sequence?",
    },
    "score": {"text": "model domain metric how?", "estimate": "score"},
    "comparison": {
        "text": "model other domain metric better?",
        "estimate": "change",
        "flag": "relative",
    },
    "locality": {
        "text": "model",
        "list of numbers": "experts_per_sequence",
        "count": "num_experts",
        "estimate": "reuse?",
        "number": "distinct_experts?",
    },
    "reading": {
        "text": "model policy",
        "count": "slots num_experts",
        "estimate": "transfers_per_token",
        "object": "per_prompt?",
    },
    "curve": {
        "text": "model policy",
        "list of counts": "slots",
        "list of estimates": "hit_rate transfers_per_token?",
        "count": "num_experts",
    },
    "layers": {
        "text": "model policy",
        "count": "slots num_experts",
        "list of estimates or null": "hit_rate_by_layer",
    },
    "predictor": {
        "text": "model winner? prefetch?",
        "count": "slots",
        "estimates by name": "recall transfers? saved?",
        "estimate": "ceiling? gain?",
    },
    "training": {"text": "model", "list of objects": "log", "object": "settings?"},
    "usage": {
        "text": "model",
        "count": "num_experts",
        "list of counts": "shown_layers",
        "list of lists of lists of counts": "counts",
    },
    "timeline": {
        "text": "model",
        "count": "slots num_experts",
        "link": "link?",
        "list of numbers": "ms stall_ms",
        "list of lists of counts": "loads hits?",
    },
    "demo": {"object": "settings? seconds? machine?"},
    "benchmark": {"text": "benchmark", "object": "machine?"},
}


def check(record: Any, where: str) -> str | None:
    """
    Check one record, and return its kind; ``None`` if the kind is not one that a report shows.

    Args:
        record: What a JSON text held.
        where: File and line, for the message.

    Raises:
        DataError: not an object, no kind, or a field that is missing or of another type.
    """

    def fail(what: str) -> DataError:
        return DataError(f"{where}: {what}; measure again, or take this record out")

    if not isinstance(record, Mapping):
        raise fail("a record must be a JSON object")
    kind = record.get("kind", "benchmark" if "benchmark" in record else None)
    if not isinstance(kind, str):
        raise fail("the record says no 'kind'")
    if kind not in FIELDS:
        return None
    for wanted, names in FIELDS[kind].items():
        for name in names.split():
            value = record.get(name.removesuffix("?"))
            if value is None and not name.endswith("?"):
                raise fail(f"the {kind} record has no {name!r}")
            if value is not None and (problem := _problem(value, wanted)):
                raise fail(f"{name.removesuffix('?')!r} of the {kind} record {problem}")
    if kind == "curve" and len(record["slots"]) != len(record["hit_rate"]):
        raise fail("'slots' and 'hit_rate' of the curve record differ in length")
    if kind == "training":
        for row in record["log"]:
            terms = [row[term] for term in TRAINING_TERMS if row.get(term) is not None]
            if _count(row.get("step")) or any(_number(term) for term in terms):
                raise fail(f"the training record's log has the entry {json.dumps(row)[:80]}")
    return kind


def _problem(value: Any, wanted: str) -> str | None:
    """Say what keeps *value* from being of a type of `FIELDS`; None if it is of it."""
    if not wanted.startswith("list of "):
        return _TYPES[wanted](value)
    if not isinstance(value, list) or not value:
        return "is not a list with something in it"
    item_type = wanted.removeprefix("list of ")
    if not item_type.startswith("lists of "):
        item_type = _ITEMS[item_type]
    for index, item in enumerate(value):
        if problem := _problem(item, item_type.replace("lists of ", "list of ", 1)):
            return f"item {index} {problem}"
    return None


def _number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "is not a number"
    return None if math.isfinite(value) else "is not finite"


def _count(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return "is not a whole number of 0 or more"
    return None


def _estimate(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "is not an estimate {mean, low, high, n}"
    for key in ("mean", "low", "high"):
        if key not in value:
            return f"has no {key!r}"
        if problem := _number(value[key]):
            return f"has a {key!r} that {problem}"
    if problem := _count(value.get("n")):
        return f"has an 'n' that {problem}"
    return None if value["low"] <= value["high"] else "has 'low' above 'high'"


def _estimates_by_name(value: Any) -> str | None:
    if not isinstance(value, dict) or not value:
        return "is not an object of estimates"
    for name, item in value.items():
        if item is not None and (problem := _estimate(item)):
            return f"entry {name!r} {problem}"
    return None


def _link(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "is not null or {bandwidth_gb_s, latency_us}"
    for key in ("bandwidth_gb_s", "latency_us"):
        if problem := _number(value.get(key)):
            return f"has a {key!r} that {problem}"
    return None


_TYPES: dict[str, Callable[[Any], str | None]] = {
    "text": lambda value: None if isinstance(value, str) and value else "is not a text",
    "flag": lambda value: None if isinstance(value, bool) else "is not true or false",
    "object": lambda value: None if isinstance(value, dict) else "is not an object",
    "estimate or null": lambda value: None if value is None else _estimate(value),
    "number": _number,
    "count": _count,
    "estimate": _estimate,
    "estimates by name": _estimates_by_name,
    "link": _link,
}
_ITEMS = {
    "numbers": "number",
    "counts": "count",
    "objects": "object",
    "estimates": "estimate",
    "estimates or null": "estimate or null",
}
