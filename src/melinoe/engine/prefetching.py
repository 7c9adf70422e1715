"""Ask a prefetcher while a model runs, as the simulator asks it, and copy what it names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from melinoe.cache.counters import PROMPT
from melinoe.cache.prefetch import LoadsAhead, Prefetcher, Prompt, merge_guesses
from melinoe.cache.trace import known_ids
from melinoe.engine.passes import ForwardPasses
from melinoe.engine.record import UseMeter


class Prefetching:
    """
    One prefetcher for one sequence, from before its prompt until `close`.

    Args:
        prefetcher: Asked at its moments.
        caches: Of all layers; they begin the copies.
        passes: Tell when a completion begins, and what the next routers said; hold the counters.
        ids: Token ids of the prompt, if the prefetcher reads them.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        caches: Sequence[Any],
        passes: ForwardPasses,
        ids: Sequence[int] | None,
    ) -> None:
        self._prefetcher, self._caches, self._passes = prefetcher, caches, passes
        self._num_experts = tuple(cache.layer.num_experts for cache in caches)
        slots = tuple(next(iter(cache.slots.values())).shape[0] for cache in caches)
        given = None if ids is None else tuple(map(int, ids))
        self._prompt = Prompt(slots, max(self._num_experts), given)
        self._ahead = LoadsAhead(prefetcher, passes.route, len(caches), self._load)

    def begin(self) -> None:
        """Ask for what comes before the prompt, and wait for the other moments."""
        self._ahead.before_prompt(self._prompt)
        if self._prefetcher.for_prompt:
            self._passes.prompt_uses = UseMeter(self._num_experts, PROMPT)
            self._passes.before_completion = self._completion_begins
        if self._prefetcher.between_layers:
            for cache in self._caches:
                cache.after_request = self._after_request

    def close(self) -> None:
        """Ask no more."""
        self._passes.prompt_uses = self._passes.before_completion = None
        if self._prefetcher.between_layers:
            for cache in self._caches:
                cache.after_request = None

    def _completion_begins(self) -> None:
        meter, self._passes.prompt_uses = self._passes.prompt_uses, None
        assert isinstance(meter, UseMeter)
        known = Prompt(
            self._prompt.slots, self._prompt.num_experts, self._prompt.ids, meter.counts()
        )
        self._ahead.before_completion(known)

    def _after_request(self, layer: int, experts: list[int]) -> None:
        self._ahead.requested(layer)
        target = self._passes.route.after(layer)
        if target is None or not self._passes.decodes_few:
            return
        guess, early = self._passes.guess, list[int]()
        if guess is not None:
            ids = known_ids(guess.cpu().numpy(), self._num_experts[target])
            early = merge_guesses(ids.tolist())
        self._ahead.after_router(layer, experts, early)

    def _load(self, layer: int, experts: Sequence[int], spare: Collection[int]) -> int:
        cache = self._caches[layer]
        loads = cache.prefetch(experts, spare) if spare else cache.prefetch(experts)
        # At once: should a later layer's answer be wrong, these have been copied all the same.
        self._passes.counters.add_prefetch(layer, loads)
        return loads
