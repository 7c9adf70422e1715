"""Which sections a call measures, in which order, and how long each may take."""

from __future__ import annotations

OLMOE, QWEN = "OLMoE-1B-7B", "Qwen3-30B-A3B"
CARD, SMOKE, TESTS, FAILED_CAPTURE = "card", "smoke", "tests", "failed capture"
LINK = f"{OLMOE}: bf16: link"
# The paper's fine-tuned OLMoE loads 60 experts a token, of 16 layers x 8.
PAPER_RATE = 60 / 128
# Below this share of the copy engine's rate, kernels are not how experts should be copied.
ENOUGH = 0.85
# Minutes of a call; both fit into a quarter of an hour of a rented GPU.
MINUTES = {"A": 4.0, "B": 7.0}


def sections(call: str, dry: bool) -> dict[str, float]:
    """
    Name -> seconds after which a section is given up, in the order in which they run.

    Call A says whether the engine works and where its time goes; read it before call B. The first
    section of a kind of experts fills the store, which takes tens of seconds.

    Args:
        call: ``A`` or ``B``.
        dry: On the CPU, where everything is slow.
    """
    if call == "A":
        found = {
            CARD: 20.0,
            SMOKE: 60.0,
            LINK: 60.0,
            f"{OLMOE}: bf16: all resident": 50.0,
            f"{OLMOE}: bf16: half resident": 50.0,
            f"{OLMOE}: bf16: split": 50.0,
            f"{OLMOE}: bf16: profile": 40.0,
        }
    else:
        found = {
            f"{OLMOE}: packed: products": 90.0,
            f"{OLMOE}: int4: half resident": 60.0,
            f"{OLMOE}: int8: half resident": 60.0,
            TESTS: 120.0,
            FAILED_CAPTURE: 40.0,
            f"{QWEN}, 12 layers: bf16: half resident": 80.0,
            f"{OLMOE}: bf16: reference engine": 40.0,
            f"{OLMOE}: bf16: transformers, all resident": 40.0,
            f"{OLMOE}: bf16: accelerate offload": 60.0,
            f"{OLMOE}: bf16: transformers, compiled": 120.0,
        }
        if dry:  # tests of a GPU, and what differs from another section by its size alone
            del found[TESTS], found[FAILED_CAPTURE]
            del found[f"{OLMOE}: int8: half resident"]
    return {name: 10 * limit for name, limit in found.items()} if dry else found


def parts_of(name: str) -> tuple[str, int | None, str, str]:
    """Model, its layers (None: all), kind of experts and part that a section is about."""
    model, kind, part = name.split(": ")
    model, _, layers = model.partition(", ")
    return model, int(layers.removesuffix(" layers")) if layers else None, kind, part
