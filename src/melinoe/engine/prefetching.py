"""Ask a prefetcher while a model runs, as the simulator asks it, and copy what it names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from melinoe.cache.prefetch import LoadsAhead, Prefetcher, Prompt, merge_guesses
from melinoe.cache.trace import known_ids
from melinoe.engine.passes import ForwardPasses
from melinoe.engine.record import PromptUses


class Prefetching:
    """One prefetcher for one sequence, from before its prompt (token *ids*) until `close`."""

    def __init__(
        self,
        prefetcher: Prefetcher,
        caches: Sequence[Any],
        passes: ForwardPasses,
        ids: Sequence[int] | None,
    ) -> None:
        self._prefetcher, self._caches, self._passes = prefetcher, caches, passes
        self._num_experts = tuple(cache.layer.num_experts for cache in caches)
        self._uses = PromptUses(self._num_experts)
        slots = tuple(cache.residency.capacity for cache in caches)
        given = None if ids is None else tuple(map(int, ids))
        self._prompt = Prompt(slots, max(self._num_experts), given)
        self._ahead = LoadsAhead(prefetcher, passes.route, len(caches), self._load)

    def begin(self) -> None:
        """Ask for what comes before the prompt, and wait for the other moments."""
        self._ahead.before_prompt(self._prompt)
        if self._prefetcher.for_prompt:
            self._passes.prompt_uses = self._uses
            self._passes.before_completion = self._completion_begins
        self._tell_after_requests(self._after_request)

    def close(self) -> None:
        """Ask no more."""
        self._passes.prompt_uses = self._passes.before_completion = None
        self._tell_after_requests(None)

    def _tell_after_requests(self, ask: Any) -> None:
        for cache in self._caches if self._prefetcher.between_layers else ():
            cache.after_request = ask

    def _completion_begins(self) -> None:
        self._passes.prompt_uses = None
        self._ahead.before_completion(replace(self._prompt, uses=self._uses.counts()))

    def _after_request(self, layer: int, experts: list[int]) -> None:
        self._ahead.requested(layer)
        target = self._passes.route.after(layer)
        if target is None or not self._passes.decodes_few:
            return
        guess, early = self._passes.guess, list[int]()
        if guess is not None and self._prefetcher.uses_guesses:
            ids = known_ids(guess.cpu().numpy(), self._num_experts[target])
            early = merge_guesses(ids.tolist())
        self._ahead.after_router(layer, experts, early)

    def _load(self, layer: int, experts: Sequence[int], spare: Collection[int]) -> int:
        cache = self._caches[layer]
        loads = cache.prefetch(experts, spare) if spare else cache.prefetch(experts)
        # At once: should a later layer's answer be wrong, these have been copied all the same.
        self._passes.counters.add_prefetch(layer, loads)
        return loads
