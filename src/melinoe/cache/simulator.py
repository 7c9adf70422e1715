"""
Simulate a trace's cost with other slots or another policy.

It drives the engines' own `Residency` by the same calls, so its counts are theirs. Long traces
under a built-in policy go through compiled code that decides the same (`melinoe.cache.kernel`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from melinoe.cache import DEFAULT_POLICY
from melinoe.cache.counters import COMPLETION, PROMPT, Counters
from melinoe.cache.locality import popularity
from melinoe.cache.policy import COMPILED_POLICIES, Policy, policy_class, policy_makers
from melinoe.cache.prefetch import Prefetcher, Prompt, load_ahead
from melinoe.cache.residency import Decision, Residency, StreamedPrefill, check_capacity
from melinoe.cache.trace import PROMPT_ROW, ForwardPass, Trace
from melinoe.errors import TraceError

ENGINES = ("auto", "residency", "compiled")
# From this many requests on, loading the compiled code (about a second) pays.
COMPILED_FROM = 50_000


@dataclass(frozen=True)
class Steps:
    """Loads by forward pass and layer, for a time model: int32 (passes, layers) from *loads* on."""

    phase: np.ndarray  # uint8 (passes,), 0 prompt, 1 completion
    tokens: np.ndarray  # int64 (passes,), rows
    unit: np.ndarray  # int64 (passes,), index into `Simulation.sequences`
    loads: np.ndarray  # experts copied on demand
    experts: np.ndarray  # distinct experts requested
    ahead: np.ndarray  # experts copied by prefetches right before the pass
    on_host: np.ndarray  # missing experts that the host computed
    on_host_uses: np.ndarray  # (token, choice) pairs that those were computed for


@dataclass(frozen=True)
class Simulation:
    """The outcome of `simulate`."""

    counters: Counters
    per_sequence: list[Counters]  # by unit (`Trace.units`); they add up to *counters*
    sequences: list[tuple[int, ...]]  # the sequence numbers of each unit, ascending
    slots: tuple[int, ...]  # of each layer
    policy: str
    engine: str = "residency"
    steps: Steps | None = None
    prefetch: str = "none"


def simulate(
    trace: Trace,
    slots: int | Sequence[int],
    policy: str | Callable[[], Policy] = DEFAULT_POLICY,
    *,
    prefetch: Prefetcher | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    reset_between_sequences: bool = False,
    policy_options: Mapping[str, Any] | None = None,
    load: Callable[[Sequence[int]], int] | None = None,
    steps: bool = False,
    engine: str = "auto",
    prefill: StreamedPrefill | None = None,
) -> Simulation:
    """
    Replay a trace through a cache.

    Args:
        slots: Slots of every layer, or of each.
        policy: A known name, or a function that makes a new `Policy` for each layer.
        prefetch: Says what is loaded ahead; *prompts* are token ids, for those that read them.
        reset_between_sequences: Empty the cache before each unit's first forward pass.
        policy_options: Arguments of the named policy, such as ``{"gamma": 0.9}``. ``static`` counts
            its popularity from this very trace unless one is given here.
        load: How many of a request's missing experts are loaded
            (`melinoe.cache.timing.loads_when`); the host computes the rest.
        steps: Also keep what happened in each forward pass and layer.
        engine: ``residency``, the engines' own class; ``compiled``, for `COMPILED_POLICIES` by name
            and nothing but loads on demand; ``auto``, compiled where that can be and pays.
        prefill: Stream prompts by this rule; absent, serve them as any other request.

    Raises:
        MelinoeError: no such policy, or a layer with no slot or more slots than experts.
        TraceError: prompts that the prefetch needs are not there, or not the trace's.
        ValueError: *slots* or a prefetch does not name every layer; no such *engine* here.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    per_layer = slots_of_layers(trace, slots)
    options = dict(policy_options or {})
    makers: Sequence[Callable[[], Policy]]
    if isinstance(policy, str):
        name = policy
        if name == "static":
            options.setdefault("popularity", popularity(trace))
    else:
        if options:
            raise ValueError("policy_options belong to a policy given by name")
        makers, name = [policy] * trace.num_layers, policy().name
    able = isinstance(policy, str) and policy in COMPILED_POLICIES
    able = able and prefetch is None and load is None and prefill is None
    if engine == "compiled" and not able:
        raise ValueError(
            f"compiled rules are {', '.join(COMPILED_POLICIES)} by name, loading all that is "
            "missing and nothing ahead; use engine='residency' for others"
        )
    # Rows, not passes, because counting those takes longer; a prompt's rows are few in a long one.
    large = len(trace) * trace.num_layers >= COMPILED_FROM
    if able and (engine == "compiled" or (engine == "auto" and large)):
        return _compiled(trace, per_layer, name, options, reset_between_sequences, steps)

    if isinstance(policy, str):
        if policy_class(policy).offline:
            by_pass = [[experts for experts, _ in one.requests] for one in trace.passes()]
            options["future"] = list(zip(*by_pass, strict=True)) or [()] * trace.num_layers
        makers = policy_makers(policy, options, trace.num_layers)
    residencies = [
        Residency(trace.num_experts, capacity, make())
        for capacity, make in zip(per_layer, makers, strict=True)
    ]
    if prefetch is not None and prefetch.uses_ids and prompts is None:
        raise TraceError(
            f"prefetch {prefetch.name!r} reads prompts, which a trace does not hold; give the "
            "prompts that it was recorded from"
        )
    if prompts is not None:
        check_prompts(trace, prompts)
    units, owner, begins = trace.unit_of_passes()
    per_unit = [Counters(trace.num_layers) for _ in units]
    record: list[tuple[Any, ...]] = []
    decoding: set[int] = set()  # sequences whose completion has begun
    for forward, unit, first in zip(trace.passes(), owner.tolist(), begins, strict=True):
        if first and reset_between_sequences:
            for residency in residencies:
                residency.reset()
        ahead = np.zeros(trace.num_layers, np.int64)
        if prefetch is not None and forward.phase == COMPLETION:
            for sequence in forward.sequences:
                if sequence not in decoding:
                    decoding.add(sequence)
                    prompt = _prompt(trace, sequence, per_layer, prompts)
                    ahead += load_ahead(prefetch, prompt, lambda layer, experts: len(
                        residencies[layer].prefetch(experts).loads
                    ))  # fmt: skip
        for layer, count in enumerate(ahead.tolist()):
            per_unit[unit].add_prefetch(layer, count)
        served = _serve(forward, residencies, per_unit[unit], load, prefill)
        if steps:
            rows = forward.rows.stop - forward.rows.start
            record.append((forward.phase, rows, unit, ahead, *served))
    return Simulation(
        reduce(Counters.plus, per_unit, Counters(trace.num_layers)),
        per_unit,
        units,
        per_layer,
        name,
        "residency",
        _steps(record, trace.num_layers) if steps else None,
        "none" if prefetch is None else prefetch.name,
    )


def _steps(record: list[tuple[Any, ...]], num_layers: int) -> Steps:
    phase, tokens, unit, ahead, *served = zip(*record, strict=True) if record else [()] * 8
    loads, experts, on_host, on_host_uses = (
        np.array(rows, np.int32).reshape(len(record), num_layers) for rows in served
    )
    return Steps(
        np.array(phase, np.uint8), np.array(tokens, np.int64), np.array(unit, np.int64),
        loads, experts, np.array(ahead, np.int32).reshape(loads.shape), on_host, on_host_uses,
    )  # fmt: skip


def _serve(
    forward: ForwardPass,
    residencies: Sequence[Residency],
    counters: Counters,
    load: Callable[[Sequence[int]], int] | None,
    prefill: StreamedPrefill | None,
) -> tuple[list[int], ...]:
    """Serve one pass as the engines do; by layer loads, experts, those on the host, their uses."""
    loads, on_host, on_host_uses = ([0] * len(residencies) for _ in range(3))
    counters.begin_forward(forward.phase, forward.rows.stop - forward.rows.start)
    for layer, (experts, uses) in enumerate(forward.requests):
        residency = residencies[layer]
        if prefill is not None and forward.phase == PROMPT:
            stream = prefill.serve(residency, experts, uses)
            counters.add_stream(layer, experts, uses, stream)
            loads[layer] = stream.loads
            continue
        host: tuple[int, ...] = ()
        decisions: list[Decision]
        if load is not None:
            one, host = residency.request_with_host(experts, uses, load=load)
            decisions = [one]
        else:
            decisions = list(residency.request_in_parts(experts, uses))
        counters.add_decisions(layer, experts, uses, decisions, host)
        loads[layer] = sum(len(one.loads) for one in decisions)
        if host:
            of = dict(zip(experts, uses, strict=True))
            on_host[layer], on_host_uses[layer] = len(host), sum(of[expert] for expert in host)
    counters.end_forward()
    return loads, [len(experts) for experts, _ in forward.requests], on_host, on_host_uses


def _prompt(
    trace: Trace, sequence: int, slots: tuple[int, ...], prompts: Sequence[Sequence[int]] | None
) -> Prompt:
    """A sequence of the trace, once its prompt was read."""
    layers, experts = trace.num_layers, trace.num_experts
    chosen = trace.prompt(sequence).astype(np.int64)
    cells = (np.arange(layers)[:, None] * experts + chosen)[chosen >= 0]
    uses = np.bincount(cells, minlength=layers * experts).reshape(layers, experts)
    ids = None if prompts is None else tuple(map(int, prompts[sequence]))
    return Prompt(slots, experts, ids, uses, sequence)


def slots_of_layers(trace: Trace, slots: int | Sequence[int]) -> tuple[int, ...]:
    """Slots of each layer of a trace's model; ValueError if not given for every layer."""
    if isinstance(slots, int | np.integer):
        return (int(slots),) * trace.num_layers
    if len(slots) != trace.num_layers:
        raise ValueError(f"slots are given for {len(slots)} layers of {trace.num_layers}")
    return tuple(int(count) for count in slots)


# --- compiled -------------------------------------------------------------------------------------


def _compiled(
    trace: Trace,
    slots: tuple[int, ...],
    policy: str,
    options: Mapping[str, Any],
    reset_between_sequences: bool,
    steps: bool,
) -> Simulation:
    """Simulate by `melinoe.cache.kernel`."""
    from melinoe.cache.kernel import Prepared

    for capacity in slots:
        check_capacity(trace.num_experts, capacity)
    ready = Prepared(trace, policy, options, reset_between_sequences)
    counts, waited, loads, experts = ready.replay(slots, steps)
    free = waited == 0
    cell, cells = 2 * ready.unit + ready.phase, 2 * len(ready.units)
    per_phase = {
        name: np.bincount(cell, weights, cells).astype(np.int64).reshape(-1, 2)
        for name, weights in (
            ("tokens", ready.tokens),
            ("forwards", np.ones_like(ready.tokens)),
            ("zero_miss_forwards", free),
            ("zero_miss_tokens", free * ready.tokens),
        )
    }
    names = ("uses", "hits", "loads", "requests", "chunked")
    by_layer = {name: counts[:, :, at] for at, name in enumerate(names)}
    nothing = Counters(trace.num_layers).to_dict()
    found = {**by_layer, **per_phase}
    per_unit = [
        Counters.from_dict(nothing | {name: values[unit] for name, values in found.items()})
        for unit in range(len(ready.units))
    ]
    whole = Counters.from_dict(nothing | {name: values.sum(0) for name, values in found.items()})
    absent = (np.zeros_like(loads),) * 3
    kept = Steps(ready.phase, ready.tokens, ready.unit, loads, experts, *absent) if steps else None
    return Simulation(whole, per_unit, ready.units, slots, policy, "compiled", kept)


def check_prompts(trace: Trace, prompts: Sequence[Sequence[int]]) -> None:
    """Check that there is a prompt for each sequence of a trace, as long as its rows."""
    way_out = "give the prompts that it was recorded from, in their order"
    if len(prompts) != trace.num_sequences:
        raise TraceError(
            f"the trace has {trace.num_sequences} sequences but {len(prompts)} prompts were given; "
            f"{way_out}"
        )
    rows = np.bincount(trace.sequence[trace.kind == PROMPT_ROW], minlength=len(prompts)).tolist()
    for index, (prompt, count) in enumerate(zip(prompts, rows, strict=True)):
        if len(prompt) != count:
            raise TraceError(
                f"sequence {index} of the trace has {count} prompt tokens but its prompt has "
                f"{len(prompt)}; {way_out}"
            )
