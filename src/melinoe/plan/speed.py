"""
Seconds a token from bytes and bandwidths: of each tier alone, and both ends.

    link    q M' / link bandwidth + loads x latency        M': the experts as they are stored
    device  (backbone read + M + KV) / device bandwidth
    disk    the part of q M' that host memory does not hold / disk bandwidth
    dram    q M' / DRAM bandwidth, if misses are computed on the CPU instead of loaded
    host    a constant a decoder layer, and one a load: deciding, launching, waiting

The fast end takes the slowest tier alone: everything overlaps and the host costs nothing. No
engine can be faster at that hit rate. The slow end adds all of them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from melinoe.plan.facts import Layer, ModelFacts
from melinoe.plan.hardware import Hardware
from melinoe.plan.hit_rates import HitRates, assumptions


@dataclass(frozen=True)
class Tiers:
    """Seconds that one decoding step would take on each tier alone; 0 where it is not passed."""

    link: float
    device: float
    disk: float
    dram_if_computed: float
    host: float

    @property
    def fastest(self) -> float:
        """Everything overlaps, the host costs nothing."""
        return max(self.link, self.device, self.disk)

    @property
    def slowest(self) -> float:
        """One thing after the other, on a host in the loop."""
        return self.link + self.device + self.disk + self.host

    def longest(self, *, with_host: bool = False) -> str:
        """Name the hardware tier that takes longest, or the host if that takes longer."""
        seconds = {"link": self.link, "device memory": self.device, "disk": self.disk}
        if with_host:
            seconds["host"] = self.host
        return max(seconds, key=lambda name: seconds[name])


@dataclass(frozen=True)
class Speed:
    """
    Tokens a second between two ends.

    Attributes:
        low: All sequences of the batch together: low hit rate, nothing overlapped, host time paid.
        high: High hit rate, everything overlapped, no host time.
        bottleneck: The tier that bounds the fast end.
        slow_bottleneck: The tier that takes most of the slow end, the host included.
        tiers_low: At the low hit rate.
        tiers_high: At the high one.
        computed_high: The fast end if misses are computed on the CPU instead of loaded.
    """

    low: float
    high: float
    bottleneck: str
    slow_bottleneck: str
    tiers_low: Tiers
    tiers_high: Tiers
    computed_high: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def speed(
    facts: ModelFacts,
    rates: HitRates,
    hardware: Hardware,
    batch: int,
    *,
    stored_share: float,
    from_disk: Sequence[float],
    latency_s: float = 0.0,
) -> Speed:
    """
    Find both ends of the speed.

    Args:
        facts: The model.
        rates: Both ends of the hit rate.
        hardware: The bandwidths.
        batch: Sequences decoded together.
        stored_share: Bytes of an expert in the store, over its bytes in a slot.
        from_disk: Share of loads that the disk serves, at the slow end and at the fast one.
        latency_s: Of each load on the link.
    """
    asked = [distinct_experts(layer, batch) for layer in facts.layers]
    expert_bytes = sum(n * layer.block_bytes for n, layer in zip(asked, facts.layers, strict=True))
    other_bytes = facts.read_bytes + batch * (facts.kv_bytes or 0)
    host = paper_host_time()

    def tiers(hit_rate: float, from_disk: float) -> Tiers:
        loads = (1 - hit_rate) * sum(asked)
        load_bytes = (1 - hit_rate) * expert_bytes * stored_share
        return Tiers(
            link=hardware.link.seconds(load_bytes) + loads * latency_s,
            device=hardware.device.seconds(other_bytes + expert_bytes),
            disk=hardware.disk.seconds(from_disk * load_bytes),
            dram_if_computed=hardware.dram.seconds(load_bytes),
            host=facts.decoder_layers * host.layer + loads * host.load,
        )

    low, high = (tiers(*each) for each in zip((rates.low, rates.high), from_disk, strict=True))
    return Speed(
        low=batch / low.slowest,
        high=batch / high.fastest,
        bottleneck=high.longest(),
        slow_bottleneck=low.longest(with_host=True),
        tiers_low=low,
        tiers_high=high,
        computed_high=batch / max(high.dram_if_computed, high.device, high.disk),
    )


def distinct_experts(layer: Layer, batch: int) -> float:
    """
    Count the experts that *batch* tokens ask of a layer, if they choose evenly and independently.

    ``E (1 - (1 - K/E)^batch)``: K for one token. Tokens that agree ask for fewer.
    """
    share = layer.top_k / layer.num_experts
    return layer.num_experts * (1 - (1 - share) ** batch)


@dataclass(frozen=True)
class HostTime:
    """Seconds of a host in the loop: of each decoder layer in a step, and of each load."""

    layer: float
    load: float


def paper_host_time() -> HostTime:
    """
    Host time of the paper's own stack, from its two speeds and its transfers.

    All of the time with every expert resident is the layers'; what a token takes longer with 16
    slots is its loads'. Both leave the copies' and the arithmetic's own time in, which the slow end
    adds once more: of a load's time about a sixth, at 4 bits over 50 GB/s.
    """
    known = assumptions()["host_time"]
    resident_s, offloaded_s = (
        1 / known[key] for key in ("resident_tokens_per_s", "offloaded_tokens_per_s")
    )
    loads = known["transfers_per_layer"] * known["layers"] / known["tokens"]
    return HostTime(
        layer=resident_s / known["layers"],
        load=(offloaded_s - resident_s) / (loads / known["counts_per_load"]),
    )
