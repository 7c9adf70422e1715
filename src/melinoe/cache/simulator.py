"""
Simulate a trace's cost with other slots or another policy.

It drives the same `Residency` as the runtime, with the same calls in the same order: forward pass
by forward pass, layer by layer. So its counts are the runtime's, not an estimate of them. Long
traces under a built-in policy go through compiled code that decides the same
(`melinoe.cache.kernel`; tests hold the two equal, count by count). Prefetches, prompts that are
streamed and misses that the host computes are replayed request by request.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from melinoe.cache import PREFETCH_AT
from melinoe.cache.ahead import LoadsAhead, Route
from melinoe.cache.counters import COMPLETION, PHASES, PROMPT, Counters
from melinoe.cache.locality import popularity
from melinoe.cache.policy import COMPILED_POLICIES, Policy, policy_class, policy_makers
from melinoe.cache.prefetch import MOST_ROWS, Listed, Prefetch, Prefetcher, Prompt
from melinoe.cache.requests import ForwardPass
from melinoe.cache.residency import Decision, Residency, StreamedPrefill, check_capacity
from melinoe.cache.trace import PROMPT_ROW, Trace
from melinoe.errors import TraceError

ENGINES = ("auto", "residency", "compiled")
# From this many requests on, loading the compiled code (about a second) pays.
COMPILED_FROM = 50_000


@dataclass(frozen=True)
class Steps:
    """
    Loads of each forward pass and layer, for a time model.

    Attributes:
        phase: uint8 (passes,), 0 prompt, 1 completion.
        tokens: int64 (passes,), rows.
        unit: int64 (passes,), index into `Simulation.sequences`.
        loads: int32 (passes, layers), experts copied on demand.
        experts: int32 (passes, layers), distinct experts requested.
        ahead: int32 (passes, layers), experts copied by prefetches right before the pass.
        on_host: int32 (passes, layers), missing experts that the host computed.
        on_host_uses: int32 (passes, layers), (token, choice) pairs that those were computed for.
        between: int32 (passes, layers), experts of the layer copied by a prefetch that was issued
            within the pass, when the layer reached before it had its experts and began to compute.
    """

    phase: np.ndarray
    tokens: np.ndarray
    unit: np.ndarray
    loads: np.ndarray
    experts: np.ndarray
    ahead: np.ndarray
    on_host: np.ndarray
    on_host_uses: np.ndarray
    between: np.ndarray


@dataclass(frozen=True)
class Simulation:
    """
    The outcome of `simulate`.

    Attributes:
        counters: The whole trace.
        per_sequence: The same by unit (`Trace.units`); they add up to *counters*.
        sequences: The sequence numbers of each unit, ascending.
        slots: Slots of each layer.
        policy: Its name.
        engine: ``residency`` or ``compiled``.
        steps: Pass by pass, if that was asked for.
        prefetch: Name of the prefetcher; ``none`` without one.
    """

    counters: Counters
    per_sequence: list[Counters]
    sequences: list[tuple[int, ...]]
    slots: tuple[int, ...]
    policy: str
    engine: str = "residency"
    steps: Steps | None = None
    prefetch: str = "none"


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
        trace: The model's choices.
        slots: Slots of every layer, or of each.
        policy: A known name, or a function that makes a new `Policy` for each layer.
        prefetch: A `Prefetcher`, which says itself when it loads what
            (`melinoe.cache.prefetch.prefetcher` makes them by name). Or a function or mapping from
            a sequence's number to the experts to load per layer, the most wanted first; asked once
            for each sequence, ascending where a batch begins. A mapping may leave some out.
        prefetch_at: Of a function or mapping. ``completion``: before the sequence's first forward
            pass of that phase; ``prompt``: before its first forward pass of all.
        prompts: Token ids of each sequence's prompt, for prefetchers that read them.
        reset_between_sequences: Empty the cache before each unit's first forward pass.
        policy_options: Arguments of the named policy, such as ``{"gamma": 0.9}`` for ``lfu``.
            ``static`` counts its popularity from this very trace unless one is given here.
        load: How many of a request's missing experts are loaded, if not all of them, as
            `melinoe.cache.timing.loads_when` or ``Handle.load_rule`` say it; the host computes the
            rest (`Residency.request_with_host`). They are misses, but no loads.
        steps: Also keep what happened in each forward pass and layer.
        engine: ``residency``: drive the runtime's own class. ``compiled``: the compiled replay,
            for lru, lfu, lfru, static and belady by name and nothing but loads on demand.
            ``auto``: compiled where that can be and the trace makes 50,000 requests or more, for
            which loading it pays.
        prefill: Stream prompts by this rule, as the fast engine does; absent, serve them as any
            other request.

    Raises:
        MelinoeError: no such policy, or a layer with no slot or more slots than experts.
        TraceError: the policy needs the router's weights, or the prefetch the next router's
            guesses or the prompts, and they are not there; prompts that are not the trace's.
        ValueError: *slots* or a prefetch does not name every layer; an unknown *prefetch_at* or
            *engine*; or the compiled replay is asked for where it cannot be.
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
        name, uses_scores = policy, policy_class(policy).uses_scores
        if name == "static":
            options.setdefault("popularity", popularity(trace))
    if uses_scores and trace.scores is None and len(trace):
        raise TraceError(
            f"policy {name!r} needs the router's weights, which the trace does not hold; record "
            "one with scores, or choose lfu with gamma 0.5, the same rule on choices alone"
        )
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

    makers: Sequence[Callable[[], Policy]] = [policy] * trace.num_layers  # type: ignore[list-item]
    if isinstance(policy, str):
        if policy_class(policy).offline:
            options["future"] = trace.layer_requests()
        makers = policy_makers(policy, options, trace.num_layers)
    residencies = [
        Residency(trace.num_experts, capacity, make())
        for capacity, make in zip(per_layer, makers, strict=True)
    ]
    replay = _Replay(residencies, load, prefill)
    if prefetch is not None:
        one = prefetch if isinstance(prefetch, Prefetcher) else Listed(prefetch, prefetch_at)
        replay.prefetch_by(one, trace, prompts)
    units = trace.units()
    unit_of = {sequence: number for number, unit in enumerate(units) for sequence in unit}
    per_unit = [Counters(trace.num_layers) for _ in units]
    begun: set[int] = set()
    record: list[tuple[Any, ...]] = []
    for forward in trace.passes():
        number = unit_of[forward.sequences[0]]
        if number not in begun:
            begun.add(number)
            for residency in residencies:
                residency.forget_prefetches()
                if reset_between_sequences:
                    residency.reset()
        by_layer = replay.serve(forward, per_unit[number])
        if steps:
            record.append((forward.phase, forward.tokens, number, *by_layer))
    return Simulation(
        reduce(Counters.plus, per_unit, Counters(trace.num_layers)),
        per_unit,
        units,
        per_layer,
        name,
        "residency",
        _steps(record, trace.num_layers) if steps else None,
        "none" if replay.ahead is None else replay.ahead.prefetcher.name,
    )


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
    passes = (waited, ready.tokens, ready.phase)
    per_unit = _counters(counts, *passes, ready.unit)
    (whole,) = _counters(counts.sum(0, keepdims=True), *passes, np.zeros_like(ready.unit))
    nothing = (np.zeros_like(loads),) * 4
    kept = Steps(ready.phase, ready.tokens, ready.unit, loads, experts, *nothing) if steps else None
    return Simulation(whole, per_unit, ready.units, slots, policy, "compiled", kept)


def _counters(
    counts: np.ndarray, waited: np.ndarray, tokens: np.ndarray, phase: np.ndarray, unit: np.ndarray
) -> list[Counters]:
    """Counters of each unit, from what the compiled replay counted."""
    units, _, _, layers = counts.shape
    free = waited == 0
    cell = 2 * unit + phase
    per_phase = [
        np.bincount(cell, weights, 2 * units).astype(np.int64).reshape(units, 2).tolist()
        for weights in (tokens, np.ones_like(tokens), free, free * tokens)
    ]
    names = ("uses", "hits", "loads", "requests", "chunked")
    nothing = Counters(layers).to_dict()
    return [
        Counters.from_dict(
            nothing
            | dict(zip(names, counts[number].transpose(1, 0, 2).tolist(), strict=True))
            | {
                name: per_phase[at][number]
                for at, name in enumerate(
                    ("tokens", "forwards", "zero_miss_forwards", "zero_miss_tokens")
                )
            }
        )
        for number in range(units)
    ]


# --- request by request ---------------------------------------------------------------------------


class _Replay:
    """Serves forward passes from the residencies of all layers, as the runtime does."""

    def __init__(
        self,
        residencies: Sequence[Residency],
        load: Callable[[Sequence[int]], int] | None,
        prefill: StreamedPrefill | None,
    ) -> None:
        self._residencies, self._load, self._prefill = residencies, load, prefill
        self._route = Route(len(residencies))
        self._begun: tuple[set[int], set[int]] = (set(), set())
        self.ahead: LoadsAhead | None = None

    def prefetch_by(
        self, prefetcher: Prefetcher, trace: Trace, ids: Sequence[Sequence[int]] | None
    ) -> None:
        """
        Ask a prefetcher at its moments.

        Raises:
            TraceError: the trace, or what was given with it, does not tell what it asks for.
        """
        if prefetcher.uses_guesses and trace.guesses is None and len(trace):
            raise TraceError(
                f"prefetch {prefetcher.name!r} needs the guesses of the next layer's router, which "
                "the trace does not hold; record one with guesses"
            )
        if prefetcher.uses_ids and ids is None:
            raise TraceError(
                f"prefetch {prefetcher.name!r} reads prompts, which a trace does not hold; give "
                "the prompts that it was recorded from"
            )
        self._prompts = _Prompts(trace, [one.capacity for one in self._residencies], ids)
        self.ahead = LoadsAhead(
            prefetcher,
            self._route,
            len(self._residencies),
            lambda layer, experts, spare: len(
                self._residencies[layer].prefetch(experts, spare).loads
            ),
        )

    def serve(self, forward: ForwardPass, counters: Counters) -> tuple[list[int], ...]:
        """Serve one pass; returns what `Steps` keeps of each layer, from ``loads`` on."""
        layers = len(self._residencies)
        loads, on_host, on_host_uses, between = ([0] * layers for _ in range(4))
        ahead = self._before_pass(forward, counters)
        stream = self._prefill if forward.phase == PROMPT else None
        counters.begin_forward(forward.phase, forward.tokens)
        for layer, (experts, uses) in enumerate(forward.requests):
            residency = self._residencies[layer]
            scores = None if forward.scores is None else forward.scores[layer]
            if stream is not None:
                done = stream.serve(residency, experts, uses, scores)
                counters.add_stream(layer, experts, uses, done)
                loads[layer] = done.loads
            else:
                host: tuple[int, ...] = ()
                decisions: tuple[Decision, ...]
                if self._load is not None:
                    one, host = residency.request_with_host(experts, uses, scores, load=self._load)
                    decisions = (one,)
                else:
                    decisions = tuple(residency.request_in_parts(experts, uses, scores))
                counters.add_decisions(layer, experts, uses, decisions, host)
                loads[layer] = sum(len(one.loads) for one in decisions)
                if host:
                    of = dict(zip(experts, uses, strict=True))
                    on_host[layer] = len(host)
                    on_host_uses[layer] = sum(of[expert] for expert in host)
            if self.ahead is not None and experts:
                self._route.reached(layer)
                self.ahead.requested(layer)
                if stream is None:
                    self._between_layers(layer, forward, counters, between)
        counters.end_forward()
        distinct = [len(experts) for experts, _ in forward.requests]
        return loads, distinct, ahead, on_host, on_host_uses, between

    def _before_pass(self, forward: ForwardPass, counters: Counters) -> list[int]:
        """Prefetch right before a pass; returns how many loads of each layer that takes."""
        total = np.zeros(len(self._residencies), np.int64)
        if self.ahead is not None:
            self._route.end_pass()
            for sequence in self._new(forward, PROMPT):
                total += self.ahead.before_prompt(self._prompts.before(sequence))
            if forward.phase == COMPLETION:
                for sequence in self._new(forward, COMPLETION):
                    total += self.ahead.before_completion(self._prompts.after(sequence))
        loads = total.tolist()
        for layer, count in enumerate(loads):
            counters.add_prefetch(layer, count)
        return loads

    def _between_layers(
        self, layer: int, forward: ForwardPass, counters: Counters, between: list[int]
    ) -> None:
        """Prefetch for the layer that comes next, once *layer* has its experts."""
        assert self.ahead is not None
        if (
            not self.ahead.prefetcher.between_layers
            or forward.phase != COMPLETION
            or forward.tokens > MOST_ROWS
        ):
            return
        target = self._route.after(layer)
        if target is not None:
            guess = [] if forward.guesses is None else forward.guesses[target]
            loads = self.ahead.after_router(layer, forward.requests[layer][0], guess)
            counters.add_prefetch(target, loads)
            between[target] += loads

    def _new(self, forward: ForwardPass, phase: int) -> Iterator[int]:
        """Sequences of a pass that are seen for the first time, in that phase."""
        begun = self._begun[phase]
        for sequence in forward.sequences:
            if sequence not in begun:
                begun.add(sequence)
                yield sequence


class _Prompts:
    """
    Describe the sequences of a trace to a prefetcher.

    Args:
        trace: Replayed.
        slots: Of each layer.
        ids: Token ids of each sequence's prompt, by its number; None where they are not known.

    Raises:
        TraceError: the prompts are not the trace's.
    """

    def __init__(
        self, trace: Trace, slots: Sequence[int], ids: Sequence[Sequence[int]] | None
    ) -> None:
        self._trace, self._slots, self._ids = trace, tuple(slots), ids
        rows = np.flatnonzero(trace.kind == PROMPT_ROW)
        self._rows = rows[np.argsort(trace.sequence[rows], kind="stable")]
        lengths = np.bincount(trace.sequence[rows], minlength=trace.num_sequences)
        self._bounds = np.concatenate([[0], np.cumsum(lengths)])
        way_out = "give the prompts that it was recorded from, in their order"
        if ids is not None and len(ids) != len(lengths):
            raise TraceError(
                f"the trace has {len(lengths)} sequences but {len(ids)} prompts were given; "
                f"{way_out}"
            )
        for sequence, (prompt, count) in enumerate(zip(ids or (), lengths.tolist(), strict=False)):
            if len(prompt) != count:
                raise TraceError(
                    f"sequence {sequence} of the trace has {count} prompt tokens but its prompt "
                    f"has {len(prompt)}; {way_out}"
                )

    def before(self, sequence: int) -> Prompt:
        """Describe a sequence before its prompt was read."""
        ids = None if self._ids is None else tuple(map(int, self._ids[sequence]))
        return Prompt(self._slots, self._trace.num_experts, ids, None, sequence)

    def after(self, sequence: int) -> Prompt:
        """Describe a sequence once its prompt was read."""
        prompt = self.before(sequence)
        rows = self._rows[self._bounds[sequence] : self._bounds[sequence + 1]]
        chosen = self._trace.experts[rows].astype(np.int64)
        layers, experts = self._trace.num_layers, self._trace.num_experts
        cells = (np.arange(layers)[:, None] * experts + chosen)[chosen >= 0]
        uses = np.bincount(cells, minlength=layers * experts).reshape(layers, experts)
        return Prompt(prompt.slots, experts, prompt.ids, uses, sequence)
