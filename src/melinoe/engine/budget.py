"""Turn amounts of memory into slots and back: how many experts fit, never one more."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

from melinoe.errors import BudgetError
from melinoe.host_memory import format_bytes
from melinoe.moe.experts import ExpertsLayer

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """
    Read an amount of memory: ``"8GiB"``, ``"500 MB"``, ``"1.5gib"``, ``"1024"`` or an int.

    Returns:
        Bytes, rounded down.

    Raises:
        BudgetError: no number, an unknown unit, or nothing left after rounding.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        amount = text
    else:
        match = _BYTES.fullmatch(str(text))
        if match is None or match[2].lower() not in _UNITS:
            raise BudgetError(
                f"{text!r} is not an amount of memory; write it like 8GiB, 500MB or 1073741824"
            )
        amount = _exact(match[1], _UNITS[match[2].lower()])
    if amount <= 0:
        raise BudgetError(f"{text!r} leaves no memory; write an amount like 8GiB or 500MB")
    return amount


def _exact(number: str, unit: int) -> int:
    """``number * unit`` in whole numbers: a float would lose the last bytes of a large budget."""
    whole, _, part = number.partition(".")
    return int(whole or 0) * unit + (int(part) * unit // 10 ** len(part) if part else 0)


def memory_of(slots: int | Sequence[int], layers: Sequence[ExpertsLayer]) -> int:
    """Bytes of *slots* per layer, or of each layer; none gets more slots than it has experts."""
    counts = [slots] * len(layers) if isinstance(slots, int) else slots
    each = zip(counts, layers, strict=True)
    return sum(min(count, layer.num_experts) * layer.block_bytes for count, layer in each)


def slots_for(expert_memory: str | int, layers: Sequence[ExpertsLayer]) -> int:
    """
    The most slots per layer, alike in all layers, whose bytes stay within *expert_memory*.

    Returns:
        Between 1 and the largest number of experts of a layer.

    Raises:
        BudgetError: not even one slot per layer fits; the message has the smallest that works.
    """
    budget = parse_bytes(expert_memory)
    smallest = memory_of(1, layers)
    if budget < smallest:
        raise BudgetError(
            f"an expert memory of {format_bytes(budget)} is below one expert in each of "
            f"{len(layers)} layers; give at least {smallest} bytes ({format_bytes(smallest)})"
        )
    possible = range(1, max(layer.num_experts for layer in layers) + 1)
    return bisect_right(possible, budget, key=lambda slots: memory_of(slots, layers))


def slots_by_layer(slots: int | Sequence[int], layers: Sequence[ExpertsLayer]) -> tuple[int, ...]:
    """
    Slots of each layer; one number for all of them is cut to the experts that a layer has.

    Raises:
        BudgetError: no slot or more than experts, or not one number for each layer.
    """
    if isinstance(slots, int):
        most = max(layer.num_experts for layer in layers)
        if not 1 <= slots <= most:
            raise BudgetError(
                f"{slots} slots per layer do not work with {most} experts; "
                f"give between 1 and {most}"
            )
        return tuple(min(slots, layer.num_experts) for layer in layers)
    if len(slots) != len(layers):
        raise BudgetError(
            f"slots are given for {len(slots)} layers of {len(layers)}; give one number for each, "
            "or one for all"
        )
    for number, (count, layer) in enumerate(zip(slots, layers, strict=True)):
        if not 1 <= count <= layer.num_experts:
            raise BudgetError(
                f"{count} slots do not work in layer {number} with {layer.num_experts} experts; "
                f"give between 1 and {layer.num_experts}"
            )
    return tuple(map(int, slots))
