"""Which sections there are, in which order, and how long each may take."""

from __future__ import annotations

OLMOE, QWEN = "OLMoE-1B-7B", "Qwen3-30B-A3B"
ROOFS = "roofs"
# What is divided by where the roofs could not be measured: shares of it say nothing, and are large.
NO_ROOFS = {"copy_engine": 1.0, "device": 1.0, "kernel_reads": 1.0}


def sections(dry: bool) -> dict[str, float]:
    """
    Name -> seconds after which a section is given up; the most wanted come first.

    The first section of a kind of experts fills the store, which takes tens of seconds.
    """
    found = {ROOFS: 60.0}
    for model in (OLMOE, QWEN):
        found[f"{model}: bf16: half resident"] = 110
        found[f"{model}: bf16: all resident"] = 60
        found[f"{model}: bf16: reference engine"] = 60
        if model == OLMOE:
            found[f"{model}: bf16: compiled"] = 150
        # Of a dry run's second model only what differs from the first.
        for kind in ("int4", "int8") if not (dry and model == QWEN) else ():
            found[f"{model}: {kind}: half resident"] = 80
        if model == OLMOE:
            found[f"{model}: bf16: transformers, all resident"] = 60
            found[f"{model}: bf16: accelerate offload"] = 90
    if not dry:
        found[f"{OLMOE}: int4: compiled"] = 120
        found[f"{QWEN}: bf16: compiled"] = 150
    found[f"{OLMOE}: bf16: moe-policylang"] = 60
    found[f"{OLMOE}: bf16: transformers, compiled"] = 240
    return {name: 10 * limit for name, limit in found.items()} if dry else found


def parts_of(name: str) -> tuple[str, str, str]:
    """Model, kind of experts and part that a section is about."""
    model, kind, part = name.split(": ")
    return model, kind, part
