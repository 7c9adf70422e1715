"""Belady's rule: the fewest loads possible, known only afterwards; the bound for all others."""

import math
from collections.abc import Sequence
from typing import Any

from melinoe.cache.policy import Policy


class Belady(Policy):
    """
    Evict the expert whose next use is furthest ahead: the fewest loads possible, offline.

    Rule: the expert whose next request comes last leaves, those never requested again first,
    and of equal ones the lowest id. Experts next used by the same request are equal for good:
    whichever leaves, one of them must be loaded then. A request with more experts than slots is
    served in the order of `Residency.request_in_parts`, and the bound holds given that order.
    A prefetch is no request, and changes nothing.

    Args:
        future: All requests of the layer in order, each its distinct experts; empty ones are none.

    Raises:
        ValueError: from `use`, when a request is not the promised one.

    Source:
        L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM
        Systems Journal 5(2), 1966.
    """

    name = "belady"
    offline = True

    def __init__(self, future: Sequence[Sequence[int]]):
        self._future = [request for request in future if len(request)]
        self._ahead: list[list[float]] | None = None

    @classmethod
    def for_layer(cls, layer: int, num_layers: int, **options: Any) -> "Policy":
        """Of the futures per layer, this layer's."""
        future = options.pop("future")
        return cls(future[layer], **options)

    def reset(self, num_experts: int) -> None:
        """
        Before the first use: start at the first request. Later: empty slots, same place in time.

        The requests to come are still to come when the cache is emptied between two prompts.
        """
        if self._ahead is not None:
            return
        # Requests ahead per expert, the nearest last, so that passing one is a pop.
        ahead: list[list[float]] = [[math.inf] for _ in range(num_experts)]
        for when in range(len(self._future) - 1, -1, -1):
            for expert in self._future[when]:
                ahead[expert].append(when)
        self._ahead = ahead
        self._next = [of_one[-1] for of_one in ahead]
        self._now = 0

    def use(self, experts: Sequence[int]) -> None:
        """Move one request on."""
        assert self._ahead is not None
        for expert in experts:
            if self._next[expert] != self._now:
                raise ValueError(
                    f"request {self._now} uses expert {expert}, which the future did not promise"
                )
            self._ahead[expert].pop()
            self._next[expert] = self._ahead[expert][-1]
        self._now += 1

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Furthest next use first."""
        return sorted(candidates, key=self._next.__getitem__, reverse=True)[:count]

    def prefetched(self, experts: Sequence[int]) -> None:
        """Nothing: the future stays what it is."""
