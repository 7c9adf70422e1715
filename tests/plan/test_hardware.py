"""Figures by name and by hand: read right, refused when no machine has them, each with a source."""

import re

import pytest

from melinoe.errors import HardwareError
from melinoe.plan.hardware import (
    cards,
    find_bandwidth,
    find_card,
    format_bandwidth,
    known,
    machine_of,
    parse_bandwidth,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("25GB/s", 25e9),
        ("25 GB / s", 25e9),
        ("25GBps", 25e9),
        (".5GB/s", 5e8),
        ("900 MB/s", 9e8),
        ("25GiB/s", 25 * 2**30),
        ("1.5TB/s", 1.5e12),
    ],
)
def test_a_bandwidth_is_read_as_it_is_written(text, bytes_per_s):
    """Decimal units are powers of ten, binary ones of two; blanks do not matter."""
    assert parse_bandwidth(text, "link") == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    ("text", "part", "words"),
    [
        ("0GB/s", "link", "above 0"),
        ("-25GB/s", "link", "not a bandwidth"),
        ("25", "link", "not a bandwidth"),
        ("25GB", "link", "not a bandwidth"),
        ("nanGB/s", "link", "figure like 25GB/s"),
        ("infGB/s", "link", "figure like 25GB/s"),
        ("200Gb/s", "link", "bits"),
        ("200Gbit/s", "link", "bits"),
        ("25B/s", "link", "check the unit"),
        ("25TB/s", "link", "check the unit"),
        ("999TB/s", "device memory", "check the unit"),
        ("7TB/s", "disk", "check the unit"),
        ("90TB/s", "DRAM", "check the unit"),
        ("pcie9x16", "link", "pcie4x16"),
        ("tape", "disk", "nvme4"),
    ],
)
def test_what_no_machine_has_is_refused_in_one_sentence(text, part, words):
    """Nothing, less than nothing, no unit, bits, too much; an unknown name tells the known."""
    with pytest.raises(HardwareError, match=words) as caught:
        find_bandwidth(text, part)
    assert "\n" not in str(caught.value)


def test_a_latency_is_read_and_a_slip_refused():
    """Ten microseconds are; twenty seconds are not, nor a bare number."""
    assert parse_seconds("10us") == pytest.approx(1e-5)
    assert parse_seconds("0.5 ms") == pytest.approx(5e-4)
    for text in ("20s", "10", "-1us"):
        with pytest.raises(HardwareError, match="10us"):
            parse_seconds(text)


@pytest.mark.parametrize(
    ("value", "text"), [(25.4e9, "25.4 GB/s"), (3.35e12, "3,350 GB/s"), (5.5e8, "550 MB/s")]
)
def test_a_bandwidth_is_written_with_three_figures(value, text):
    """In GB/s, and in MB/s below one."""
    assert format_bandwidth(value) == text


def test_every_figure_of_the_data_file_has_a_source_and_a_link_that_is_known():
    """No name twice, no figure above its ceiling, no card on a link that the file does not have."""
    links = {name for one in known()["links"] for name in one["names"]}
    for group in ("cards", "links", "dram", "disks"):
        names = [name for one in known()[group] for name in one["names"]]
        assert len(names) == len(set(names))
        for one in known()[group]:
            assert len(one["source"]) > 20, one["names"]
            if group == "cards":
                assert one["link"] in links
            else:
                assert 0 < one["gb_s"] <= one["spec_gb_s"]


def test_a_graphics_card_s_bandwidth_is_its_bus_times_its_rate():
    """Where the source names bus width and data rate, bits x Gb/s / 8 is the figure."""
    checked = 0
    for one in known()["cards"]:
        found = re.search(r"(\d+) bits at ([\d.]+) Gb/s", one["source"])
        if found:
            assert one["bandwidth_gb_s"] == pytest.approx(int(found[1]) * float(found[2]) / 8)
            checked += 1
    assert checked >= 10


def test_pcie_carries_its_lanes_rate_less_the_encoding():
    """GT/s x lanes x 128/130 / 8, from the generation and the lanes in the name."""
    rates = {3: 8, 4: 16, 5: 32}
    checked = 0
    for one in known()["links"]:
        if found := re.fullmatch(r"pcie(\d)x(\d+)", one["names"][0]):
            carried = rates[int(found[1])] * int(found[2]) * 128 / 130 / 8
            assert one["spec_gb_s"] == pytest.approx(carried, abs=0.01)
            checked += 1
    assert checked >= 7


def test_names_forgive_case_blanks_and_dashes():
    """RTX 4090, rtx-4090 and rtx4090 are one card."""
    assert {find_card(name).name for name in ("RTX 4090", "rtx-4090", "rtx4090")} == {"rtx4090"}
    with pytest.raises(HardwareError, match="h100"):
        find_card("voodoo2")


def test_what_is_given_beats_the_list():
    """The link is given, the device's memory the card's, the disk assumed; each says so."""
    machine = machine_of(gpu_memory_bytes=2**33, card="rtx4090", link="20GB/s")
    assert machine.link.bytes_per_s == 20e9 and machine.link.source == "given"
    assert machine.device.bytes_per_s == 1008e9 and "RTX 4090" in machine.device.source
    assert machine.disk.assumed and not machine.device.assumed


def test_without_a_card_the_smallest_that_has_the_memory_is_assumed_and_said():
    """8 GiB: the only known card of 8; its bandwidth and link come marked as assumed."""
    machine = machine_of(gpu_memory_bytes=8 * 2**30)
    assert machine.card is None
    assert machine.device.name == "rtx4060" and machine.device.assumed and machine.link.assumed
    assert "no card named" in machine.device.source
    sixteen = [one for one in cards() if one.memory_bytes == 16 * 2**30]
    slowest = min(one.bandwidth.bytes_per_s for one in sixteen)
    assert machine_of(gpu_memory_bytes=16 * 2**30).device.bytes_per_s == slowest
