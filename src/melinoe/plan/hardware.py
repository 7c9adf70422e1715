"""The machine's bandwidths: by name, in figures as people write them, each with its source."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from melinoe.errors import HardwareError

_UNITS = {f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))}
_UNITS |= {"kB": 1000} | {
    f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)
}
_FIGURE = r"\s*(\d+(?:\.\d+)?|\.\d+)\s*"
_BANDWIDTH = re.compile(_FIGURE + r"([a-zA-Z]+)\s*(?:/\s*s|ps)\s*")
_TIME = re.compile(_FIGURE + r"([a-zµ]+)\s*")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
# Bytes a second below which a figure is taken for a slip of the unit, and above which no such part
# exists, nor is announced, with room to spare.
_LOWEST = 10**6
_HIGHEST = {"link": 2e12, "device memory": 1e14, "DRAM": 5e12, "disk": 2e11}
_GROUPS = {"link": "links", "DRAM": "dram", "disk": "disks"}  # of the data file


def parse_bandwidth(text: str, part: str) -> float:
    """
    Read the bytes a second of a *part*: ``"25GB/s"``, ``"900 MB/s"``, ``"25GiB/s"``, ``"25GBps"``.

    HardwareError: none, one in bits, as links are also sold, or one that no such part has.
    """
    match = _BANDWIDTH.fullmatch(text)
    if match is not None and match[2] not in _UNITS and match[2].endswith(("b", "bit", "bits")):
        raise HardwareError(
            f"{text!r} counts bits; write the {part}'s bandwidth in bytes, like 25GB/s"
        )
    if match is None or match[2] not in _UNITS:
        raise HardwareError(f"{text!r} is not a bandwidth; write it like 25GB/s or 3.35TB/s")
    bytes_per_s = float(match[1]) * _UNITS[match[2]]
    if not bytes_per_s > 0:
        raise HardwareError(f"a {part} of {text} moves nothing; give a bandwidth above 0")
    if bytes_per_s < _LOWEST:
        raise HardwareError(
            f"a {part} of {text} is slower than any in use; check the unit, as in 25GB/s"
        )
    if not bytes_per_s <= _HIGHEST[part]:
        raise HardwareError(
            f"no {part} moves {text}; check the unit, the most that is believed is "
            f"{format_bandwidth(_HIGHEST[part])}"
        )
    return bytes_per_s


def parse_seconds(text: str) -> float:
    """Read a latency of at most a second: ``"10us"``, ``"0.5 ms"``; ``"0s"`` is none."""
    match = _TIME.fullmatch(text)
    if match is None or match[2] not in _SECONDS:
        raise HardwareError(f"{text!r} is not a latency; write it like 10us or 0.5ms")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > 1:
        raise HardwareError(f"no transfer waits {text} to begin; check the unit, as in 10us")
    return seconds


def format_bandwidth(bytes_per_s: float) -> str:
    """Write bytes a second in GB/s, or in MB/s below one, with three significant figures."""
    if not math.isfinite(bytes_per_s):
        return f"{bytes_per_s} B/s"
    value, unit = (bytes_per_s / 1e9, "GB/s") if bytes_per_s >= 1e9 else (bytes_per_s / 1e6, "MB/s")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


@dataclass(frozen=True)
class Bandwidth:
    """The rate at which one part of the machine moves bytes."""

    bytes_per_s: float  # above 0
    source: str  # A datasheet, "given", "measured here", or why it was assumed
    name: str | None = None  # its name in the data file; None for a figure of one's own
    assumed: bool = False  # whether nobody named it: the plan chose it

    def seconds(self, nbytes: float) -> float:
        """Seconds in which *nbytes* move."""
        return nbytes / self.bytes_per_s

    def __str__(self) -> str:
        figure = format_bandwidth(self.bytes_per_s)
        return figure if self.name is None else f"{figure} ({self.name})"


@dataclass(frozen=True)
class Card:
    """One graphics card of the data file: memory in bytes, its bandwidth, the link it sits on."""

    name: str
    memory_bytes: int
    bandwidth: Bandwidth
    link: str


@dataclass(frozen=True)
class Hardware:
    """The parts that experts pass through."""

    device: Bandwidth  # memory that the slots are in
    link: Bandwidth  # from host memory to the device
    disk: Bandwidth  # where experts are that host memory cannot hold
    card: str | None = None  # the card that *device* belongs to, if one was named


@cache
def known() -> dict[str, Any]:
    """Read the data file ``hardware.json``: cards, links, dram, disks, each with its sources."""
    return json.loads(Path(__file__).with_name("hardware.json").read_text(encoding="utf-8"))


def cards() -> list[Card]:
    """List every card of the data file, in its order."""
    return [_card(entry) for entry in known()["cards"]]


def find_card(name: str) -> Card:
    """Find a card by one of its names; case, blanks and dashes do not matter."""
    if (entry := _named(name, known()["cards"])) is None:
        raise HardwareError(
            f"there is no card {name!r} in the list; use one of "
            f"{', '.join(one.name for one in cards())}, or give "
            "--gpu-memory, --device-bandwidth and --link"
        )
    return _card(entry)


def find_bandwidth(text: str, part: str) -> Bandwidth:
    """
    Find a bandwidth by name (``pcie4x16``, ``ddr5-2ch``, ``nvme4``) or in figures (``25GB/s``).

    *part* is ``link``, ``DRAM``, ``disk`` or ``device memory``; the last has no names.
    """
    entries = known()[_GROUPS[part]] if part in _GROUPS else []
    if (entry := _named(text, entries)) is not None:
        return Bandwidth(entry["gb_s"] * 1e9, entry["source"], entry["names"][0])
    if entries and text.strip()[:1].isalpha():
        names = ", ".join(entry["names"][0] for entry in entries)
        raise HardwareError(
            f"there is no {part} {text!r} in the list; use one of {names}, or a figure like 25GB/s"
        )
    return Bandwidth(parse_bandwidth(text, part), "given")


def machine_of(
    gpu_memory_bytes: int,
    *,
    card: str | None = None,
    device: str | None = None,
    link: str | None = None,
    disk: str | None = None,
) -> Hardware:
    """
    Put the machine together: what is given first, then names, then guesses.

    Where no card is named, the smallest that has *gpu_memory_bytes* is assumed, the slowest of its
    size; without more words the link that the card sits on, an SSD on PCIe 4.
    """
    chosen = find_card(card) if card else _slowest_card(gpu_memory_bytes)
    guess = "" if card else f"no card named, so that of a {chosen.name}, the least with that memory"

    def part(name: str, given: str | None, default: Bandwidth, why: str) -> Bandwidth:
        if given is not None:
            return find_bandwidth(given, name)
        if not why:
            return default
        return replace(default, source=f"{why}; {default.source}", assumed=True)

    return Hardware(
        device=part("device memory", device, chosen.bandwidth, guess),
        link=part("link", link, find_bandwidth(chosen.link, "link"), guess),
        disk=part("disk", disk, find_bandwidth("nvme4", "disk"), "not given"),
        card=chosen.name if card else None,
    )


def _slowest_card(memory_bytes: int) -> Card:
    """Find the smallest card that has the memory, the slowest of its size; else the largest."""
    fitting = [one for one in cards() if one.memory_bytes >= memory_bytes]
    if not fitting:
        return max(cards(), key=lambda one: one.memory_bytes)
    return min(fitting, key=lambda one: (one.memory_bytes, one.bandwidth.bytes_per_s))


def _card(entry: Mapping[str, Any]) -> Card:
    speed = Bandwidth(entry["bandwidth_gb_s"] * 1e9, entry["source"], entry["names"][0])
    return Card(entry["names"][0], int(entry["memory_gib"] * 2**30), speed, entry["link"])


def _named(text: str, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    def plain(name: str) -> str:
        return "".join(letter for letter in name.lower() if letter.isalnum())

    return next((one for one in entries if plain(text) in map(plain, one["names"])), None)
