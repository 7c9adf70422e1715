"""The table of limits: what no engine can pass, from shapes and bandwidths alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from melinoe.plan.facts import ModelFacts, model_facts
from melinoe.plan.hardware import find_bandwidth, find_card

# Rows of the table where no model is named.
MODELS = ("OLMoE-1B-7B", "Qwen3-30B-A3B", "Phi-3.5-MoE", "Mixtral-8x7B")
HIT_RATES = (0.0, 0.5, 0.8, 0.9, 0.95)


def limits_of(
    facts: ModelFacts,
    link_bytes_per_s: float,
    device_bytes_per_s: float,
    hit_rates: Sequence[float] = HIT_RATES,
) -> dict[str, Any]:
    """
    One row: sizes, and tokens a second that the link and the device's memory allow.

    The link carries ``(1 - hit rate) x M`` a token, M the bytes of one token's experts. The
    memory's roof reads every parameter outside the experts, the table of tokens too, and M, without
    keys and values. A second roof leaves out what a token does not read, and is the higher one.

    Args:
        facts: The model.
        link_bytes_per_s: Of the link.
        device_bytes_per_s: Of the device's memory.
        hit_rates: A column for each.

    Returns:
        ``model``, ``expert_mb``, ``all_experts_gb``, ``m_gb``, ``link_tokens_per_s`` (hit rate as
        text -> tokens/s), ``memory_tokens_per_s``, ``memory_read_tokens_per_s``.
    """
    moved = facts.active_expert_bytes
    layer = facts.layers[0]
    return {
        "model": f"{facts.name} ({len(facts.layers)} layers, {layer.num_experts} experts, "
        f"top-{layer.top_k})",
        "expert_mb": layer.block_bytes / 1e6,
        "all_experts_gb": facts.expert_bytes / 1e9,
        "m_gb": moved / 1e9,
        "link_tokens_per_s": {
            f"{rate:g}": link_bytes_per_s / ((1 - rate) * moved) for rate in hit_rates
        },
        "memory_tokens_per_s": device_bytes_per_s / (facts.backbone_bytes + moved),
        "memory_read_tokens_per_s": device_bytes_per_s / (facts.read_bytes + moved),
    }


def limits(
    models: Sequence[str] = (), link: str = "pcie5x16", card: str = "h100"
) -> dict[str, Any]:
    """
    The table of limits.

    Args:
        models: As `model_facts` takes them; none: `MODELS`.
        link: A name or a figure.
        card: Whose memory.

    Returns:
        ``link`` and ``device``, each with ``gb_s`` and ``source``; ``rows`` of `limits_of`.

    Raises:
        MelinoeError: as `model_facts`, `find_bandwidth` and `find_card`.
    """
    over = find_bandwidth(link, "link")
    memory = find_card(card)
    speeds = (over.bytes_per_s, memory.bandwidth.bytes_per_s)
    return {
        "link": {"gb_s": speeds[0] / 1e9, "source": over.source},
        "device": {
            "card": memory.name,
            "gb_s": speeds[1] / 1e9,
            "source": memory.bandwidth.source,
        },
        "rows": [limits_of(model_facts(model, context=1), *speeds) for model in (models or MODELS)],
    }


def limits_record(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table as a record that `melinoe report` shows, its columns in words."""
    link, device = table["link"], table["device"]
    return {
        "benchmark": "limits",
        "title": "Limits",
        "result": [
            {
                "model": row["model"],
                "expert (MB)": row["expert_mb"],
                "all experts (GB)": row["all_experts_gb"],
                "M (GB)": row["m_gb"],
                **{
                    f"link roof at hit rate {rate} (tokens/s)": value
                    for rate, value in row["link_tokens_per_s"].items()
                },
                "memory roof (tokens/s)": row["memory_tokens_per_s"],
                "memory roof, embedding table not read (tokens/s)": row["memory_read_tokens_per_s"],
            }
            for row in table["rows"]
        ],
        "notes": [
            "Computed from shapes, nothing measured. "
            f"Link: {link['gb_s']:g} GB/s ({link['source']}). "
            f"Memory: {device['gb_s']:g} GB/s ({device['source']}).",
            "Weights as the config types them; at 4.5 bits a weight (4-bit, groups of 64) a link "
            f"carries {16 / 4.5:.2f} times the tokens.",
        ],
    }
