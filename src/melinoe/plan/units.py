"""Read bandwidths, times and counts as people write them, and refuse what no machine has."""

from __future__ import annotations

import math
import re

from melinoe.errors import HardwareError

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_BANDWIDTH = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]+)\s*(?:/\s*s|ps)\s*")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zµ]+)\s*")

LOWEST = 10**6
"""Bytes a second below which a figure is taken for a slip of the unit."""

HIGHEST = {"link": 2e12, "device memory": 1e14, "DRAM": 5e12, "disk": 2e11}
"""Bytes a second above which no such part exists, nor is announced, with room to spare."""


def parse_bandwidth(text: str, part: str) -> float:
    """
    Read a bandwidth: ``"25GB/s"``, ``"900 MB/s"``, ``"3.35TB/s"``, ``"25GiB/s"``, ``"25GBps"``.

    Args:
        text: What was written; a capital B, for bytes: links are also sold in bits.
        part: One of `HIGHEST`, for its bounds and for messages.

    Returns:
        Bytes a second.

    Raises:
        HardwareError: no bandwidth, one in bits, or one that no such part has.
    """
    match = _BANDWIDTH.fullmatch(text)
    if match is not None and match[2] not in _UNITS and match[2].endswith(("b", "bit", "bits")):
        raise HardwareError(
            f"{text!r} counts bits; write the {part}'s bandwidth in bytes, like 25GB/s"
        )
    if match is None or match[2] not in _UNITS:
        raise HardwareError(f"{text!r} is not a bandwidth; write it like 25GB/s or 3.35TB/s")
    return check_bandwidth(float(match[1]) * _UNITS[match[2]], part, text)


def check_bandwidth(bytes_per_s: float, part: str, text: str | None = None) -> float:
    """
    Let a bandwidth pass that some machine could have.

    Raises:
        HardwareError: below `LOWEST`, above `HIGHEST` of that part, or not a number.
    """
    said = text or format_bandwidth(bytes_per_s)
    if not bytes_per_s > 0:
        raise HardwareError(f"a {part} of {said} moves nothing; give a bandwidth above 0")
    if bytes_per_s < LOWEST:
        raise HardwareError(
            f"a {part} of {said} is slower than any in use; check the unit, as in 25GB/s"
        )
    if not bytes_per_s <= HIGHEST[part]:
        raise HardwareError(
            f"no {part} moves {said}; check the unit, the most that is believed is "
            f"{format_bandwidth(HIGHEST[part])}"
        )
    return bytes_per_s


def parse_seconds(text: str) -> float:
    """
    Read a latency: ``"10us"``, ``"0.5 ms"``; ``"0s"`` is none.

    Raises:
        HardwareError: no time, or more than a second.
    """
    match = _TIME.fullmatch(text)
    if match is None or match[2] not in _SECONDS:
        raise HardwareError(f"{text!r} is not a latency; write it like 10us or 0.5ms")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > 1:
        raise HardwareError(f"no transfer waits {text} to begin; check the unit, as in 10us")
    return seconds


def format_bandwidth(bytes_per_s: float) -> str:
    """Bytes a second in GB/s, or in MB/s below one, with three significant figures."""
    if not math.isfinite(bytes_per_s):
        return f"{bytes_per_s} B/s"
    if bytes_per_s >= 1e9:
        return f"{_three(bytes_per_s / 1e9)} GB/s"
    return f"{_three(bytes_per_s / 1e6)} MB/s"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
