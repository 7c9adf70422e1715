# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""Write numbers, estimates, settings and machines as text, and compute ratios of estimates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from melinoe.stats import Estimate

DASH = "–"
NOT_MEASURED = "n/a"
UNITS = {
    "_us": "µs",
    "_ms": "ms",
    "_s": "s",
    "_bytes": "GiB",
    "_gib": "GiB",
    "_mib": "MiB",
    "_percent": "%",
    "_gb_s": "GB/s",
}
Facts = list[tuple[str, str]]  # a name and a text each


def label(key: str) -> str:
    """Write a name for people: ``decide_us`` becomes ``decide (µs)``."""
    for ending, unit in sorted(UNITS.items(), key=lambda item: -len(item[0])):
        if key.endswith(ending) and key != ending[1:] and not key.endswith("per_s"):
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
    """
    Write an estimate's mean and its interval, both with the decimals of the mean.

    Args:
        estimate: What to write.
        unit: ``"%"`` for a share between 0 and 1, shown times 100; anything else is not written.
        digits: Significant digits of the mean; a percentage always has one decimal.
    """
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


def change(value: Estimate | None, base: Estimate | None) -> str:
    """Write how far a mean lies from the base's, in percent with its sign."""
    if value is None or base is None or base.mean == 0:
        return ""
    return f"{100 * (value.mean / base.mean - 1):+.1f} %".replace("-", "−")


def join(parts: Sequence[str]) -> str:
    """Join phrases: ``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def geometric_mean(estimates: Sequence[Estimate]) -> Estimate:
    """
    Average positive estimates on the log scale, with the interval that follows.

    The distances from mean to either end are added in quadrature: that takes the estimates as
    independent of each other, which separate corpora are.

    Raises:
        ValueError: nothing to average, or something not positive.
    """
    if not estimates or any(item.low <= 0 for item in estimates):
        raise ValueError("a geometric mean needs positive numbers")
    count = len(estimates)
    centre = sum(math.log(item.mean) for item in estimates) / count
    down = math.hypot(*(math.log(item.mean / item.low) for item in estimates)) / count
    up = math.hypot(*(math.log(item.high / item.mean) for item in estimates)) / count
    total = sum(item.n for item in estimates)
    return Estimate(math.exp(centre), math.exp(centre - down), math.exp(centre + up), total)


def ratio(top: Estimate, bottom: Estimate) -> Estimate | None:
    """
    Divide two positive estimates; the range is the widest that their intervals allow.

    Wider than a paired interval would be, never narrower. ``None`` where the divisor's interval
    reaches zero.
    """
    if bottom.low <= 0 or top.low < 0:
        return None
    low, high = top.low / bottom.high, top.high / bottom.low
    return Estimate(top.mean / bottom.mean, low, high, min(top.n, bottom.n))


def apart(one: Estimate, other: Estimate) -> bool:
    """
    Return whether two intervals do not touch: only then does a sentence call them different.

    An interval over one item has no width and says nothing about the next: never apart.
    """
    separate = one.high < other.low or other.high < one.low
    return separate and min(one.n, other.n) > 1


def say(value: Any) -> str:
    """Write a setting: ``none``, ``yes``, four significant digits, or as it is."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> Facts:
    """Write a mapping as names and texts, nested names joined: ``link bandwidth (GB/s)``."""
    facts: Facts = []
    for key, value in values.items():
        name = f"{prefix}{label(key)}"
        if isinstance(value, Mapping):
            facts += flat(value, f"{name} ")
        elif isinstance(value, list | tuple):
            facts.append((name, ", ".join(say(item) for item in value)))
        else:
            facts.append((name, say(value)))
    return facts


def hardware(machine: Mapping[str, Any]) -> str:
    """Write a machine on one line, leaving out what it does not have."""
    parts = {k: item for k, item in machine.items() if k not in ("versions", "commit", "date")}
    said = [f"{name}: {text}" for name, text in flat(parts) if text not in ("none", "")]
    return "; ".join(said)
