"""Forecast what each of some models does on each of some cards, from configs alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from melinoe.errors import BudgetError
from melinoe.plan.facts import model_facts
from melinoe.plan.hardware import find_card
from melinoe.plan.planner import plan

# Cards that people have, by memory, and models with the bits that their experts are stored at;
# None: as they are published.
CARDS = ("rtx4060", "rtx3060", "rtx4060ti", "rtx4090")
MODELS: tuple[tuple[str, int | None], ...] = (
    ("OLMoE-1B-7B", None),
    ("Qwen3-30B-A3B", None),
    ("Qwen3-30B-A3B", 8),
    ("Qwen3-30B-A3B", 4),
    ("gpt-oss-20b", None),
    ("gpt-oss-120b", None),
    ("Mixtral-8x7B", None),
    ("Mixtral-8x7B", 4),
)
CONTEXT = 4096  # tokens
GIB = 2**30


def forecast() -> list[dict[str, Any]]:
    """
    Plan every model of `MODELS` on every card of `CARDS`: a row for each model.

    In its ``cards`` stands None where the model does not fit, else ``slots`` and the two ends of
    ``tokens_per_s``.
    """
    rows = []
    facts = {name: model_facts(name, CONTEXT) for name, _ in MODELS}
    for name, bits in MODELS:
        row: dict[str, Any] = {"model": name, "bits": bits, "cards": {}}
        for card in CARDS:
            try:
                done = plan(facts[name], card=card, bits=bits)
            except BudgetError:
                row["cards"][card] = None
                continue
            ends = (done.speed_before.low, done.speed_before.high)
            row["cards"][card] = {"slots": done.slots, "tokens_per_s": list(ends)}
            row["experts_gib"] = done.stored_bytes / GIB
            row["num_experts"] = done.facts.num_experts
        rows.append(row)
    return rows


def forecast_record(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make the record that `melinoe report` shows, its columns in words."""
    result = []
    for row in rows:
        bits = "" if row["bits"] is None else f", {row['bits']} bits"
        shown = {
            "model": row["model"] + bits,
            "all experts (GiB)": f"{row['experts_gib']:.0f}" if "experts_gib" in row else "-",
        }
        for card, found in row["cards"].items():
            head = f"{find_card(card).memory_bytes / GIB:.0f} GB ({card})"
            shown[head] = "does not fit"
            if found is not None:
                low, high = (
                    f"{end:.0f}" if end >= 10 else f"{end:.2g}" for end in found["tokens_per_s"]
                )
                shown[head] = f"{found['slots']} of {row['num_experts']}, {low} to {high} tokens/s"
        result.append(shown)
    return {
        "benchmark": "plan_cards",
        "title": "Models against cards, a forecast",
        "result": result,
        "notes": [
            "Forecast by `melinoe plan` from configs and datasheets, not measured: experts of each "
            f"layer that fit on the card beside all else at {CONTEXT:,} tokens, and tokens a "
            "second from the slowest to the fastest that their hit rate allows. The other experts "
            "wait in host memory, which must hold all of them."
        ],
    }
