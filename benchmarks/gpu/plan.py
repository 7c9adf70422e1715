"""Which sections there are, in which order, and how long each may take."""

from __future__ import annotations

OLMOE, QWEN = "OLMoE-1B-7B", "Qwen3-30B-A3B"
ROOFS = "roofs"
# The paper's fine-tuned OLMoE loads 60 experts a token, of 16 layers x 8.
PAPER_RATE = 60 / 128


def sections(dry: bool) -> dict[str, float]:
    """
    Name -> seconds after which a section is given up; the most wanted come first.

    The first section of a kind of experts fills the store, which takes tens of seconds. Compiling
    comes last: how long it takes is not known.
    """
    found = {ROOFS: 60.0}
    found[f"{OLMOE}: bf16: half resident"] = 110
    found[f"{OLMOE}: bf16: all resident"] = 60
    found[f"{OLMOE}: bf16: reference engine"] = 60
    found[f"{OLMOE}: bf16: transformers, all resident"] = 60
    found[f"{OLMOE}: bf16: accelerate offload"] = 90
    found[f"{OLMOE}: bf16: moe-policylang"] = 60
    found[f"{OLMOE}: bf16: compiled"] = 150
    for kind in ("int4", "int8"):
        found[f"{OLMOE}: {kind}: half resident"] = 80
    found[f"{QWEN}: bf16: half resident"] = 180
    found[f"{QWEN}: bf16: all resident"] = 90
    found[f"{QWEN}: bf16: reference engine"] = 90
    if not dry:  # of a dry run's second model only what differs from the first
        for kind in ("int4", "int8"):
            found[f"{QWEN}: {kind}: half resident"] = 120
    found[f"{OLMOE}: bf16: transformers, compiled"] = 240
    found[f"{OLMOE}: int4: compiled"] = 120
    if not dry:
        found[f"{QWEN}: bf16: compiled"] = 150
    return {name: 10 * limit for name, limit in found.items()} if dry else found


def parts_of(name: str) -> tuple[str, str, str]:
    """Model, kind of experts and part that a section is about."""
    model, kind, part = name.split(": ")
    return model, kind, part
