"""
How many slots each layer gets out of one budget, from what a trace says each would cost.

Layers do not share slots, so the loads of a model are the sum of its layers' loads, and the best
split is a resource allocation problem over the layers' miss curves.
"""

from collections.abc import Sequence

import numpy as np

from melinoe.cache.curves import MissCurves
from melinoe.errors import BudgetError

METHODS = ("exact", "marginal")


def cost_of(curves: MissCurves, phase: str | None = "completion") -> np.ndarray:
    """Loads by layer and slots - 1, int64 (layers, num_experts); of both phases if None."""
    if phase is None:
        return curves.loads.sum(axis=0)
    return curves.loads[("prompt", "completion").index(phase)]


def allocate(
    cost: np.ndarray, budget: int, *, at_least: int = 1, method: str = "exact"
) -> tuple[int, ...]:
    """
    Split *budget* slots over layers so that the sum of their costs is least.

    Args:
        cost: (layers, num_experts), what each layer costs with 1, 2, ... slots, such as `cost_of`.
        budget: Slots in all; more than every expert of every layer are not used.
        at_least: Slots that every layer gets; the model's top-k lets no decoded token be chunked.
        method: ``exact``: dynamic programming over the layers, the least cost whatever the curves'
            shape, in layers x budget x experts steps. ``marginal``: give the next slots where they
            save most per slot, along each curve's lower convex hull; the same where the curves are
            convex, near it elsewhere, and faster.

    Returns:
        Slots of each layer. Where several splits cost the same, one that uses most of the budget.

    Raises:
        BudgetError: *budget* is below *at_least* in every layer.
        ValueError: an unknown method, or an *at_least* that no layer can have.

    Source:
        Dynamic programming over layers as in AdapMoE, arXiv:2408.10284; marginal gain is the usual
        greedy rule for separable costs.
    """
    layers, experts = cost.shape
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 1 <= at_least <= experts:
        raise ValueError(f"at_least is {at_least}, and layers have {experts} experts")
    if budget < layers * at_least:
        raise BudgetError(
            f"{budget} slots are not enough for {layers} layers of at least {at_least}; "
            f"give at least {layers * at_least}"
        )
    budget = min(budget, layers * experts)
    solve = _exact if method == "exact" else _marginal
    return solve(np.asarray(cost, np.float64), budget, at_least)


def uniform(num_layers: int, num_experts: int, budget: int) -> tuple[int, ...]:
    """The split that ignores the trace: equal, what does not divide goes to the first layers."""
    each, rest = divmod(min(budget, num_layers * num_experts), num_layers)
    return tuple(each + (layer < rest) for layer in range(num_layers))


def _exact(cost: np.ndarray, budget: int, at_least: int) -> tuple[int, ...]:
    layers, experts = cost.shape
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


def _marginal(cost: np.ndarray, budget: int, at_least: int) -> tuple[int, ...]:
    layers = len(cost)
    slots = [at_least] * layers
    left = budget - layers * at_least
    while left > 0:
        # The steepest step that still fits: from where each layer is, to anywhere within reach.
        steps = [_best_step(cost[layer], slots[layer], left) for layer in range(layers)]
        gain, step = max(steps, key=lambda one: one[0])
        if step == 0 or gain < 0:
            break
        slots[steps.index((gain, step))] += step
        left -= step
    return tuple(slots)


def _best_step(cost: np.ndarray, slots: int, left: int) -> tuple[float, int]:
    """Saving per slot of the steepest step, and its length; no length if there is none."""
    ahead = cost[slots : slots + left]
    if not len(ahead):
        return -np.inf, 0
    gains = (cost[slots - 1] - ahead) / np.arange(1, len(ahead) + 1)
    step = int(np.argmax(gains))
    return float(gains[step]), step + 1


def total_cost(cost: np.ndarray, slots: Sequence[int]) -> float:
    """What a split costs: the sum over layers."""
    return float(sum(cost[layer, count - 1] for layer, count in enumerate(slots)))
