"""
Simulator: what a trace would have cost with other slots or another policy.

It drives the same `Residency` as the runtime, with the same calls in the same order: forward pass
by forward pass, layer by layer. So its counts are the runtime's, not an estimate of them. Long
traces under a built-in rule go through compiled code that decides the same (`melinoe.cache.kernel`;
tests hold the two equal, count by count).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from melinoe.cache.ahead import Replay, as_prefetcher
from melinoe.cache.counters import PHASES, PROMPT, Counters
from melinoe.cache.locality import popularity
from melinoe.cache.policy import Policy, policy_class, policy_makers
from melinoe.cache.prefetcher import Prefetch, Prefetcher
from melinoe.cache.prefill import StreamedPrefill
from melinoe.cache.requests import ForwardPass
from melinoe.cache.residency import Decision, Residency
from melinoe.cache.simulation import Simulation, Steps
from melinoe.cache.trace import Trace
from melinoe.cache.units import units_of
from melinoe.config import PREFETCH_AT
from melinoe.errors import MelinoeError, TraceError

ENGINES = ("auto", "residency", "compiled")
# Policies that are compiled: a replay of one takes seconds where the others take minutes.
COMPILED_POLICIES = ("lru", "lfu", "lfru", "static", "belady")
# From this many requests on, loading the compiled code (about a second) pays.
COMPILED_FROM = 50_000


def simulate(
    trace: Trace,
    slots: int | Sequence[int],
    policy: str | Callable[[], Policy] = "lru",
    *,
    prefetch: Prefetcher | Prefetch | None = None,
    prefetch_at: str = PREFETCH_AT,
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
        trace: What the model chose.
        slots: Slots of every layer, or of each.
        policy: A known name, or a function that makes a new `Policy` for each layer.
        prefetch: A `Prefetcher`, which says itself when it loads what (`melinoe.prefetch` makes
            them by name). Or a function or mapping from a sequence's number to the experts to
            load per layer, the most wanted first; asked once for each sequence, ascending where a
            batch begins. A mapping may leave some out.
        prefetch_at: Of a function or mapping. ``completion``: before the sequence's first forward
            pass of that phase; ``prompt``: before its first forward pass of all.
        prompts: Token ids of each sequence's prompt, for prefetchers that read them.
        reset_between_sequences: Empty the cache before each unit's first forward pass.
        policy_options: What the named policy takes, such as ``{"gamma": 0.9}`` for ``lfu``.
            ``static`` counts its popularity from this very trace unless one is given here.
        load: How many of a request's missing experts are loaded, if not all of them, as
            `melinoe.cache.misses.loads_when` or ``Handle.load_rule`` say it; the rest is computed
            where it is (`Residency.request_with_host`). They are misses, but no loads.
        steps: Also keep what happened in each forward pass and layer.
        engine: ``residency``: drive the runtime's own class. ``compiled``: the compiled rules, for
            lru, lfu, lfru, static and belady by name. ``auto``: compiled
            where it can and the trace makes 50,000 requests or more, for which loading it pays.
        prefill: Stream prompts by this rule, as the fast engine does; absent, serve them as any
            other request. Not compiled.

    Raises:
        MelinoeError: no such policy, or a layer with no slot or more slots than experts.
        TraceError: the policy needs the router's weights, or the prefetch the next router's
            guesses or the prompts, and they are not there; prompts that are not the trace's.
        ValueError: *slots* or a prefetch does not name every layer; an unknown *prefetch_at* or
            *engine*, or compiled rules or *prefill* where there are none.
    """
    if prefetch_at not in PHASES:
        raise ValueError(f"prefetch_at must be one of {', '.join(PHASES)}, got {prefetch_at!r}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    per_layer = slots_of_layers(trace, slots)
    options = dict(policy_options or {})
    if not isinstance(policy, str):
        if options:
            raise ValueError("policy_options belong to a policy given by name")
        example = policy()
        name, uses_scores = example.name, example.uses_scores
    else:
        cls = policy_class(policy)
        name, uses_scores = policy, cls.uses_scores
        if name == "static":
            options.setdefault("popularity", popularity(trace))
    if uses_scores and trace.scores is None and len(trace):
        raise TraceError(
            f"policy {name!r} needs the router's weights, which the trace does not hold; record "
            "one with scores, or choose lfu with gamma 0.5, the same rule on choices alone"
        )
    prefetcher = as_prefetcher(prefetch, prefetch_at)
    between = prefetcher is not None and prefetcher.between_layers
    if prefill is not None and engine == "compiled":
        raise ValueError("prompts are not streamed by compiled rules; use engine='residency'")
    special = between or load is not None
    if prefill is None and _compiles(engine, policy, special, trace):
        from melinoe.cache.compiled import run

        return run(
            trace, per_layer, name, options, prefetcher, prompts, reset_between_sequences, steps
        )
    makers = _makers(trace, policy, options)
    residencies = [
        Residency(trace.num_experts, capacity, make())
        for capacity, make in zip(per_layer, makers, strict=True)
    ]
    units = units_of(trace)
    unit_of = {sequence: number for number, unit in enumerate(units) for sequence in unit}
    per_unit = [Counters(trace.num_layers) for _ in units]
    begun_units: set[int] = set()
    replay = None
    if prefetcher is not None:
        replay = Replay(prefetcher, trace, per_layer, residencies, prompts)
    record: list[tuple[Any, ...]] = []

    for forward in trace.passes():
        number = unit_of[forward.sequences[0]]
        counters = per_unit[number]
        if number not in begun_units:
            begun_units.add(number)
            for residency in residencies:
                residency.forget_prefetches()
                if reset_between_sequences:
                    residency.reset()
        ahead = [0] * trace.num_layers
        if replay is not None:
            ahead = replay.before_pass(forward, counters)
        rule = prefill if forward.phase == PROMPT else None
        served = _serve(residencies, counters, forward, rule, load, replay)
        if steps:
            distinct = [len(experts) for experts, _ in forward.requests]
            pass_of = (forward.phase, forward.tokens, number)
            record.append((*pass_of, served[0], distinct, ahead, *served[1:]))

    whole = reduce(Counters.plus, per_unit, Counters(trace.num_layers))
    kept = _steps(record, trace.num_layers) if steps else None
    return Simulation(
        whole,
        per_unit,
        units,
        per_layer,
        name,
        "residency",
        kept,
        "none" if prefetcher is None else prefetcher.name,
    )


def _compiles(engine: str, policy: str | Callable[[], Policy], special: bool, trace: Trace) -> bool:
    able = isinstance(policy, str) and policy in COMPILED_POLICIES and not special
    if engine == "compiled" and not able:
        raise ValueError(
            f"compiled rules are {', '.join(COMPILED_POLICIES)} by name, loading all and "
            "prefetching nothing between layers; use engine='residency' for others"
        )
    # Rows, not passes, because counting those takes longer; a prompt's rows are few in a long one.
    large = len(trace) * trace.num_layers >= COMPILED_FROM
    return able and (engine == "compiled" or (engine == "auto" and large))


def _makers(
    trace: Trace, policy: str | Callable[[], Policy], options: dict[str, Any]
) -> Sequence[Callable[[], Policy]]:
    if not isinstance(policy, str):
        return [policy] * trace.num_layers
    if policy_class(policy).offline:
        options["future"] = trace.layer_requests()
    return policy_makers(policy, options, trace.num_layers)


def _serve(
    residencies: Sequence[Residency],
    counters: Counters,
    forward: ForwardPass,
    prefill: StreamedPrefill | None,
    load: Callable[[Sequence[int]], int] | None,
    replay: Replay | None,
) -> tuple[list[int], ...]:
    """Serve one pass; what `Steps` keeps of each layer: loads, and from ``on_host`` on."""
    loads, on_host, on_host_uses = [], [], []
    between = [0] * len(residencies)
    counters.begin_forward(forward.phase, forward.tokens)
    for layer, (experts, uses) in enumerate(forward.requests):
        scores = None if forward.scores is None else forward.scores[layer]
        host: tuple[int, ...] = ()
        if prefill is not None:
            stream = prefill.serve(residencies[layer], experts, uses, scores)
            counters.add_stream(layer, experts, uses, stream)
            loads.append(stream.loads)
            on_host.append(0)
            on_host_uses.append(0)
            if replay is not None:
                replay.streamed(layer, forward)
            continue
        if load is not None:
            one, host = residencies[layer].request_with_host(experts, uses, scores, load=load)
            decisions: tuple[Decision, ...] = (one,)
        elif scores is None:
            decisions = tuple(residencies[layer].request_in_parts(experts, uses))
        else:
            decisions = tuple(residencies[layer].request_in_parts(experts, uses, scores))
        counters.add_decisions(layer, experts, uses, decisions, host)
        loads.append(sum(len(one.loads) for one in decisions))
        on_host.append(len(host))
        of = dict(zip(experts, uses, strict=True)) if host else {}
        on_host_uses.append(sum(of[expert] for expert in host))
        if replay is not None:
            target, early = replay.after_request(layer, forward, counters)
            between[target] += early
    counters.end_forward()
    return loads, on_host, on_host_uses, between


def _steps(record: list[tuple[Any, ...]], num_layers: int) -> Steps:
    columns = list(zip(*record, strict=True)) if record else [()] * 9
    phase, tokens, unit, *by_layer = columns
    shape = (len(record), num_layers)
    return Steps(
        np.array(phase, np.uint8),
        np.array(tokens, np.int64),
        np.array(unit, np.int64),
        *(np.array(rows, np.int32).reshape(shape) for rows in by_layer),
    )


def slots_of_layers(trace: Trace, slots: int | Sequence[int]) -> tuple[int, ...]:
    """
    Slots of each layer of a trace's model.

    Raises:
        ValueError: they are not given for every layer.
    """
    if isinstance(slots, int | np.integer):
        return (int(slots),) * trace.num_layers
    if len(slots) != trace.num_layers:
        raise ValueError(f"slots are given for {len(slots)} layers of {trace.num_layers}")
    return tuple(int(count) for count in slots)


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
