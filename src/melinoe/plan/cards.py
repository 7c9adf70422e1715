"""Forecast what each of some models does on each of some cards, from configs alone."""

from __future__ import annotations

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


def forecast_record() -> dict[str, Any]:
    """Plan every model of `MODELS` on every card of `CARDS`, as a record for `melinoe report`."""
    result = []
    facts = {name: model_facts(name, CONTEXT) for name, _ in MODELS}
    for name, bits in MODELS:
        row = {"model": name + ("" if bits is None else f", {bits} bits"), "all experts (GiB)": "-"}
        for card in CARDS:
            head = f"{find_card(card).memory_bytes / GIB:.0f} GB ({card})"
            try:
                done = plan(facts[name], card=card, bits=bits)
            except BudgetError:
                row[head] = "does not fit"
                continue
            ends = (done.speed_before.low, done.speed_before.high)
            low, high = (f"{end:.0f}" if end >= 10 else f"{end:.2g}" for end in ends)
            row[head] = f"{done.slots} of {done.facts.num_experts}, {low} to {high} tokens/s"
            row["all experts (GiB)"] = f"{done.stored_bytes / GIB:.0f}"
        result.append(row)
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
