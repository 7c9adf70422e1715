"""From a trace to the compiled replay and back: arrays in, the simulator's own structures out."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from melinoe.cache.counters import Counters
from melinoe.cache.policy import policy_class
from melinoe.cache.residency import Residency, check_capacity
from melinoe.cache.simulation import Prefetch, Simulation, Steps, wanted_by
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.cache.units import units_of


def run(
    trace: Trace,
    slots: Sequence[int],
    policy: str,
    options: Mapping[str, Any],
    prefetch: Prefetch | None,
    earliest: int,
    reset_between_sequences: bool,
    steps: bool,
) -> Simulation:
    """
    Do what `melinoe.cache.simulator.simulate` does, with compiled rules.

    Args:
        trace, policy, prefetch, reset_between_sequences, steps: As there.
        slots: Of each layer.
        options: What the policy takes; ``static`` needs its popularity.
        earliest: Phase of the passes that a prefetch may come before.

    Raises:
        MelinoeError, ValueError: as there.
    """
    from melinoe.cache import kernel

    for capacity in slots:
        check_capacity(trace.num_experts, capacity)
    gamma, popular = settings_of(trace, policy, options)
    bounds, phase = passes_of(trace)
    passes, layers = len(phase), trace.num_layers
    units = units_of(trace)
    unit_of_sequence = np.zeros(trace.num_sequences, np.int64)
    for number, unit in enumerate(units):
        unit_of_sequence[list(unit)] = number
    unit = unit_of_sequence[trace.sequence[bounds[:-1]]]
    resets = np.zeros(passes, bool)
    if reset_between_sequences:
        resets[np.unique(unit, return_index=True)[1]] = True
    events = _events(trace, bounds, phase, prefetch, earliest)

    counts = np.zeros((len(units), 2, 5, layers), np.int64)
    prefetched = np.zeros((len(units), layers), np.int64)
    waited = np.zeros(passes, np.int64)
    details = [np.zeros((passes if steps else 0, layers), np.int32) for _ in range(3)]
    if passes:
        kernel.replay(
            trace.experts,
            bounds,
            phase,
            unit,
            resets,
            np.array(slots, np.int64),
            trace.num_experts,
            kernel.RULES[policy],
            gamma,
            popular,
            *events,
            counts,
            prefetched,
            waited,
            *details,
        )
    tokens = np.diff(bounds)
    per_unit = _counters(counts, prefetched, waited, tokens, phase, unit)
    whole = reduce(Counters.plus, per_unit, Counters(layers)) if len(per_unit) < 64 else None
    if whole is None:  # adding thousands one by one takes longer than replaying them
        one = np.zeros(passes, np.int64)
        (whole,) = _counters(
            counts.sum(0)[None], prefetched.sum(0)[None], waited, tokens, phase, one
        )
    loads, experts, ahead = details
    nowhere = np.zeros_like(loads)  # compiled rules load all that is missing
    kept = Steps(phase, tokens, unit, loads, experts, ahead, nowhere) if steps else None
    return Simulation(whole, per_unit, units, tuple(slots), policy, False, "compiled", kept)


def passes_of(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of each forward pass begin, int64 (passes + 1,), and its phase, uint8."""
    if not len(trace):
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    starts = np.flatnonzero(np.diff(trace.forward, prepend=trace.forward[0] - 1))
    prompts = np.logical_or.reduceat(trace.kind == PROMPT_ROW, starts)
    completions = np.logical_or.reduceat(trace.kind == COMPLETION_ROW, starts)
    return np.append(starts, len(trace)), (completions & ~prompts).astype(np.uint8)


def settings_of(trace: Trace, policy: str, options: Mapping[str, Any]) -> tuple[float, np.ndarray]:
    """Decay and popularity as the kernel takes them; refuses what the class would."""
    shape = (trace.num_layers, trace.num_experts)
    if policy == "static":
        rows = np.asarray(options["popularity"], np.float64)
        for layer in range(trace.num_layers):
            policy_class(policy).for_layer(layer, trace.num_layers, **options).reset(
                trace.num_experts
            )
        return 1.0, rows.reshape(shape)
    cls = policy_class(policy)
    made = cls.for_layer(0, 1, future=[[]]) if cls.offline else cls.for_layer(0, 1, **options)
    return float(getattr(made, "gamma", 1.0)), np.zeros(shape)


def _events(
    trace: Trace, bounds: np.ndarray, phase: np.ndarray, prefetch: Prefetch | None, earliest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Before which pass each prefetch comes, and the ids of each by layer."""
    layers = trace.num_layers
    when: list[int] = []
    begin = [0]
    ids: list[int] = []
    if prefetch is not None:
        check = Residency(trace.num_experts, 1).check
        owner = np.repeat(np.arange(len(phase)), np.diff(bounds))
        rows = np.flatnonzero(phase[owner] >= earliest)
        # A sequence's first row of such a pass; sorted by pass, then by sequence.
        sequences, first = np.unique(trace.sequence[rows], return_index=True)
        order = np.lexsort((sequences, owner[rows[first]]))
        for sequence, step in zip(
            sequences[order].tolist(), owner[rows[first]][order].tolist(), strict=True
        ):
            wanted = wanted_by(prefetch, sequence, layers)
            if wanted is None:
                continue
            when.append(step)
            for experts in wanted:
                check(np.asarray(experts).tolist())
                ids.extend(experts)
                begin.append(len(ids))
    return (
        np.array(when, np.int64),
        np.array(begin, np.int64),
        np.array(ids, np.int64).reshape(-1),
    )


def _counters(
    counts: np.ndarray,
    prefetched: np.ndarray,
    waited: np.ndarray,
    tokens: np.ndarray,
    phase: np.ndarray,
    unit: np.ndarray,
) -> list[Counters]:
    units, _, _, layers = counts.shape
    cell = unit * 2 + phase
    free = waited == 0

    def total(weights: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> list[list[int]]:
        sums = np.bincount(cell[chosen], weights=weights[chosen], minlength=2 * units)
        return sums.astype(np.int64).reshape(units, 2).tolist()

    ones = np.ones(len(phase))
    per_phase = (total(tokens), total(ones), total(ones, free), total(tokens, free))
    per_layer = counts.transpose(0, 2, 1, 3).tolist()
    names = ("uses", "hits", "loads", "requests", "chunked")
    return [
        Counters.from_dict(
            {
                "num_layers": layers,
                **dict(zip(names, per_layer[number], strict=True)),
                "prefetch_loads": prefetched[number].tolist(),
                "tokens": per_phase[0][number],
                "forwards": per_phase[1][number],
                "zero_miss_forwards": per_phase[2][number],
                "zero_miss_tokens": per_phase[3][number],
            }
        )
        for number in range(units)
    ]
