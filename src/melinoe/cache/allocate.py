"""
Divide one budget of slots among the layers, by what a trace says each of them would load.

Layers do not share slots, so the loads of a model are the sum of its layers' loads.
"""

import numpy as np

from melinoe.cache.counters import PHASES
from melinoe.cache.curves import MissCurves
from melinoe.errors import BudgetError


def cost_of(curves: MissCurves, phase: str | None = "completion") -> np.ndarray:
    """Loads by layer and slots - 1, int64 (layers, num_experts); of both phases if None."""
    if phase is None:
        return curves.loads.sum(axis=0)
    return curves.loads[PHASES.index(phase)]


def allocate(cost: np.ndarray, budget: int, *, at_least: int = 1) -> tuple[int, ...]:
    """
    Split *budget* slots over layers so that the sum of their costs is least.

    Exact whatever the curves' shape, by dynamic programming over the layers, in
    layers x budget x experts steps.

    Args:
        cost: (layers, num_experts), the cost of each layer with 1, 2, ... slots, such as `cost_of`.
        budget: Slots in all; more than every expert of every layer are not used.
        at_least: Slots that every layer gets; with the model's top-k no decoded token is chunked.

    Returns:
        Slots of each layer. Where several splits cost the same, one that uses most of the budget.

    Raises:
        BudgetError: *budget* is below *at_least* in every layer.

    Source:
        Dynamic programming over layers as in AdapMoE, arXiv:2408.10284.
    """
    layers, experts = cost.shape
    if not 1 <= at_least <= experts:
        raise ValueError(f"at_least is {at_least}, and layers have {experts} experts")
    if budget < layers * at_least:
        raise BudgetError(
            f"{budget} slots are not enough for {layers} layers of at least {at_least}; "
            f"give at least {layers * at_least}"
        )
    budget = min(budget, layers * experts)
    # best[b]: least cost of the layers so far with exactly b slots among them.
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    given = np.zeros((layers, budget + 1), np.int32)
    for layer in range(layers):
        reached = np.full(budget + 1, np.inf)
        for slots in range(at_least, min(experts, budget) + 1):
            total = best[: budget + 1 - slots] + cost[layer, slots - 1]
            better = total < reached[slots:]
            reached[slots:][better] = total[better]
            given[layer, slots:][better] = slots
        best = reached
    # Of equal costs the largest budget used.
    left = budget - int(np.argmin(best[::-1]))
    result: list[int] = []
    for layer in range(layers - 1, -1, -1):
        result.append(int(given[layer, left]))
        left -= result[-1]
    return tuple(reversed(result))
