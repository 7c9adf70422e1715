"""What a plan says in sentences: what must not be missed, and what was assumed."""

from __future__ import annotations

from melinoe.plan.facts import ModelFacts
from melinoe.plan.hardware import Hardware
from melinoe.plan.hit_rates import assumptions
from melinoe.plan.speed import paper_host_time


def notes(facts: ModelFacts, slots: int, batch: int, bits: int | None) -> list[str]:
    """What a reader of the plan must not miss."""
    out = []
    if facts.packed is not None:
        out.append("The figures are what serving them as they are packed would take.")
    if facts.kv_bytes is None:
        out.append(
            f"Keys and values: {facts.kv_source}; they are counted nowhere, so keep memory for "
            "them."
        )
    if facts.max_context is not None and facts.context > facts.max_context:
        out.append(f"The config was made for {facts.max_context} tokens, not for {facts.context}.")
    if slots < facts.top_k:
        out.append(
            f"{slots} slots a layer hold fewer experts than one token uses ({facts.top_k}): "
            "every token's request is served in pieces, and little stays for the next."
        )
    if slots >= facts.num_experts:
        out.append("Every expert fits: nothing is loaded, and fine-tuning would change nothing.")
    if batch > 1:
        out.append(
            "The experts that a batch asks for are counted as if its sequences chose "
            "independently; sequences that agree ask for fewer."
        )
    if bits in (8, 4):
        out.append(
            f"At {bits} bits the store and the link carry less; slots, and the arithmetic on the "
            "device, stay at 16 bits."
        )
    return out


def assumed(
    facts: ModelFacts,
    hardware: Hardware,
    ram_bytes: int | None,
    bits: int | None,
    *,
    reserve_given: bool,
    from_disk: bool,
) -> list[str]:
    """Each figure that the plan rests on, with its source."""
    known = assumptions()
    parts = [("Device memory", hardware.device), ("Link", hardware.link), ("DRAM", hardware.dram)]
    if from_disk:
        parts.append(("Disk", hardware.disk))
    out = [f"{label}: {part}, {part.source}." for label, part in parts]
    if not reserve_given:
        out.append(f"Kept free: {known['reserve']['source']}.")
    if ram_bytes is None:
        out.append("Host memory: not given, so the experts are taken to fit into it.")
    else:
        share = known["ram_share"]
        out.append(f"Host memory for experts: {share['value']:.0%} {share['source']}.")
    if bits in (8, 4):
        stored = known["stored_bits"][str(bits)]
        out.append(f"Stored weight: {stored['per_weight']} bits, {stored['source']}.")
    if facts.packed is not None:
        out.append(f"Packed weights, by the config: {facts.packed}.")
    host = paper_host_time()
    out.append(
        "Fast end: the slowest tier alone, all else overlapped, no host time. Slow end: the tiers "
        f"one after the other, and {1e3 * host.layer:.2f} ms of host time a decoder layer and "
        f"{1e3 * host.load:.2f} ms a load ({known['host_time']['source']})."
    )
    out.append(
        "A token reads the parameters that its arithmetic touches; keys and values are those of a "
        "full context."
    )
    return out
