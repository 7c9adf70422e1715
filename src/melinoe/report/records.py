"""
Read measurement records: JSON objects from files or from memory, checked before they are used.

A `.jsonl` file holds one record a line, a `.json` file one record or a list of them. A record is
a plain dict with a ``kind``; a benchmark's result has ``benchmark`` instead. Every mean is an
estimate ``{"mean", "low", "high", "n"}``: *low* and *high* are its 95 % interval over *n* items.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from melinoe.errors import DataError

Record = Mapping[str, Any]
Source = Record | Path | str


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over *n* items, all in the unit of the field it came from."""

    mean: float
    low: float
    high: float
    n: int | None = None

    @classmethod
    def of(cls, value: Mapping[str, Any] | None) -> "Estimate | None":
        """Take a checked record's field; ``None`` stays ``None``: it was not measured."""
        if value is None:
            return None
        return cls(float(value["mean"]), float(value["low"]), float(value["high"]), value.get("n"))


@dataclass
class Measurements:
    """Checked records by kind, in the order read, and what a reader should know about them."""

    by_kind: dict[str, list[Record]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Record]:
        """Give the records of one *kind*; an empty list where none was read."""
        return self.by_kind.get(kind, [])

    def first(self, kind: str) -> Record | None:
        """Give the first record of one *kind*, or ``None``."""
        return next(iter(self.of(kind)), None)


def _number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "is not a number"
    return None if math.isfinite(value) else "is not finite"


def _count(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return "is not a whole number of 0 or more"
    return None


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "is not a text"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "is not true or false"


def _mapping(value: Any) -> str | None:
    return None if isinstance(value, dict) else "is not an object"


def _estimate(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "is not an estimate {mean, low, high, n}"
    for key in ("mean", "low", "high"):
        if key not in value:
            return f"has no {key!r}"
        if problem := _number(value[key]):
            return f"has a {key!r} that {problem}"
    return None if value["low"] <= value["high"] else "has 'low' above 'high'"


def _list_of(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def run(value: Any) -> str | None:
        if not isinstance(value, list) or not value:
            return "is not a list with something in it"
        for index, item in enumerate(value):
            if problem := check(item):
                return f"item {index} {problem}"
        return None

    return run


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


SERVE_ESTIMATES = (
    "hit_rate",
    "adjusted_hit_rate",
    "zero_miss_tokens",
    "transfers_per_token",
    "prefetch_transfers_per_token",
    "prefill_transfers",
    "tokens_per_s",
    "tpot_s",
    "ttft_s",
    "stall_ms_per_token",
)

# Name -> check. A trailing "?" means the field may be null or absent: it was not measured.
FIELDS: dict[str, dict[str, Callable[[Any], str | None]]] = {
    "serve": {
        "model": _text,
        "strategy": _text,
        "slots?": _count,
        "num_experts": _count,
        "policy?": _text,
        "link?": _link,
        **{f"{name}?": _estimate for name in SERVE_ESTIMATES},
    },
    "quality": {"model": _text, "domain": _text, "in_domain": _flag, "perplexity": _estimate},
    "locality": {
        "model": _text,
        "experts_per_sequence": _list_of(_number),
        "num_experts": _count,
        "reuse?": _estimate,
        "distinct_experts?": _number,
    },
    "curve": {
        "model": _text,
        "policy": _text,
        "slots": _list_of(_count),
        "hit_rate": _list_of(_estimate),
        "num_experts": _count,
    },
    "predictor": {"model": _text, "slots": _count, "recall": _estimates_by_name},
    "training": {"model": _text, "log": _list_of(_mapping), "settings?": _mapping},
    "demo": {"settings?": _mapping, "seconds?": _mapping, "machine?": _mapping},
    "benchmark": {"benchmark": _text, "result?": lambda value: None, "machine?": _mapping},
}


def check(record: Any, where: str) -> str | None:
    """
    Check one record, and give its kind; ``None`` if the kind is not one that a report shows.

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
    for name, test in FIELDS[kind].items():
        field_name = name.removesuffix("?")
        value = record.get(field_name)
        if value is None:
            if name.endswith("?"):
                continue
            raise fail(f"the {kind} record has no {field_name!r}")
        if problem := test(value):
            raise fail(f"{field_name!r} of the {kind} record {problem}")
    if kind == "curve" and len(record["slots"]) != len(record["hit_rate"]):
        raise fail("'slots' and 'hit_rate' of the curve record differ in length")
    if kind == "training" and not all(
        _count(row.get("step")) is None and not any(_number(v) for v in _numbers(row))
        for row in record["log"]
    ):
        raise fail("an entry of the training record's 'log' has no whole 'step' or a non-number")
    return kind


def _numbers(row: Mapping[str, Any]) -> list[Any]:
    return [value for value in row.values() if isinstance(value, int | float)]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        message = f"{where}: not JSON ({error}); measure again, or take this record out"
        raise DataError(message) from error


def _from_file(path: Path) -> Iterable[tuple[Any, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); name a file of records") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; name a file of JSON records") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
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


def read_records(sources: Iterable[Source] | Source) -> Measurements:
    """
    Read and check records.

    Args:
        sources: Records, paths of `.jsonl` and `.json` files, or both; a single one may stand
            alone.

    Returns:
        The records by kind. Kinds that a report does not show are left out, with a note.

    Raises:
        DataError: a file cannot be read, holds no record at all, or holds a malformed one; the
            message names file and line.
    """
    if isinstance(sources, str | Path | Mapping):
        sources = [sources]
    found = Measurements()
    unknown: dict[str, int] = {}
    for number, source in enumerate(sources, start=1):
        if isinstance(source, str | Path):
            items = list(_from_file(Path(source)))
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
