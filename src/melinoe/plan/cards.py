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
    ("Qwen3-30B-A3B", 4),
    ("gpt-oss-20b", None),
    ("gpt-oss-120b", None),
    ("Mixtral-8x7B", None),
    ("Mixtral-8x7B", 4),
)
CONTEXT = 4096  # tokens
GIB = 2**30


def forecast(
    models: Sequence[tuple[str, int | None]] = MODELS, cards: Sequence[str] = CARDS
) -> list[dict[str, Any]]:
    """
    Plan every model on every card.

    Args:
        models: Name and bits of a stored weight, as `plan` takes them.
        cards: Names of cards.

    Returns:
        A row for each model: ``model``, ``experts_gib`` (all of them, as stored), ``num_experts``,
        and ``cards``: for each card None if the model does not fit, else ``slots`` and the two ends
        of ``tokens_per_s``.

    Raises:
        MelinoeError: as `plan`, but for a budget that is too small.
    """
    rows = []
    facts = {name: model_facts(name, CONTEXT) for name, _ in models}
    for name, bits in models:
        row: dict[str, Any] = {"model": name, "bits": bits, "cards": {}}
        for card in cards:
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
    names = list(rows[0]["cards"])
    heads = {name: find_card(name) for name in names}
    result = []
    for row in rows:
        bits = "" if row["bits"] is None else f", {row['bits']} bits"
        shown: dict[str, Any] = {
            "model": row["model"] + bits,
            "all experts (GiB)": f"{row['experts_gib']:.0f}" if "experts_gib" in row else "-",
        }
        for name, head in heads.items():
            found = row["cards"][name]
            shown[f"{head.memory_bytes / GIB:.0f} GB ({head.name})"] = (
                "does not fit"
                if found is None
                else f"{found['slots']} of {row['num_experts']}, "
                + " to ".join(_two(end) for end in found["tokens_per_s"])
                + " tokens/s"
            )
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


def _two(value: float) -> str:
    """Write a number with two digits that count."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
