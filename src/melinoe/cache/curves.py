"""
Miss-ratio curves: what every number of slots would have cost, most of it in one pass.

Each built-in rule orders all experts of a layer by a number that does not depend on the slots
(`melinoe.cache.eviction`), and that makes it a stack algorithm: **as long as every request fits**,
a cache of C slots holds what one of C - 1 holds, and one expert more. Let both serve a request of
n <= C - 1 experts. The smaller one keeps its best C - 1 - n others; the larger one has at most one
other that the smaller one has not, so each of those is among its best C - n. So one stack per
layer tells the least slots with which each use would have been a hit.

A request with more experts than slots, as a prompt makes, is served in parts whose order depends on
who is resident, and the argument fails: after it a smaller cache may hold what a larger one does
not. So a layer's curve comes from the one pass for as many slots as its largest request has experts
or more, and from one replay per size below that.

Source:
    R. L. Mattson, J. Gecsei, D. R. Slutz, I. L. Traiger, Evaluation techniques for storage
    hierarchies, IBM Systems Journal 9(2), 1970; requests of several experts are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from melinoe.cache.compiled import passes_of, settings_of
from melinoe.cache.counters import PHASES
from melinoe.cache.locality import popularity
from melinoe.cache.policy import Policy
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace
from melinoe.cache.units import units_of
from melinoe.errors import MelinoeError


@dataclass(frozen=True)
class MissCurves:
    """
    What each layer costs with 1 to all slots.

    Attributes:
        loads: int64 (2, layers, num_experts), demand loads by phase, layer and slots - 1.
        hits: int64, alike, uses whose expert was resident.
        uses: int64 (2, layers).
        exact_from: int64 (layers,), slots from which one pass was enough; more than there are
            experts where it never was.
    """

    loads: np.ndarray
    hits: np.ndarray
    uses: np.ndarray
    exact_from: np.ndarray

    def miss_rate(self, phase: str = "completion") -> np.ndarray:
        """
        Share of uses that were not resident with the same slots in all layers.

        Returns:
            float64 (num_experts,), by slots - 1.

        Raises:
            MelinoeError: the trace has no use in that phase.
        """
        uses = self.uses[PHASES.index(phase)].sum()
        if not uses:
            raise MelinoeError(f"the trace has no {phase} to count; record a longer one")
        return 1 - self.hits[PHASES.index(phase)].sum(axis=0) / uses


def miss_curves(
    trace: Trace,
    policy: str | Callable[[], Policy] = "lru",
    *,
    policy_options: Mapping[str, Any] | None = None,
    reset_between_sequences: bool = False,
) -> MissCurves:
    """
    The cost of every number of slots per layer under one policy; equal to simulating each.

    Args:
        trace: What the model chose.
        policy: As in `simulate`, with slots per layer. Built-in rules go in one pass where that is
            exact; others are replayed once per size.
        policy_options, reset_between_sequences: As in `simulate`.

    Raises:
        MelinoeError, TraceError: as `simulate`.
    """
    from melinoe.cache.kernel_rules import RULES

    options = dict(policy_options or {})
    layers, experts = trace.num_layers, trace.num_experts
    exact_from = np.full(layers, experts + 1)
    loads = np.zeros((2, layers, experts), np.int64)
    hits = np.zeros_like(loads)
    uses = np.zeros((2, layers), np.int64)
    if isinstance(policy, str) and policy in RULES:
        if policy == "static":
            options.setdefault("popularity", popularity(trace))
        loads_at, uses_at, exact_from = _distances(trace, policy, options, reset_between_sequences)
        loads[:] = loads_at.sum(axis=2, keepdims=True) - np.cumsum(loads_at, axis=2)[:, :, :-1]
        hits[:] = np.cumsum(uses_at, axis=2)[:, :, :-1]
        uses[:] = uses_at.sum(axis=2)
    for slots in range(1, min(experts, int(exact_from.max(initial=1)) - 1) + 1):
        counters = simulate(
            trace,
            slots,
            policy,
            policy_options=options,
            reset_between_sequences=reset_between_sequences,
        ).counters
        chunked = exact_from > slots
        loads[:, chunked, slots - 1] = counters.loads[:, chunked]
        hits[:, chunked, slots - 1] = counters.hits[:, chunked]
        uses = counters.uses
    return MissCurves(loads, hits, uses, exact_from)


def _distances(
    trace: Trace, policy: str, options: Mapping[str, Any], reset_between_sequences: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from melinoe.cache.kernel_rules import RULES
    from melinoe.cache.kernel_stack import distances

    bounds, phase = passes_of(trace)
    gamma, popular = settings_of(trace, policy, options)
    resets = np.zeros(len(phase), bool)
    if reset_between_sequences:
        first_of = {sequence: number for number, u in enumerate(units_of(trace)) for sequence in u}
        unit = [first_of[sequence] for sequence in trace.sequence[bounds[:-1]].tolist()]
        resets[np.unique(unit, return_index=True)[1]] = True
    shape = (2, trace.num_layers, trace.num_experts + 1)
    loads_at, uses_at = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    largest = np.ones(trace.num_layers, np.int64)
    if len(phase):
        distances(
            trace.experts,
            bounds,
            phase,
            resets,
            trace.num_experts,
            RULES[policy],
            gamma,
            popular,
            loads_at,
            uses_at,
            largest,
        )
    return loads_at, uses_at, largest
