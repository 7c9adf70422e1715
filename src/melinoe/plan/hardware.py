"""What a plan knows of the machine: each figure with where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from melinoe.errors import HardwareError
from melinoe.plan.units import check_bandwidth, format_bandwidth, parse_bandwidth

_GROUPS = {"link": "links", "DRAM": "dram", "disk": "disks"}


@dataclass(frozen=True)
class Bandwidth:
    """
    How fast one part of the machine moves bytes, and who says so.

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
        """How long *nbytes* take."""
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
        """As JSON can hold it."""
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
