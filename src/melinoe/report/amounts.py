# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""Write numbers, estimates, settings and machines as text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from melinoe.stats import Estimate

DASH = "–"
UNITS = {
    "_gb_s": "GB/s",
    "_us": "µs",
    "_ms": "ms",
    "_s": "s",
    "_bytes": "GiB",
    "_gib": "GiB",
    "_mib": "MiB",
    "_percent": "%",
}
Facts = list[tuple[str, str]]  # a name and a text each


def label(key: str) -> str:
    """Write a name for people: ``decide_us`` becomes ``decide (µs)``."""
    for ending, unit in UNITS.items():
        if key.endswith(ending) and not key.endswith("per_s"):
            return f"{key.removesuffix(ending).replace('_', ' ')} ({unit})"
    return key.replace("_", " ").replace(" per s", " / s")


def decimals(value: float, digits: int = 3) -> int:
    """Return how many decimals show *value* with *digits* significant digits; 0 to 5."""
    if value == 0 or not math.isfinite(value):
        return max(0, digits - 1)
    return min(5, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def plain(value: float, digits: int = 3) -> str:
    """Write *value* with *digits* significant digits, thousands apart, never an exponent."""
    return f"{value:,.{decimals(value, digits)}f}"


def spread(estimate: Estimate, unit: str = "", digits: int = 3) -> tuple[str, str]:
    """Write mean and interval with the mean's decimals; unit ``"%"`` shows a share times 100."""
    scale = 100.0 if unit == "%" else 1.0
    places = 1 if unit == "%" else decimals(estimate.mean, digits)
    low, high = (f"{scale * end:,.{places}f}" for end in (estimate.low, estimate.high))
    mean = f"{scale * estimate.mean:,.{places}f}" + (" %" if unit == "%" else "")
    return mean, f"{low} to {high}" if estimate.low < 0 else f"{low}{DASH}{high}"


def inline(estimate: Estimate, unit: str = "", digits: int = 3) -> str:
    """Write mean and interval for use in a sentence: ``9.81 [9.40, 10.22]``."""
    mean, interval = spread(estimate, unit, digits)
    return f"{mean} [{interval.replace(' to ', ', ').replace(DASH, ', ')}]"


def signed(change: Estimate) -> str:
    """Write a relative change in percent, with signs: ``+1.8 % [+0.9, +2.6]``."""
    ends = (change.mean, change.low, change.high)
    mean, low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in ends)
    return f"{mean} % [{low}, {high}]"


def join(parts: Sequence[str]) -> str:
    """Join phrases: ``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def say(value: Any) -> str:
    """Write a setting: ``none``, ``yes``, four significant digits, or as it is."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(say, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> Facts:
    """Write a mapping as names and texts, nested names joined: ``link bandwidth (GB/s)``."""
    facts: Facts = []
    for key, value in values.items():
        name = f"{prefix}{label(key)}"
        nested = isinstance(value, Mapping)
        facts += flat(value, f"{name} ") if nested else [(name, say(value))]
    return facts


def hardware(machine: Mapping[str, Any]) -> str:
    """Write a machine on one line, leaving out what it does not have."""
    parts = {k: item for k, item in machine.items() if k not in ("versions", "commit", "date")}
    said = [f"{name}: {text}" for name, text in flat(parts) if text not in ("none", "")]
    return "; ".join(said)
