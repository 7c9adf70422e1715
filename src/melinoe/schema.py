"""
Check JSON values against a schema.

A schema is the name of a type; a list of one schema, for a list of any length; a dict, for an
object: a key that ends in "?" may be absent or null, and "*" stands for any key.
"""

import math
from collections.abc import Mapping
from typing import Any

Schema = str | list[Any] | dict[str, Any]


def fields(kind: Schema, *names: str) -> dict[str, Schema]:
    """Give several fields of one kind."""
    return dict.fromkeys(names, kind)


def problem(value: Any, schema: Schema, where: str = "") -> str | None:
    """Say what is wrong with *value*, which is at *where*; None if nothing is."""
    if isinstance(schema, str):
        words, holds = _TYPES[schema]
        return None if holds(value) else f"{where} is not {words}"
    inside: list[tuple[str, Any, Schema]] = []
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        inside = [(f"{where}[{number}]", item, schema[0]) for number, item in enumerate(value)]
    elif not isinstance(value, Mapping):
        return f"{where or 'it'} is not an object"
    else:
        at = f"{where}." if where else ""
        for key, inner in schema.items():
            name = key.removesuffix("?")
            if name == "*":
                every = [(f"{at}{name}", item, inner) for name, item in value.items()]
                inside += [one for one in every if key == "*" or one[1] is not None]
            elif value.get(name) is not None:
                inside.append((f"{at}{name}", value[name], inner))
            elif not key.endswith("?"):
                return f"{where or 'it'} has no {name!r}"
    found = (problem(item, inner, place) for place, item, inner in inside)
    return next(filter(None, found), None)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_estimate(value: Any) -> bool:
    if not isinstance(value, Mapping) or not _is_count(value.get("n")):
        return False
    ends = [value.get(name) for name in ("low", "high", "mean")]
    return all(map(_is_number, ends)) and ends[0] <= ends[1]  # type: ignore[operator]


_TYPES = {
    "text": ("a text", lambda value: isinstance(value, str)),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "number": ("a finite number", _is_number),
    "count": ("a whole number of 0 or more", _is_count),
    "object": ("an object", lambda value: isinstance(value, Mapping)),
    "estimate": ("an estimate: finite mean, low and high, low first, and a count n", _is_estimate),
}
