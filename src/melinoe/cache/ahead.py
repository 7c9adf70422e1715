"""Ask a prefetcher at the moments of a replay, as the runtime asks it while serving."""

from collections.abc import Iterator, Sequence

import numpy as np

from melinoe.cache.counters import COMPLETION, Counters
from melinoe.cache.loads_ahead import LoadsAhead
from melinoe.cache.prefetcher import MOST_ROWS, Listed, Prefetch, Prefetcher, Prompt
from melinoe.cache.requests import ForwardPass
from melinoe.cache.residency import Residency
from melinoe.cache.route import Route
from melinoe.cache.trace import PROMPT_ROW, Trace
from melinoe.errors import TraceError


def as_prefetcher(prefetch: Prefetcher | Prefetch | None, at: str) -> Prefetcher | None:
    """Make lists by sequence number a prefetcher that names them at *at*."""
    if prefetch is None or isinstance(prefetch, Prefetcher):
        return prefetch
    return Listed(prefetch, at)


class Prompts:
    """
    What a prefetcher is told of the sequences of a trace.

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
        ends = np.bincount(trace.sequence[rows], minlength=trace.num_sequences)
        self._bounds = np.concatenate([[0], np.cumsum(ends)])
        if ids is not None:
            _check_prompts(ids, ends)

    def before(self, sequence: int) -> Prompt:
        """What is known of a sequence before its prompt was read."""
        ids = None if self._ids is None else tuple(map(int, self._ids[sequence]))
        return Prompt(self._slots, self._trace.num_experts, ids, None, sequence)

    def after(self, sequence: int) -> Prompt:
        """The same once it was read."""
        prompt = self.before(sequence)
        rows = self._rows[self._bounds[sequence] : self._bounds[sequence + 1]]
        chosen = self._trace.experts[rows].astype(np.int64)
        layers, experts = self._trace.num_layers, self._trace.num_experts
        cells = (np.arange(layers)[:, None] * experts + chosen)[chosen >= 0]
        uses = np.bincount(cells, minlength=layers * experts).reshape(layers, experts)
        return Prompt(prompt.slots, experts, prompt.ids, uses, sequence)


def _check_prompts(ids: Sequence[Sequence[int]], rows: np.ndarray) -> None:
    """Hold prompts against the rows that each sequence's has in the trace."""
    way_out = "give the prompts that it was recorded from, in their order"
    if len(ids) != len(rows):
        raise TraceError(
            f"the trace has {len(rows)} sequences but {len(ids)} prompts were given; {way_out}"
        )
    for sequence, (prompt, count) in enumerate(zip(ids, rows.tolist(), strict=True)):
        if len(prompt) != count:
            raise TraceError(
                f"sequence {sequence} of the trace has {count} prompt tokens but its prompt has "
                f"{len(prompt)}; {way_out}"
            )


def check_prefetcher(
    prefetcher: Prefetcher, trace: Trace, ids: Sequence[Sequence[int]] | None
) -> None:
    """
    Make sure that the trace, and what was given with it, tells a prefetcher what it asks for.

    Raises:
        TraceError: it does not.
    """
    if prefetcher.uses_guesses and trace.guesses is None and len(trace):
        raise TraceError(
            f"prefetch {prefetcher.name!r} needs what the next layer's router said, which the "
            "trace does not hold; record one with guesses"
        )
    if prefetcher.uses_ids and ids is None:
        raise TraceError(
            f"prefetch {prefetcher.name!r} reads prompts, which a trace does not hold; give the "
            "prompts that it was recorded from"
        )


class Replay:
    """
    One prefetcher along one replay.

    Args:
        prefetcher: Asked at its moments.
        trace: Replayed.
        slots: Of each layer.
        residencies: Of all layers.
        ids: As `Prompts`.

    Raises:
        TraceError: it needs what is not there, or the prompts are not the trace's.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        trace: Trace,
        slots: Sequence[int],
        residencies: Sequence[Residency],
        ids: Sequence[Sequence[int]] | None,
    ) -> None:
        check_prefetcher(prefetcher, trace, ids)
        self._prompts = Prompts(trace, slots, ids)
        self._route = Route(len(residencies))
        self._ahead = LoadsAhead(
            prefetcher,
            self._route,
            len(residencies),
            lambda layer, experts, spare: len(residencies[layer].prefetch(experts, spare).loads),
        )
        self._between = prefetcher.between_layers
        self._begun: tuple[set[int], set[int]] = (set(), set())

    def before_pass(self, forward: ForwardPass, counters: Counters) -> list[int]:
        """What comes right before a pass; how many loads of each layer that takes."""
        self._route.end_pass()
        total = np.zeros(len(counters.prefetch_loads), np.int64)
        for sequence in self._new(forward, 0):
            total += self._ahead.before_prompt(self._prompts.before(sequence))
        if forward.phase == COMPLETION:
            for sequence in self._new(forward, 1):
                total += self._ahead.before_completion(self._prompts.after(sequence))
        loads = total.tolist()
        for layer, count in enumerate(loads):
            counters.add_prefetch(layer, count)
        return loads

    def streamed(self, layer: int, forward: ForwardPass) -> None:
        """A prompt's request of *layer* was streamed."""
        if forward.requests[layer][0]:
            self._requested(layer)

    def after_request(
        self, layer: int, forward: ForwardPass, counters: Counters
    ) -> tuple[int, int]:
        """
        What comes once a layer has its experts.

        Returns:
            The layer that is loaded for, and how many loads that takes.
        """
        chosen = forward.requests[layer][0]
        if not chosen:
            return layer, 0
        self._requested(layer)
        if not self._between or forward.phase != COMPLETION or forward.tokens > MOST_ROWS:
            return layer, 0
        target = self._route.after(layer)
        if target is None:
            return layer, 0
        guess = [] if forward.guesses is None else forward.guesses[target]
        loads = self._ahead.after_router(layer, chosen, guess)
        if loads:
            counters.add_prefetch(target, loads)
        return target, loads

    def _requested(self, layer: int) -> None:
        self._route.reached(layer)
        self._ahead.requested(layer)

    def _new(self, forward: ForwardPass, moment: int) -> Iterator[int]:
        begun = self._begun[moment]
        for sequence in forward.sequences:
            if sequence not in begun:
                begun.add(sequence)
                yield sequence
