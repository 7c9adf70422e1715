"""
Simulator: what a trace would have cost with other slots or another policy.

It drives the same `Residency` as the runtime, with the same calls in the same order: forward pass
by forward pass, layer by layer. So its counts are the runtime's, not an estimate of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from melinoe.cache.counters import PHASES, Counters
from melinoe.cache.policy import Belady, Policy, policy_class
from melinoe.cache.policy import policy as make_policy
from melinoe.cache.requests import ForwardPass
from melinoe.cache.residency import Residency
from melinoe.cache.trace import Trace
from melinoe.errors import MelinoeError

ByLayer = Sequence[Sequence[int]]
Prefetch = Callable[[int], ByLayer] | Mapping[int, ByLayer]


@dataclass(frozen=True)
class Simulation:
    """
    The outcome of `simulate`.

    Attributes:
        counters: The whole trace.
        per_sequence: The same by unit; they add up to *counters*. A unit is one sequence, or
            several that share a forward pass: a load made for a batch belongs to all of it.
        sequences: The sequence numbers of each unit, ascending.
        slots: Slots of each layer.
        policy: Its name.
    """

    counters: Counters
    per_sequence: list[Counters]
    sequences: list[tuple[int, ...]]
    slots: tuple[int, ...]
    policy: str


def simulate(
    trace: Trace,
    slots: int | Sequence[int],
    policy: str | Callable[[], Policy] = "lru",
    *,
    prefetch: Prefetch | None = None,
    prefetch_at: str = "prompt",
    reset_between_sequences: bool = False,
    policy_options: Mapping[str, Any] | None = None,
) -> Simulation:
    """
    Replay a trace through a cache.

    Args:
        trace: What the model chose.
        slots: Slots of every layer, or of each.
        policy: A known name, or a function that makes a new `Policy` for each layer.
        prefetch: Sequence number to the experts to load per layer, the most wanted first; called
            once for each sequence, ascending where a batch begins. A mapping may leave some out.
        prefetch_at: ``prompt``: before the sequence's first forward pass; ``completion``: before
            its first forward pass of that phase.
        reset_between_sequences: Empty the cache before each unit's first forward pass.
        policy_options: What the named policy takes, such as ``{"gamma": 0.9}`` for ``lfu``.

    Raises:
        MelinoeError: no such policy, or a layer with no slot or more slots than experts.
        ValueError: *slots* or a prefetch does not name every layer; an unknown *prefetch_at*.
    """
    if prefetch_at not in PHASES:
        raise ValueError(f"prefetch_at must be one of {', '.join(PHASES)}, got {prefetch_at!r}")
    earliest = PHASES.index(prefetch_at)
    per_layer = _slots_of_layers(trace, slots)
    makers, name = _policies(trace, policy, dict(policy_options or {}))
    residencies = [
        Residency(trace.num_experts, capacity, make())
        for capacity, make in zip(per_layer, makers, strict=True)
    ]
    units = _units(trace)
    unit_of = {sequence: number for number, unit in enumerate(units) for sequence in unit}
    per_unit = [Counters(trace.num_layers) for _ in units]
    begun_units: set[int] = set()
    begun: set[int] = set()

    for forward in trace.passes():
        number = unit_of[forward.sequences[0]]
        counters = per_unit[number]
        if reset_between_sequences and number not in begun_units:
            for residency in residencies:
                residency.reset()
        begun_units.add(number)
        if forward.phase >= earliest and not begun.issuperset(forward.sequences):
            for sequence in forward.sequences:
                if sequence not in begun:
                    begun.add(sequence)
                    _prefetch(residencies, counters, prefetch, sequence)
        _serve(residencies, counters, forward)

    whole = reduce(Counters.plus, per_unit, Counters(trace.num_layers))
    return Simulation(whole, per_unit, units, per_layer, name)


def _serve(residencies: list[Residency], counters: Counters, forward: ForwardPass) -> None:
    counters.begin_forward(forward.phase, forward.tokens)
    for layer, (experts, uses) in enumerate(forward.requests):
        plans = tuple(residencies[layer].plans(experts, uses))
        counters.add_plans(layer, experts, uses, plans)
    counters.end_forward()


def _prefetch(
    residencies: list[Residency], counters: Counters, prefetch: Prefetch | None, sequence: int
) -> None:
    if prefetch is None:
        return
    wanted = prefetch.get(sequence) if isinstance(prefetch, Mapping) else prefetch(sequence)
    if wanted is None:
        return
    if len(wanted) != len(residencies):
        raise ValueError(f"a prefetch names {len(wanted)} layers of {len(residencies)}")
    for layer, (residency, experts) in enumerate(zip(residencies, wanted, strict=True)):
        counters.add_prefetch(layer, len(residency.prefetch(experts).loads))


def _slots_of_layers(trace: Trace, slots: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(slots, int | np.integer):
        return (int(slots),) * trace.num_layers
    if len(slots) != trace.num_layers:
        raise ValueError(f"slots are given for {len(slots)} layers of {trace.num_layers}")
    return tuple(slots)


def _policies(
    trace: Trace, policy: str | Callable[[], Policy], options: dict[str, Any]
) -> tuple[list[Callable[[], Policy]], str]:
    """One maker of policies per layer, and the name."""
    if not isinstance(policy, str):
        if options:
            raise ValueError("policy_options belong to a policy given by name")
        return [policy] * trace.num_layers, policy().name
    if policy_class(policy) is Belady:
        futures = trace.layer_requests()
        return [lambda future=future: Belady(future) for future in futures], policy  # type: ignore[misc]
    return [lambda: make_policy(policy, **options)] * trace.num_layers, policy


def _units(trace: Trace) -> list[tuple[int, ...]]:
    """Sequences grouped by shared forward passes, in the order in which the groups begin."""
    rows = np.stack([trace.forward, trace.sequence], axis=1)
    changes = np.flatnonzero(np.any(np.diff(rows, axis=0, prepend=rows[:1] - 1), axis=1))
    group: dict[int, int] = {}

    def find(sequence: int) -> int:
        while group[sequence] != sequence:
            group[sequence] = sequence = group[group[sequence]]
        return sequence

    leader, of_forward = -1, -1
    for forward, sequence in rows[changes].tolist():
        if forward != of_forward:
            leader, of_forward = sequence, forward
        group.setdefault(sequence, sequence)
        group[find(sequence)] = find(leader)
    units: dict[int, list[int]] = {}
    for sequence in group:  # insertion order is the order of first rows
        units.setdefault(find(sequence), []).append(sequence)
    return [tuple(sorted(unit)) for unit in units.values()]


def hit_rate_curve(
    trace: Trace,
    slots: Sequence[int],
    policy: str | Callable[[], Policy] = "lru",
    phase: str | None = "completion",
    **options: Any,
) -> list[float]:
    """
    Hit rate for each number of slots; *options* go to `simulate`.

    Raises:
        MelinoeError: the trace has no use in that phase.
    """
    rates = []
    for count in slots:
        rate = simulate(trace, count, policy, **options).counters.hit_rate(phase)
        if rate is None:
            raise MelinoeError(
                f"the trace has no {phase or 'expert use at all'} to count; record a longer one"
            )
        rates.append(rate)
    return rates
