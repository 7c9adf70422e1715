"""
Read measurement records: JSON objects from files or from memory, checked before they are used.

A record is a plain dict with a ``kind``; a benchmark's result has ``benchmark`` instead. Every mean
is an estimate ``{"mean", "low", "high", "n"}``: its 95 % interval over *n* items.
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

# Kind -> the type of each field. A trailing "?": may be null or absent, because it was not
# measured; [] is a list with something in it, {} an object whose values are of that type.
FIELDS = {
    "serve": "model:text strategy:text policy:text? slots:count? num_experts:count link:link? "
    "hit_rate:estimate? adjusted_hit_rate:estimate? zero_miss_tokens:estimate? "
    "transfers_per_token:estimate? prefetch_transfers_per_token:estimate? "
    "prefetch_precision:estimate? prefetch_recall:estimate? prefetch_waste_per_token:estimate? "
    "prefill_transfers:estimate? tokens_per_s:estimate? tpot_s:estimate? ttft_s:estimate? "
    "stall_ms_per_token:estimate?",
    "quality": "model:text domain:text in_domain:flag perplexity:estimate per_sequence:object?",
    "score": "model:text domain:text metric:text how:text? score:estimate",
    "comparison": "model:text other:text domain:text metric:text better:text? change:estimate "
    "relative:flag",
    "locality": "model:text experts_per_sequence:[number] num_experts:count reuse:estimate? "
    "distinct_experts:number?",
    "reading": "model:text policy:text slots:count transfers_per_token:estimate per_prompt:object?",
    "curve": "model:text policy:text slots:[count] hit_rate:[estimate] num_experts:count",
    "predictor": "model:text winner:text? slots:count recall:{estimate?} saved:{estimate?}? "
    "ceiling:estimate? gain:estimate?",
    "training": "model:text log:[object] settings:object?",
    "demo": "settings:object? seconds:object? machine:object?",
    "benchmark": "benchmark:text machine:object?",
}


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
    """Yield each record of a file, and where it stands."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path} is neither .jsonl nor .json; name a file of records")
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
        return
    whole = _parse(text, str(path))
    if not isinstance(whole, list):
        yield whole, str(path)
        return
    for index, item in enumerate(whole, start=1):
        yield item, f"{path}, record {index}"


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        message = f"{where}: not JSON ({error}); measure again, or take this record out"
        raise DataError(message) from error


def estimate(record: Record | None, name: str) -> Estimate | None:
    """Take an estimate out of a record; ``None`` where there is no record, or it has none."""
    value = None if record is None else record.get(name)
    return None if value is None else Estimate.from_dict(value)


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
    for one in FIELDS[kind].split():
        name, wanted = one.split(":")
        if record.get(name) is None and not wanted.endswith("?"):
            raise fail(f"the {kind} record has no {name!r}")
        if problem := _problem(record.get(name), wanted):
            raise fail(f"{name!r} of the {kind} record {problem}")
    if kind == "curve" and len(record["slots"]) != len(record["hit_rate"]):
        raise fail("'slots' and 'hit_rate' of the curve record differ in length")
    if kind == "training":
        for row in record["log"]:
            terms = [_problem(row.get(term), "number?") for term in TRAINING_TERMS]
            if _problem(row.get("step"), "count") or any(terms):
                raise fail(f"the training record's log has the entry {json.dumps(row)[:80]}")
    return kind


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_PLAIN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda value: isinstance(value, str) and bool(value), "is not a text"),
    "flag": (lambda value: isinstance(value, bool), "is not true or false"),
    "object": (lambda value: isinstance(value, dict), "is not an object"),
    "number": (_is_number, "is not a number"),
    "count": (_is_count, "is not a whole number of 0 or more"),
}
_OBJECTS = {
    "estimate": {"mean": "number", "low": "number", "high": "number", "n": "count"},
    "link": {"bandwidth_gb_s": "number", "latency_us": "number"},
}


def _problem(value: Any, wanted: str) -> str | None:
    """Say what keeps *value* from being of a type of `FIELDS`; None if it is of it."""
    if wanted.endswith("?"):
        return None if value is None else _problem(value, wanted[:-1])
    if wanted[0] in "[{":
        whole = list if wanted[0] == "[" else dict
        if not isinstance(value, whole) or not value:
            of = "a list with something in it" if whole is list else "an object of estimates"
            return f"is not {of}"
        items = value.items() if isinstance(value, dict) else enumerate(value)
        said = ((key, _problem(item, wanted[1:-1])) for key, item in items)
        return next((f"item {key!r} {problem}" for key, problem in said if problem), None)
    if wanted in _PLAIN:
        holds, wrong = _PLAIN[wanted]
        if not holds(value):
            return wrong
        return "is not finite" if wanted == "number" and not math.isfinite(value) else None
    parts = _OBJECTS[wanted]
    if not isinstance(value, dict):
        return f"is not an object of {', '.join(parts)}"
    for key, kind in parts.items():
        if key not in value:
            return f"has no {key!r}"
        if problem := _problem(value[key], kind):
            return f"has a {key!r} that {problem}"
    if wanted == "estimate" and value["low"] > value["high"]:
        return "has 'low' above 'high'"
    return None
