"""
How fast may any engine be, by a link and a memory alone? The table "Limits" of docs/method.md.

Nothing is measured. The link carries ``(1 - hit rate) x M`` a token, M the bytes of one token's
experts. The memory's roof reads every parameter outside the experts, the table of tokens too, and
M, without keys and values; a second roof leaves out what a token does not read, and is the higher.

    python benchmarks/limits.py         # writes benchmarks/results/limits.json
"""

from pathlib import Path
from typing import Any

from melinoe.measure import write_json
from melinoe.plan.facts import ModelFacts, model_facts
from melinoe.plan.hardware import find_bandwidth, find_card

MODELS = ("OLMoE-1B-7B", "Qwen3-30B-A3B", "Phi-3.5-MoE", "Mixtral-8x7B")
HIT_RATES = (0.0, 0.5, 0.8, 0.9, 0.95)
LINK, CARD = "pcie5x16", "h100"


def row(facts: ModelFacts, link_bytes_per_s: float, memory_bytes_per_s: float) -> dict[str, Any]:
    """Sizes of a model, and tokens a second that the link and the device's memory allow."""
    moved, layer = facts.active_expert_bytes, facts.layers[0]
    return {
        "model": f"{facts.name} ({len(facts.layers)} layers, {layer.num_experts} experts, "
        f"top-{layer.top_k})",
        "expert (MB)": layer.block_bytes / 1e6,
        "all experts (GB)": facts.expert_bytes / 1e9,
        "M (GB)": moved / 1e9,
        **{
            f"link roof at hit rate {rate:g} (tokens/s)": link_bytes_per_s / ((1 - rate) * moved)
            for rate in HIT_RATES
        },
        "memory roof (tokens/s)": memory_bytes_per_s / (facts.backbone_bytes + moved),
        "memory roof, embedding table not read (tokens/s)": memory_bytes_per_s
        / (facts.read_bytes + moved),
    }


def record() -> dict[str, Any]:
    """The table as `melinoe report` shows it."""
    link, memory = find_bandwidth(LINK, "link"), find_card(CARD).bandwidth
    speeds = (link.bytes_per_s, memory.bytes_per_s)
    return {
        "benchmark": "limits",
        "title": "Limits",
        "result": [row(model_facts(model, context=1), *speeds) for model in MODELS],
        "notes": [
            "Computed from shapes, nothing measured. "
            f"Link: {speeds[0] / 1e9:g} GB/s ({link.source}). "
            f"Memory: {speeds[1] / 1e9:g} GB/s ({memory.source}).",
            "Weights as the config types them; at 4.5 bits a weight (4-bit, groups of 64) a link "
            f"carries {16 / 4.5:.2f} times the tokens.",
        ],
    }


if __name__ == "__main__":
    write_json(Path(__file__).parent / "results" / "limits.json", record())
