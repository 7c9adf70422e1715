# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""Numbers as text, and the little arithmetic that a report does on estimates."""

import math
from collections.abc import Sequence

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


def label(key: str) -> str:
    """Write a name for people: ``decide_us`` becomes ``decide (µs)``."""
    for ending, unit in sorted(UNITS.items(), key=lambda item: -len(item[0])):
        if key.endswith(ending) and key != ending[1:] and not key.endswith("per_s"):
            return f"{key.removesuffix(ending).replace('_', ' ')} ({unit})"
    return key.replace("_", " ").replace(" per s", " / s")


def decimals(value: float, digits: int = 3) -> int:
    """Say how many decimals show *value* with *digits* significant digits; 0 to 5."""
    if value == 0 or not math.isfinite(value):
        return max(0, digits - 1)
    return min(5, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def plain(value: float, digits: int = 3) -> str:
    """Write *value* with *digits* significant digits, thousands apart, never an exponent."""
    return f"{value:,.{decimals(value, digits)}f}"


def percent(value: float) -> str:
    """Write a share between 0 and 1 as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


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
    ends = interval.replace(" to ", ", ").replace(DASH, ", ")
    return f"{mean} [{ends}]"


def signed(change: Estimate) -> str:
    """Write a relative change in percent, with signs: ``+1.8 % [+0.9, +2.6]``."""
    ends = (change.mean, change.low, change.high)
    mean, low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in ends)
    return f"{mean} % [{low}, {high}]"


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
    Divide two positive estimates; the range is the widest their intervals allow.

    Wider than a paired interval would be, never narrower. ``None`` where the divisor's interval
    reaches zero.
    """
    if bottom.low <= 0 or top.low < 0:
        return None
    low, high = top.low / bottom.high, top.high / bottom.low
    return Estimate(top.mean / bottom.mean, low, high, min(top.n, bottom.n))


def apart(one: Estimate, other: Estimate) -> bool:
    """
    Say whether the two intervals do not touch: only then does a sentence call them different.

    An interval over one item has no width and says nothing about the next: never apart.
    """
    separate = one.high < other.low or other.high < one.low
    return separate and min(one.n, other.n) > 1
