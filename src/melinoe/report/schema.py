"""What a record must hold: each kind's fields, and what is wrong with one that lacks them."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from melinoe.errors import DataError
from melinoe.stats import Estimate

Record = Mapping[str, Any]


def read_estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    """Take a checked record's estimate; ``None`` stays ``None``: it was not measured."""
    return None if value is None else Estimate.from_dict(dict(value))


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
    if problem := _count(value.get("n")):
        return f"has an 'n' that {problem}"
    return None if value["low"] <= value["high"] else "has 'low' above 'high'"


def _estimate_or_none(value: Any) -> str | None:
    return None if value is None else _estimate(value)


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
    "prefetch_precision",
    "prefetch_recall",
    "prefetch_waste_per_token",
    "computed_there_per_token",
    "prefill_transfers",
    "tokens_per_s",
    "tpot_s",
    "ttft_s",
    "stall_ms_per_token",
)

# What a training log may hold, with its name for people.
TRAINING_TERMS = {
    "nll": "next-token loss (nats)",
    "cache": "cache loss",
    "anchor": "anchor loss",
    "reuse": "reuse loss",
    "distill": "distillation loss",
    "match": "hidden-state distance",
    "replay": "replay loss (nats)",
}

# Name -> check. A trailing "?" means the field may be null or absent: it was not measured.
FIELDS: dict[str, dict[str, Callable[[Any], str | None]]] = {
    "serve": {
        "model": _text,
        "strategy": _text,
        "slots?": _count,
        "num_experts": _count,
        "policy?": _text,
        "miss?": _text,
        "prefetch?": _text,
        "link?": _link,
        "hit_rate_by_layer?": _list_of(_estimate_or_none),
        **{f"{name}?": _estimate for name in SERVE_ESTIMATES},
    },
    "quality": {
        "model": _text,
        "domain": _text,
        "in_domain": _flag,
        "perplexity": _estimate,
        "increase_over_control?": _estimate,
        "per_sequence?": _mapping,
    },
    "score": {"model": _text, "domain": _text, "metric": _text, "score": _estimate, "how?": _text},
    "comparison": {
        "model": _text,
        "other": _text,
        "domain": _text,
        "metric": _text,
        "change": _estimate,
        "relative": _flag,
        "better?": _text,
    },
    "locality": {
        "model": _text,
        "experts_per_sequence": _list_of(_number),
        "num_experts": _count,
        "reuse?": _estimate,
        "distinct_experts?": _number,
    },
    "reading": {
        "model": _text,
        "slots": _count,
        "policy": _text,
        "num_experts": _count,
        "transfers_per_token": _estimate,
        "per_prompt?": _mapping,
    },
    "curve": {
        "model": _text,
        "policy": _text,
        "slots": _list_of(_count),
        "hit_rate": _list_of(_estimate),
        "transfers_per_token?": _list_of(_estimate),
        "num_experts": _count,
    },
    "layers": {
        "model": _text,
        "policy": _text,
        "slots": _count,
        "num_experts": _count,
        "hit_rate_by_layer": _list_of(_estimate_or_none),
    },
    "predictor": {
        "model": _text,
        "slots": _count,
        "recall": _estimates_by_name,
        "ceiling?": _estimate,
        "gain?": _estimate,
        "winner?": _text,
        "transfers?": _estimates_by_name,
        "saved?": _estimates_by_name,
        "prefetch?": _text,
    },
    "training": {"model": _text, "log": _list_of(_mapping), "settings?": _mapping},
    "usage": {
        "model": _text,
        "num_experts": _count,
        "shown_layers": _list_of(_count),
        "counts": _list_of(_list_of(_list_of(_count))),
    },
    "timeline": {
        "model": _text,
        "slots": _count,
        "num_experts": _count,
        "link?": _link,
        "ms": _list_of(_number),
        "stall_ms": _list_of(_number),
        "loads": _list_of(_list_of(_count)),
        "hits?": _list_of(_list_of(_count)),
    },
    "study": {
        "group": _text,
        "family": _text,
        "name": _text,
        "num_experts": _count,
        "strength?": _number,
        "plain?": _text,
        "settings?": _mapping,
        "quality": _mapping,
        "transfers": _mapping,
        "tokens": _list_of(_count),
        "experts_per_sequence": _list_of(_number),
        "distinct_experts": _list_of(_number),
    },
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
    if kind == "training":
        for row in record["log"]:
            terms = [row[term] for term in TRAINING_TERMS if row.get(term) is not None]
            if _count(row.get("step")) or any(_number(term) for term in terms):
                raise fail(f"the training record's log has the entry {json.dumps(row)[:80]}")
    return kind
