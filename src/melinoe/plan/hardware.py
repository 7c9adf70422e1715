"""The machine's bandwidths: by name, in figures as people write them, each with its source."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

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

# Bytes a second below which a figure is taken for a slip of the unit, and above which no such part
# exists, nor is announced, with room to spare.
LOWEST = 10**6
HIGHEST = {"link": 2e12, "device memory": 1e14, "DRAM": 5e12, "disk": 2e11}


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


# --- the machine ---------------------------------------------------------------------------------

_GROUPS = {"link": "links", "DRAM": "dram", "disk": "disks"}


@dataclass(frozen=True)
class Bandwidth:
    """
    The rate at which one part of the machine moves bytes, and its source.

    Attributes:
        bytes_per_s: Above 0.
        source: A datasheet, "given", "measured here", or why it was assumed.
        name: Its name in the data file; None for a figure of one's own.
        assumed: Whether nobody named it: the plan chose it.
    """

    bytes_per_s: float
    source: str
    name: str | None = None
    assumed: bool = False

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
    """
    The parts that experts pass through.

    Attributes:
        device: Memory that the slots are in.
        link: From host memory to the device.
        dram: Host memory, which bounds misses computed on the CPU.
        disk: Where experts are that host memory cannot hold.
        card: The card that *device* belongs to, if one was named.
    """

    device: Bandwidth
    link: Bandwidth
    dram: Bandwidth
    disk: Bandwidth
    card: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@cache
def known() -> dict[str, Any]:
    """The data file ``hardware.json``: cards, links, dram, disks, each with its sources."""
    return json.loads(Path(__file__).with_name("hardware.json").read_text(encoding="utf-8"))


def cards() -> list[Card]:
    """Every card of the data file, in its order."""
    return [_card(entry) for entry in known()["cards"]]


def find_card(name: str) -> Card:
    """
    A card by one of its names; case, blanks and dashes do not matter.

    Raises:
        HardwareError: no such card; the names that are known.
    """
    for entry in known()["cards"]:
        if _plain(name) in map(_plain, entry["names"]):
            return _card(entry)
    names = ", ".join(entry["names"][0] for entry in known()["cards"])
    raise HardwareError(f"there is no card {name!r} in the list; use one of {names}, or give "
                        "--gpu-memory, --device-bandwidth and --link")  # fmt: skip


def find_bandwidth(text: str, part: str) -> Bandwidth:
    """
    A bandwidth by name (``pcie4x16``, ``ddr5-2ch``, ``nvme4``) or in figures (``25GB/s``).

    Args:
        text: The name or the figure.
        part: ``link``, ``DRAM``, ``disk`` or ``device memory``; the last has no names.

    Raises:
        HardwareError: neither a known name nor a possible figure.
    """
    entries = known()[_GROUPS[part]] if part in _GROUPS else []
    for entry in entries:
        if _plain(text) in map(_plain, entry["names"]):
            return Bandwidth(entry["gb_s"] * 1e9, entry["source"], entry["names"][0])
    try:
        return Bandwidth(parse_bandwidth(text, part), "given")
    except HardwareError as error:
        if entries and text.strip()[:1].isalpha():
            names = ", ".join(entry["names"][0] for entry in entries)
            raise HardwareError(
                f"there is no {part} {text!r} in the list; use one of {names}, or a figure "
                "like 25GB/s"
            ) from None
        raise error


def machine_of(
    *,
    gpu_memory_bytes: int,
    card: str | None = None,
    device: str | None = None,
    link: str | None = None,
    dram: str | None = None,
    disk: str | None = None,
    measured: Mapping[str, float] | None = None,
) -> Hardware:
    """
    Put the machine together: what is given first, then what was measured, then names, then guesses.

    Args:
        gpu_memory_bytes: Decides the card that is assumed where none is named: the
            smallest that has so much, the slowest of its size.
        card: A name of the data file.
        device: Bandwidth of the device's memory, in figures.
        link: A name or a figure; default: the link that the card sits on.
        dram: A name or a figure; default: two channels of DDR5.
        disk: A name or a figure; default: an SSD on PCIe 4.
        measured: Bytes a second by part, as `measuring.measure` returns them.

    Raises:
        HardwareError: an unknown name, or a figure that no machine has.
    """
    chosen = find_card(card) if card else _slowest_card(gpu_memory_bytes)
    guess = "" if card else f"no card named, so that of a {chosen.name}, the least with that memory"

    def part(name: str, given: str | None, default: Bandwidth) -> Bandwidth:
        if given is not None:
            return find_bandwidth(given, name)
        if measured and name in measured:
            value = check_bandwidth(measured[name], name)
            return Bandwidth(value, "measured on this machine, just now")
        return default

    def guessed(name: str, part_name: str, why: str) -> Bandwidth:
        found = find_bandwidth(name, part_name)
        source = f"{why}; {found.source}" if why else found.source
        return Bandwidth(found.bytes_per_s, source, found.name, assumed=bool(why))

    own = chosen.bandwidth
    if guess:
        own = Bandwidth(own.bytes_per_s, f"{guess}; {own.source}", own.name, assumed=True)
    return Hardware(
        device=part("device memory", device, own),
        link=part("link", link, guessed(chosen.link, "link", guess)),
        dram=part("DRAM", dram, guessed("ddr5-2ch", "DRAM", "not given")),
        disk=part("disk", disk, guessed("nvme4", "disk", "not given")),
        card=chosen.name if card else None,
    )


def _slowest_card(memory_bytes: int) -> Card:
    """The known card of the least bandwidth that has the memory; the largest if none has."""
    all_cards = cards()
    fitting = [one for one in all_cards if one.memory_bytes >= memory_bytes]
    if not fitting:
        return max(all_cards, key=lambda one: one.memory_bytes)
    smallest = min(one.memory_bytes for one in fitting)
    return min(
        (one for one in fitting if one.memory_bytes == smallest),
        key=lambda one: one.bandwidth.bytes_per_s,
    )


def _card(entry: Mapping[str, Any]) -> Card:
    speed = Bandwidth(entry["bandwidth_gb_s"] * 1e9, entry["source"], entry["names"][0])
    return Card(entry["names"][0], int(entry["memory_gib"] * 2**30), speed, entry["link"])


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
