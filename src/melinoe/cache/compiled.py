"""From a trace to the compiled replay and back: arrays in, the simulator's own structures out."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from melinoe.cache.ahead import Prompts, check_prefetcher
from melinoe.cache.counters import COMPLETION, PROMPT, Counters
from melinoe.cache.loads_ahead import check_layers
from melinoe.cache.policy import policy_class
from melinoe.cache.prefetcher import Prefetcher
from melinoe.cache.residency import Residency
from melinoe.cache.simulation import Simulation, Steps
from melinoe.cache.slots import check_capacity
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.cache.units import units_of


def run(
    trace: Trace,
    slots: Sequence[int],
    policy: str,
    options: Mapping[str, Any],
    prefetcher: Prefetcher | None,
    prompts: Sequence[Sequence[int]] | None,
    reset_between_sequences: bool,
    steps: bool,
) -> Simulation:
    """
    Do what `melinoe.cache.simulator.simulate` does, with compiled rules.

    Args:
        trace, policy, prompts, reset_between_sequences, steps: As there.
        slots: Of each layer.
        options: What the policy takes; ``static`` needs its popularity.
        prefetcher: Says nothing between layers.

    Raises:
        MelinoeError, TraceError, ValueError: as there.
    """
    from melinoe.cache import kernel

    for capacity in slots:
        check_capacity(trace.num_experts, capacity)
    gamma, popular = settings_of(trace, policy, options)
    bounds, phase = passes_of(trace)
    passes, layers = len(phase), trace.num_layers
    units, unit, begins = owners_of(trace, bounds)
    resets = begins if reset_between_sequences else np.zeros(passes, bool)
    events = _events(trace, slots, bounds, phase, prefetcher, prompts)

    counts = np.zeros((len(units), 2, 6, layers), np.int64)
    prefetched = np.zeros((len(units), layers), np.int64)
    waited = np.zeros(passes, np.int64)
    details = [np.zeros((passes if steps else 0, layers), np.int32) for _ in range(3)]
    if passes:
        kernel.replay(
            trace.experts,
            bounds,
            phase,
            unit,
            begins,
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
    rest = (nowhere, nowhere, nowhere)
    kept = Steps(phase, tokens, unit, loads, experts, ahead, *rest) if steps else None
    used = "none" if prefetcher is None else prefetcher.name
    return Simulation(whole, per_unit, units, tuple(slots), policy, "compiled", kept, used)


def passes_of(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of each forward pass begin, int64 (passes + 1,), and its phase, uint8."""
    if not len(trace):
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    starts = np.flatnonzero(np.diff(trace.forward, prepend=trace.forward[0] - 1))
    prompts = np.logical_or.reduceat(trace.kind == PROMPT_ROW, starts)
    completions = np.logical_or.reduceat(trace.kind == COMPLETION_ROW, starts)
    return np.append(starts, len(trace)), (completions & ~prompts).astype(np.uint8)


def owners_of(
    trace: Trace, bounds: np.ndarray
) -> tuple[list[tuple[int, ...]], np.ndarray, np.ndarray]:
    """
    Find whose each forward pass is.

    Returns:
        The units; of each pass its unit, int64 (passes,); and whether it is that unit's first,
        bool (passes,).
    """
    units = units_of(trace)
    unit_of_sequence = np.zeros(trace.num_sequences, np.int64)
    for number, unit in enumerate(units):
        unit_of_sequence[list(unit)] = number
    owner = unit_of_sequence[trace.sequence[bounds[:-1]]]
    begins = np.zeros(len(owner), bool)
    begins[np.unique(owner, return_index=True)[1]] = True
    return units, owner, begins


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
    trace: Trace,
    slots: Sequence[int],
    bounds: np.ndarray,
    phase: np.ndarray,
    prefetcher: Prefetcher | None,
    prompts: Sequence[Sequence[int]] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Before which pass each prefetch comes, and the ids of each by layer."""
    when: list[int] = []
    begin = [0]
    ids: list[int] = []
    if prefetcher is not None:
        check_prefetcher(prefetcher, trace, prompts)
        known = Prompts(trace, slots, prompts)
        check = Residency(trace.num_experts, 1).check
        asked: list[tuple[int, int, int]] = []  # pass, moment, sequence
        for moment in (PROMPT, COMPLETION):
            # A sequence's first row of any pass, or of one of the completion.
            owner = np.repeat(np.arange(len(phase)), np.diff(bounds))
            rows = np.flatnonzero(phase[owner] >= moment)
            sequences, first = np.unique(trace.sequence[rows], return_index=True)
            steps = owner[rows[first]].tolist()
            asked += zip(steps, [moment] * len(steps), sequences.tolist(), strict=True)
        for step, moment, sequence in sorted(asked):
            wanted = (
                prefetcher.before_prompt(known.before(sequence))
                if moment == PROMPT
                else prefetcher.before_completion(known.after(sequence))
            )
            if wanted is None:
                continue
            check_layers(wanted, trace.num_layers)
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
    names = ("uses", "hits", "loads", "requests", "chunked", "prefetch_used")
    return [
        Counters.from_dict(
            {
                "num_layers": layers,
                **dict(zip(names, per_layer[number], strict=True)),
                "on_host": [[0] * layers] * 2,  # `_compiles` leaves partly loaded misses out
                "prefetch_loads": prefetched[number].tolist(),
                "tokens": per_phase[0][number],
                "forwards": per_phase[1][number],
                "zero_miss_forwards": per_phase[2][number],
                "zero_miss_tokens": per_phase[3][number],
            }
        )
        for number in range(units)
    ]
