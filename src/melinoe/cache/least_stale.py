"""Least-stale: the rule for one cache of all layers, which knows where in a pass the model is."""

from collections.abc import Sequence
from typing import Any

from melinoe.cache.policy import Policy


class LeastStale(Policy):
    """
    Evict first what this forward pass will not need any more.

    Rule: the cache holds experts of all layers. An expert is *used* if its last use or prefetch
    was in this forward pass, else it is stale; its layer is *passed* if it is the layer served now
    or one before it, else it is ahead. They leave in this order: stale and passed (this pass is
    done with its layer); stale and ahead; used and passed; used and ahead (a prefetch, still to be
    needed). Within a group the least recently used leaves first, stamped as in `LRU`.

    A pass begins when a layer is served that is not behind the last one. So a pass in which no
    token chose an expert of the first layers is told apart only if it does not go on where the
    one before it ended. Prefetches belong to the pass to come, and begin none.

    Args:
        num_layers: Layers that share the cache; ids are ``layer * num_experts + expert``.

    Source:
        Least-Stale of SpecMD, arXiv:2602.03921; the order within a group is ours.
    """

    name = "least-stale"
    scope = "model"

    def __init__(self, num_layers: int):
        self._num_layers = num_layers

    @classmethod
    def for_layer(cls, layer: int | None, num_layers: int, **options: Any) -> "Policy":
        """The one policy of all layers."""
        return cls(num_layers, **options)

    def reset(self, num_experts: int) -> None:
        """Forget all uses; *num_experts* counts those of all layers."""
        self._per_layer = num_experts // self._num_layers
        self._clock = 0
        self._stamp = [-1] * num_experts
        self._pass = 0
        self._used_in = [-1] * num_experts
        self._layer = self._num_layers  # so that the first request begins a pass

    def use(self, experts: Sequence[int]) -> None:
        """Stamp the experts, which are of one layer; an earlier layer than before is a new pass."""
        layer = experts[0] // self._per_layer
        if layer <= self._layer:
            self._pass += 1
        self._layer = layer
        self._mark(experts, self._pass)

    def prefetched(self, experts: Sequence[int]) -> None:
        """Stamp the experts as used in the pass to come, or in this one if it is still ahead."""
        layer = experts[0] // self._per_layer
        self._mark(experts, self._pass + (layer <= self._layer))

    def _mark(self, experts: Sequence[int], when: int) -> None:
        for expert in experts:
            self._stamp[expert] = self._clock
            self._used_in[expert] = when
            self._clock += 1

    def _rank(self, expert: int) -> tuple[bool, bool, int]:
        used = self._used_in[expert] >= self._pass
        ahead = expert // self._per_layer > self._layer
        return used, ahead, self._stamp[expert]

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """By group, then lowest stamps first."""
        return sorted(candidates, key=self._rank)[:count]
