"""
Miss-ratio curves: the cost of every number of slots, and `allocate`, which divides slots by them.

Each built-in rule orders a layer's experts by a number that does not depend on the slots, which
makes it a stack algorithm **as long as every request fits**: a cache of C slots holds what one of C
- 1 holds, and one expert more. So one stack per layer tells the least slots with which each use
would have been a hit. A request with more experts than slots is served in parts whose order depends
on who is resident; for sizes below the largest request there is one replay each.

Source:
    R. L. Mattson et al., Evaluation techniques for storage hierarchies, IBM Systems Journal 9(2),
        1970; requests of several experts are ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from melinoe.cache import DEFAULT_POLICY
from melinoe.cache.counters import COMPLETION
from melinoe.cache.policy import COMPILED_POLICIES, Policy
from melinoe.cache.residency import check_capacity
from melinoe.cache.simulator import COMPILED_FROM, simulate
from melinoe.cache.trace import Trace
from melinoe.errors import BudgetError


def miss_curves(
    trace: Trace,
    policy: str | Callable[[], Policy] = DEFAULT_POLICY,
    *,
    policy_options: Mapping[str, Any] | None = None,
    reset_between_sequences: bool = False,
) -> np.ndarray:
    """
    Count the loads on demand with every number of slots; arguments and errors as in `simulate`.

    Returns int64 (2, layers, num_experts), by phase, layer and slots - 1.
    """
    layers, experts = trace.num_layers, trace.num_experts
    options, cold = policy_options or {}, reset_between_sequences
    again: Any = {"policy_options": options, "reset_between_sequences": cold}
    exact_from = np.full(layers, experts + 1)
    loads = np.zeros((2, layers, experts), np.int64)
    if isinstance(policy, str) and policy in COMPILED_POLICIES:
        from melinoe.cache.kernel import Prepared

        ready = Prepared(trace, policy, options, cold)
        loads_at, _, exact_from = ready.distances(ready.phase, 2, layers)
        loads[:] = loads_at.sum(axis=2, keepdims=True) - np.cumsum(loads_at, axis=2)[:, :, :-1]
    for slots in range(1, min(experts, int(exact_from.max(initial=1)) - 1) + 1):
        chunked = exact_from > slots
        counters = simulate(trace, slots, policy, **again).counters
        loads[:, chunked, slots - 1] = counters.loads[:, chunked]
    return loads


@dataclass(frozen=True)
class UnitCosts:
    """Hold the cost of each unit's completion by number of slots; see `simulator.Simulation`."""

    hits: np.ndarray  # int64 (sizes, units), uses whose expert was resident, of all layers
    loads: np.ndarray  # alike, experts copied on demand
    uses: np.ndarray  # int64 (units,)
    tokens: np.ndarray  # int64 (units,), rows


def unit_costs(
    trace: Trace,
    slots: Sequence[int],
    policy: str | Callable[[], Policy] = DEFAULT_POLICY,
    *,
    policy_options: Mapping[str, Any] | None = None,
    reset_between_sequences: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> UnitCosts:
    """
    Count what each unit's completion costs with each number of slots; equal to simulating each.
    Arguments and errors as in `simulate`; *progress* is called once for each size that is done.
    """
    for size in slots:
        check_capacity(trace.num_experts, size)
    exact_from = trace.num_experts + 1
    options, cold = policy_options or {}, reset_between_sequences
    again: Any = {"policy_options": options, "reset_between_sequences": cold}
    by_rule = isinstance(policy, str) and policy in COMPILED_POLICIES
    # As in `simulate`: loading compiled code pays for much work alone.
    if by_rule and len(trace) * trace.num_layers * len(slots) >= COMPILED_FROM:
        assert isinstance(policy, str)
        from melinoe.cache.kernel import Prepared

        ready = Prepared(trace, policy, options, cold)
        group, groups = 2 * ready.unit + ready.phase, 2 * len(ready.units)
        loads_at, uses_at, largest = ready.distances(group, groups, 1)
        loads_at, uses_at = loads_at[COMPLETION::2, 0], uses_at[COMPLETION::2, 0]
        loads_below, hits_below = np.cumsum(loads_at, axis=1), np.cumsum(uses_at, axis=1)
        tokens = np.bincount(group, ready.tokens, groups)[COMPLETION::2].astype(np.int64)
        exact_from = int(largest.max())
    found: list[tuple[np.ndarray, ...]] = []
    for size in slots:
        if size >= exact_from:
            loads = loads_below[:, -1] - loads_below[:, size - 1]
            found.append((hits_below[:, size - 1], loads, hits_below[:, -1], tokens))
        else:
            done = simulate(trace, size, policy, **again).per_sequence
            names = ("hits", "loads", "uses", "tokens")
            found.append(
                tuple(np.array([getattr(u, n)[COMPLETION].sum() for u in done]) for n in names)
            )
        progress()
    hits, loads, uses, rows = zip(*found, strict=True)
    return UnitCosts(np.stack(hits), np.stack(loads), uses[0], rows[0])


# --- slots by layer -------------------------------------------------------------------------------


def allocate(cost: np.ndarray, budget: int, *, at_least: int = 1) -> tuple[int, ...]:
    """
    Split *budget* slots over layers so that the sum of their costs is least, by dynamic
    programming.

    *cost* (layers, num_experts) is that of each layer with 1, 2, ... slots, such as `miss_curves`;
    every layer gets *at_least* so many. Of equal splits one that uses most of the budget.
    BudgetError if *budget* is too little for that.

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
