"""
Forecast what fits and how fast it runs, from a model's sizes and a machine's figures.

Nothing is measured, so a plan gives two ends of everything and says what each rests on.

Hit rates: without a trace, chance at both ends, ``slots / experts``; real routers do better. After
fine-tuning, misses fewer by what the paper's transfer counts fell, the least and the most of its
four pairs. With a trace: the worse and the better of LRU and LFU, simulated at these slots.

Seconds a step, on each tier alone:

    link    q M' / link bandwidth + loads x latency        M': the experts as they are stored
    device  (backbone read + M + KV) / device bandwidth
    disk    the part of q M' that host memory does not hold / disk bandwidth
    host    a constant a decoder layer, and one a load: deciding, launching, waiting

The fast end takes the slowest tier alone: everything overlaps and the host costs nothing. No
engine can be faster at that hit rate. The slow end adds all of them up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace
from melinoe.engine.budget import memory_of, slots_for
from melinoe.errors import BudgetError, HardwareError, TraceError
from melinoe.host_memory import format_bytes, parse_bytes
from melinoe.plan.facts import Layer, ModelFacts, model_facts
from melinoe.plan.hardware import Hardware, find_card, machine_of

_MOST_MEMORY = 2**44  # 16 TiB: more is a slip of the unit
_FIGURES = (
    "gpu_memory_bytes", "reserve_bytes", "ram_bytes", "batch", "bits", "slots", "slot_bytes",
    "stored_bytes", "fits_in_ram", "all_resident",
)  # fmt: skip


@cache
def assumptions() -> dict[str, Any]:
    """Read the data file ``assumptions.json``: each with its source."""
    return json.loads(Path(__file__).with_name("assumptions.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class HitRates:
    """A range of hit rates, in [0, 1], and what its ends rest on."""

    low: float
    high: float
    source: str  # what both rest on, for people
    by_policy: dict[str, float] = field(default_factory=dict)  # simulated, if a trace was given


@dataclass(frozen=True)
class Tiers:
    """Seconds that one decoding step would take on each tier alone; 0 where it is not passed."""

    link: float
    device: float
    disk: float
    host: float


@dataclass(frozen=True)
class Speed:
    """Tokens a second of all sequences together, between two ends."""

    low: float  # low hit rate, nothing overlapped, host time paid
    high: float  # high hit rate, everything overlapped, no host time
    bottleneck: str  # the tier that bounds the fast end
    slow_bottleneck: str  # the tier that takes most of the slow end, the host included
    tiers_low: Tiers  # at the low hit rate
    tiers_high: Tiers  # at the high one


@dataclass(frozen=True)
class Plan:
    """Forecast of one model on one machine; nothing of it is measured."""

    facts: ModelFacts  # the model
    hardware: Hardware  # the machine
    gpu_memory_bytes: int  # of the device
    reserve_bytes: int  # of that, kept for everything that is neither weights nor cache
    ram_bytes: int | None  # of the host; None if not given
    batch: int  # sequences decoded together
    bits: int | None  # of a stored weight; None for the model's own type
    slots: int  # experts of each layer that fit
    slot_bytes: int  # bytes of those
    stored_bytes: int  # all experts, as the store keeps them
    fits_in_ram: bool | None  # whether the host's memory holds those; None if it was not given
    before: HitRates  # hit rates as the model is, and `speed_before` with them
    after: HitRates  # hit rates fine-tuned for locality, and `speed_after`
    speed_before: Speed
    speed_after: Speed
    notes: tuple[str, ...]  # sentences that a reader must not miss
    assumed: tuple[str, ...]  # sentences about figures that nobody gave

    @property
    def all_resident(self) -> bool:
        """Whether every expert has a slot."""
        return self.slots >= self.facts.num_experts

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

        found: dict[str, Any] = {"model": self.facts.to_dict(), "hardware": asdict(self.hardware)}
        found |= {name: getattr(self, name) for name in _FIGURES}
        for name in ("before", "after"):
            rates, speed = asdict(getattr(self, name)), asdict(getattr(self, f"speed_{name}"))
            found[name] = {"hit_rate": rates, "tokens_per_s": speed}
        notes = {"notes": list(self.notes), "assumed": list(self.assumed)}
        return found | notes | {"measured": False}


def plan(
    model: str | ModelFacts,
    *,
    gpu_memory: str | int | None = None,
    card: str | None = None,
    ram: str | int | None = None,
    link: str | None = None,
    device_bandwidth: str | None = None,
    disk: str | None = None,
    reserve: str | int | None = None,
    context: int = 4096,
    batch: int = 1,
    bits: int | None = None,
    latency_s: float = 0.0,
    trace: Trace | None = None,
    tuned_trace: Trace | None = None,
) -> Plan:
    """
    Plan one model on one machine, from the model's config alone.

    Args:
        model: A directory, a ``config.json``, a hub name, or facts that were read already; then
            *context*, tokens of a sequence, is theirs.
        gpu_memory: Of the device, as ``"8GiB"``; default: all of the card's.
        card, link, disk: Names of the data file; the last two also as figures.
        ram: Of the host; without it the experts are taken to fit.
        reserve: Device memory kept free; default as in ``assumptions.json``.
        batch: Sequences decoded together.
        bits: 16, 8 or 4 of an expert's weight, in store, link and slots; absent: as stored.
        trace, tuned_trace: Choices of the model and of the fine-tuned one, for their hit rates.

    Raises:
        CheckpointError, UnsupportedModelError: as `model_facts`.
        HardwareError: a figure that no machine has, or an unknown name.
        BudgetError: the memory does not hold the backbone, the cache and one expert a layer.
        TraceError: a trace of another model.
    """
    if context < 1 or batch < 1:
        raise BudgetError(f"context {context} and batch {batch} must both be 1 or more")
    if bits not in (None, 16, 8, 4):
        raise BudgetError(f"experts cannot be stored at {bits} bits; choose 16, 8 or 4")
    memory = gpu_memory_of(gpu_memory, card)
    hardware = machine_of(memory, card=card, device=device_bandwidth, link=link, disk=disk)
    if isinstance(model, ModelFacts):
        facts = model
        if bits and facts.packed:  # its blocks are packed already
            raise BudgetError(
                f"these facts of {facts.name} are of packed experts; name the model to plan it at "
                f"{bits} bits"
            )
    else:
        import torch

        wanted = torch.bfloat16 if bits else None
        facts = model_facts(model, context, wanted, packed=bits is None)
    facts = _stored_at(facts, bits)
    kept = _reserve(memory, reserve)
    slots = _slots(facts, memory, kept, batch)
    stored = facts.expert_bytes
    ram_bytes = None if ram is None else _memory(ram)
    usable = None if ram_bytes is None else ram_bytes * assumptions()["ram_share"]["value"]
    fits = None if usable is None else stored <= usable
    before, after = _hit_rates(facts, slots, trace, tuned_trace)
    # Slow end: what RAM cannot hold is what misses ask for. Fast end: misses ask for all alike.
    from_disk = (0.0, 0.0) if fits is not False else (1.0, 1 - (usable or 0) / stored)
    speed_before, speed_after = (
        _speed(facts, one, hardware, batch, from_disk, latency_s) for one in (before, after)
    )
    slot_bytes = memory_of(slots, facts.layers)  # type: ignore[arg-type]
    notes = tuple(_notes(facts, slots, batch, bits))
    assumed = tuple(_assumed(hardware, ram_bytes, bits, reserve is not None, fits is False))
    return Plan(
        facts, hardware, memory, kept, ram_bytes, batch, bits, slots, slot_bytes, stored, fits,
        before, after, speed_before, speed_after, notes, assumed,
    )  # fmt: skip


def _memory(text: str | int) -> int:
    amount = parse_bytes(text)
    if amount > _MOST_MEMORY:
        raise HardwareError(f"no machine has {text} of memory; check the unit, as in 8GiB")
    return amount


def gpu_memory_of(given: str | int | None, card: str | None) -> int:
    """Give the device's memory: as given, or the card's; never more than the card has."""
    known = find_card(card) if card else None
    if given is None:
        if known is None:
            raise BudgetError("a plan needs the device's memory; give --gpu-memory or --card")
        return known.memory_bytes
    amount = _memory(given)
    if known is not None and amount > known.memory_bytes:
        raise HardwareError(
            f"a {known.name} has {format_bytes(known.memory_bytes)} of memory, not {given}; "
            "give less, or another card"
        )
    return amount


def _reserve(memory: int, given: str | int | None) -> int:
    if given is not None:
        nothing = str(given).strip().rstrip("kKMGTiB ") == "0"
        return 0 if nothing else parse_bytes(given)
    known = assumptions()["reserve"]
    return min(int(memory * known["share"]), known["most_bytes"])


def _slots(facts: ModelFacts, memory: int, reserve: int, batch: int) -> int:
    """Count the slots of each layer that fit beside everything else."""
    kv = batch * (facts.kv_bytes or 0)
    left = memory - reserve - facts.backbone_bytes - kv
    one_each = memory_of(1, facts.layers)  # type: ignore[arg-type]
    if left < one_each:
        needed = reserve + facts.backbone_bytes + kv + one_each
        raise BudgetError(
            f"{format_bytes(memory)} does not hold the backbone "
            f"({format_bytes(facts.backbone_bytes)}), the keys and values of {batch} x "
            f"{facts.context} tokens ({format_bytes(kv)}), {format_bytes(reserve)} kept free and "
            f"one expert in each layer ({format_bytes(one_each)}); give {format_bytes(needed)}, "
            "or a shorter --context"
        )
    return slots_for(left, facts.layers)  # type: ignore[arg-type]


def _stored_at(facts: ModelFacts, bits: int | None) -> ModelFacts:
    """Give *facts* with each expert's block at *bits* of a weight; None: as it is."""
    if bits is None:
        return facts
    import torch

    known = assumptions()["stored_bits"].get(str(bits), {"per_weight": bits})
    share = known["per_weight"] / (8 * getattr(torch, facts.dtype).itemsize)
    layers = (replace(one, block_bytes=round(one.block_bytes * share)) for one in facts.layers)
    return replace(facts, layers=tuple(layers))


def _hit_rates(
    facts: ModelFacts, slots: int, trace: Trace | None, tuned_trace: Trace | None
) -> tuple[HitRates, HitRates]:
    """Before and after fine-tuning."""
    for one in (trace, tuned_trace):
        if one is not None:
            check_shape(one, facts)
    if slots >= facts.num_experts:
        everything = HitRates(1.0, 1.0, "every expert has a slot, so after its first use it stays")
        return everything, everything
    before = by_chance(facts.layers, slots)
    if trace is not None:
        before = _from_trace(trace, slots, "the trace")
    if tuned_trace is not None:
        return before, _from_trace(tuned_trace, slots, "the fine-tuned model's trace")
    return before, after_fine_tuning(before)


def by_chance(layers: Sequence[Layer], slots: int) -> HitRates:
    """Give the hit rate of choices without locality: slots over experts, weighted by uses."""
    uses = sum(layer.top_k for layer in layers)
    rate = sum(layer.top_k * min(slots / layer.num_experts, 1) for layer in layers) / uses
    return HitRates(
        rate,
        rate,
        "assumed: no locality at all, so as many hits as slots per expert; most routers hit more, "
        "and a trace tells how much",
    )


def after_fine_tuning(before: HitRates) -> HitRates:
    """Divide the misses by the paper's falls in transfers, the least and the most."""
    known = assumptions()
    falls = sorted(one["base"] / one["fine_tuned"] for one in known["transfer_ratios"])
    return HitRates(
        1 - (1 - before.low) / falls[0],
        1 - (1 - before.high) / falls[-1],
        f"assumed: misses {falls[0]:.2f} to {falls[-1]:.2f} times fewer than before, as the "
        f"transfers of {known['transfer_ratios_source']}; not measured on this model",
    )


def _from_trace(trace: Trace, slots: int, name: str) -> HitRates:
    """Simulate a trace at *slots*: LRU and LFU make the range, Belady the bound."""
    rates = {}
    for policy in ("lru", "lfu", "belady"):
        done = simulate(trace, min(slots, trace.num_experts), policy, reset_between_sequences=True)
        rate = done.counters.hit_rate("completion")
        if rate is None:
            raise TraceError(f"{name} has no completion to count; trace at least two new tokens")
        rates[policy] = rate
    low, high = sorted(("lru", "lfu"), key=lambda policy: rates[policy])
    return HitRates(
        rates[low],
        rates[high],
        f"simulated from {name}: {trace.num_sequences} sequences, cold cache before each, "
        f"{low.upper()} to {high.upper()}; its shape is this model's, its weights were not "
        "compared",
        rates,
    )


def check_shape(trace: Trace, facts: ModelFacts) -> None:
    """Refuse, with a TraceError, a trace of another number of layers, experts or choices."""
    mine = (trace.num_layers, trace.num_experts, trace.top_k)
    theirs = (len(facts.layers), facts.num_experts, facts.top_k)
    if mine != theirs:
        raise TraceError(
            "the trace is of another model: it has {} layers of {} experts, top-{}, and {} has "
            "{} layers of {}, top-{}; give a trace of this model".format(*mine, facts.name, *theirs)
        )


def _speed(
    facts: ModelFacts,
    rates: HitRates,
    hardware: Hardware,
    batch: int,
    from_disk: tuple[float, float],
    latency_s: float,
) -> Speed:
    """Find both ends of the speed; *from_disk*: of each, the share of loads that come from it."""
    asked = [distinct_experts(layer, batch) for layer in facts.layers]
    expert_bytes = sum(n * layer.block_bytes for n, layer in zip(asked, facts.layers, strict=True))
    other_bytes = facts.read_bytes + batch * (facts.kv_bytes or 0)
    per_layer, per_load = host_time()

    def tiers(hit_rate: float, from_disk: float) -> Tiers:
        loads = (1 - hit_rate) * sum(asked)
        load_bytes = (1 - hit_rate) * expert_bytes
        return Tiers(
            link=hardware.link.seconds(load_bytes) + loads * latency_s,
            device=hardware.device.seconds(other_bytes + expert_bytes),
            disk=hardware.disk.seconds(from_disk * load_bytes),
            host=facts.decoder_layers * per_layer + loads * per_load,
        )

    def longest(one: Tiers, host: bool) -> str:
        seconds = {"link": one.link, "device memory": one.device, "disk": one.disk}
        seconds |= {"host": one.host} if host else {}
        return max(seconds, key=lambda name: seconds[name])

    low, high = (tiers(*each) for each in zip((rates.low, rates.high), from_disk, strict=True))
    return Speed(
        low=batch / (low.link + low.device + low.disk + low.host),
        high=batch / max(high.link, high.device, high.disk),
        bottleneck=longest(high, False),
        slow_bottleneck=longest(low, True),
        tiers_low=low,
        tiers_high=high,
    )


def distinct_experts(layer: Layer, batch: int) -> float:
    """Count the experts that *batch* tokens ask for, if they choose evenly and independently."""
    share = layer.top_k / layer.num_experts
    return layer.num_experts * (1 - (1 - share) ** batch)


def host_time() -> tuple[float, float]:
    """
    Seconds of a host in the loop, of a decoder layer and of a load, from the paper's own stack.

    All of the time with every expert resident is the layers'; what a token takes longer with 16
    slots is its loads'. Both leave the copies' and the arithmetic's own time in, which the slow end
    adds once more: of a load's time about a sixth, at 4 bits over 50 GB/s.
    """
    known = assumptions()["host_time"]
    resident_s, offloaded_s = (
        1 / known[key] for key in ("resident_tokens_per_s", "offloaded_tokens_per_s")
    )
    counted = known["transfers_per_layer"] * known["layers"] / known["tokens"]
    loads = counted / known["counts_per_load"]
    return resident_s / known["layers"], (offloaded_s - resident_s) / loads


def _notes(facts: ModelFacts, slots: int, batch: int, bits: int | None) -> list[str]:
    """Write the sentences that a reader of the plan must not miss."""
    notes = {
        f"Experts stay packed as they are stored ({facts.packed}); all else is decoded to "
        f"{facts.dtype} when it is loaded.": facts.packed is not None,
        f"Keys and values: {facts.kv_source}; they are counted nowhere, so keep memory for "
        "them.": facts.kv_bytes is None,
        f"The config was made for {facts.max_context} tokens, not for {facts.context}.": (
            facts.max_context is not None and facts.context > facts.max_context
        ),
        f"{slots} slots a layer hold fewer experts than one token uses ({facts.top_k}): every "
        "token's request is served in pieces, and little stays for the next.": slots < facts.top_k,
        "Every expert fits: nothing is loaded, and fine-tuning would change nothing.": (
            slots >= facts.num_experts
        ),
        "The experts that a batch asks for are counted as if its sequences chose independently; "
        "sequences that agree ask for fewer.": batch > 1,
        f"At {bits} bits experts are packed in store, link and slots; all else stays as it is. "
        "What that costs in text: docs/benchmarks.md.": bits in (8, 4),
    }
    return [note for note, holds in notes.items() if holds]


def _assumed(
    hardware: Hardware, ram_bytes: int | None, bits: int | None, reserved: bool, from_disk: bool
) -> list[str]:
    """Name each figure that the plan rests on, with its source."""
    known = assumptions()
    parts = [("Device memory", hardware.device), ("Link", hardware.link)]
    if from_disk:
        parts.append(("Disk", hardware.disk))
    out = [f"{label}: {part}, {part.source}." for label, part in parts]
    if not reserved:
        out.append(f"Kept free: {known['reserve']['source']}.")
    if ram_bytes is None:
        out.append("Host memory: not given, so the experts are taken to fit into it.")
    else:
        share = known["ram_share"]
        out.append(f"Host memory for experts: {share['value']:.0%} {share['source']}.")
    if bits in (8, 4):
        stored = known["stored_bits"][str(bits)]
        out.append(f"Stored weight: {stored['per_weight']} bits, {stored['source']}.")
    layer, load = host_time()
    out.append(
        "Fast end: the slowest tier alone, all else overlapped, no host time. Slow end: the tiers "
        f"one after the other, and {1e3 * layer:.2f} ms of host time a decoder layer and "
        f"{1e3 * load:.2f} ms a load ({known['host_time']['source']})."
    )
    out.append(
        "A token reads the parameters that its arithmetic touches; keys and values are those of a "
        "full context."
    )
    return out
