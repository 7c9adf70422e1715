"""
From bytes and bandwidths to seconds a token: what each tier would take alone, and both ends.

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
class Step:
    """
    What one decoding step of *batch* sequences moves if every expert use hits; bytes.

    Attributes:
        loads: Distinct experts asked for over all layers: what would be loaded at hit rate 0.
        load_bytes: Of those, as the store keeps them.
        expert_bytes: Of those, as the slots hold them.
        other_bytes: Of the backbone and the keys and values.
    """

    loads: float
    load_bytes: float
    expert_bytes: float
    other_bytes: float


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

    @property
    def bottleneck(self) -> str:
        """The hardware tier that takes longest."""
        seconds = {"link": self.link, "device memory": self.device, "disk": self.disk}
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
        """As JSON can hold it."""
        return asdict(self)


def distinct_experts(layer: Layer, batch: int) -> float:
    """
    Experts that *batch* tokens ask of a layer together, chosen evenly and independently.

    ``E (1 - (1 - K/E)^batch)``: K for one token. Tokens that agree ask for fewer.
    """
    share = layer.top_k / layer.num_experts
    return layer.num_experts * (1 - (1 - share) ** batch)


def step_of(facts: ModelFacts, batch: int, stored_share: float) -> Step:
    """
    What a step moves.

    Args:
        facts: The model.
        batch: Sequences decoded together.
        stored_share: Bytes of an expert in the store, over its bytes in a slot.
    """
    asked = [distinct_experts(layer, batch) for layer in facts.layers]
    in_slots = sum(n * layer.block_bytes for n, layer in zip(asked, facts.layers, strict=True))
    return Step(
        loads=sum(asked),
        load_bytes=in_slots * stored_share,
        expert_bytes=in_slots,
        other_bytes=facts.read_bytes + batch * (facts.kv_bytes or 0),
    )


@dataclass(frozen=True)
class HostTime:
    """Seconds of a host in the loop: of each decoder layer in a step, and of each load."""

    layer: float = 0.0
    load: float = 0.0


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


def tiers(
    step: Step,
    hit_rate: float,
    hardware: Hardware,
    *,
    from_disk: float,
    latency_s: float,
    decoder_layers: int,
    host: HostTime,
) -> Tiers:
    """
    Seconds of one step on each tier.

    Args:
        step: What it moves.
        hit_rate: Share of expert uses that load nothing.
        hardware: The bandwidths.
        from_disk: Share of loads that the disk serves.
        latency_s: Of each load on the link.
        decoder_layers: How often the host prepares a layer.
        host: What that and each load cost it.
    """
    missed = 1 - hit_rate
    return Tiers(
        link=hardware.link.seconds(missed * step.load_bytes) + missed * step.loads * latency_s,
        device=hardware.device.seconds(step.other_bytes + step.expert_bytes),
        disk=hardware.disk.seconds(from_disk * missed * step.load_bytes),
        dram_if_computed=hardware.dram.seconds(missed * step.load_bytes),
        host=decoder_layers * host.layer + missed * step.loads * host.load,
    )


def speed(
    step: Step,
    rates: HitRates,
    hardware: Hardware,
    batch: int,
    *,
    from_disk: Sequence[float],
    latency_s: float = 0.0,
    decoder_layers: int = 0,
    host: HostTime | None = None,
) -> Speed:
    """
    Both ends of the speed.

    Args:
        step: What a decoding step moves.
        rates: Both ends of the hit rate.
        hardware: The bandwidths.
        batch: Sequences decoded together.
        from_disk: Share of loads that the disk serves, at the slow end and at the fast one.
        latency_s: Of each load.
        decoder_layers: How often the host prepares a layer in a step.
        host: What that and each load cost it, at the slow end.
    """
    low, high = (
        tiers(
            step,
            rate,
            hardware,
            from_disk=share,
            latency_s=latency_s,
            decoder_layers=decoder_layers,
            host=host or HostTime(),
        )
        for rate, share in zip((rates.low, rates.high), from_disk, strict=True)
    )
    slow = {"link": low.link, "device memory": low.device, "disk": low.disk, "host": low.host}
    computed = max(high.dram_if_computed, high.device, high.disk)
    return Speed(
        low=batch / low.slowest,
        high=batch / high.fastest,
        bottleneck=high.bottleneck,
        slow_bottleneck=max(slow, key=lambda name: slow[name]),
        tiers_low=low,
        tiers_high=high,
        computed_high=batch / computed,
    )
