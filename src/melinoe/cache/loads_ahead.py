"""Carry a prefetcher's wishes out, by one rule for the simulator and the runtime."""

from collections.abc import Callable, Collection, Sequence

from melinoe.cache.prefetcher import ByLayer, Prefetcher, Prompt
from melinoe.cache.route import Route


class LoadsAhead:
    """
    Carries a prefetcher's wishes out, by one rule for the simulator and the runtime.

    The rule between layers: a prefetch evicts nothing that an earlier prefetch named for the same
    layer if that has not made a request since, and nothing that it names itself. What then finds
    no slot is dropped, the least wanted first. Whom it does evict, the policy says; to it a
    prefetch is one request (`Residency.prefetch`). Before a prompt or a completion a prefetch
    spares what it names itself, layer by layer, and nothing else.

    Args:
        prefetcher: Asked.
        route: Says which layer comes next; told of the requests by whoever serves them.
        num_layers: MoE layers.
        load: Begins to load experts of a layer, sparing some residents, and returns how many loads
            that takes: `Residency.prefetch`, and in the runtime the copies too.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        route: Route,
        num_layers: int,
        load: Callable[[int, Sequence[int], Collection[int]], int],
    ) -> None:
        self.prefetcher = prefetcher
        self._route = route
        self._load = load
        # By layer: named by a prefetch, and no request of that layer has come since.
        self._waiting: list[set[int]] = [set() for _ in range(num_layers)]

    def before_prompt(self, prompt: Prompt) -> list[int]:
        """Ask and load; how many loads of each layer that takes."""
        return self._all(self.prefetcher.before_prompt(prompt))

    def before_completion(self, prompt: Prompt) -> list[int]:
        """Ask and load; how many loads of each layer that takes."""
        return self._all(self.prefetcher.before_completion(prompt))

    def requested(self, layer: int) -> None:
        """A request of *layer* is served: what was brought for it has had its chance."""
        self._waiting[layer].clear()

    def after_router(self, layer: int, chosen: Sequence[int], guess: Sequence[int]) -> int:
        """
        Ask and load for the layer that comes next; how many loads of it that takes.

        Args:
            layer, chosen, guess: As in `Prefetcher.after_router`.
        """
        target = self._route.after(layer)
        if target is None:
            return 0
        wanted = self.prefetcher.after_router(layer, chosen, guess)
        if not len(wanted):
            return 0
        return self._one(target, wanted, self._waiting[target])

    def _all(self, wanted: ByLayer | None) -> list[int]:
        if wanted is None:
            return [0] * len(self._waiting)
        check_layers(wanted, len(self._waiting))
        return [self._one(layer, experts, ()) for layer, experts in enumerate(wanted)]

    def _one(self, layer: int, experts: Sequence[int], spared: Collection[int]) -> int:
        experts = [int(expert) for expert in experts]
        loads = self._load(layer, experts, spared)
        self._waiting[layer].update(experts)
        return loads


def check_layers(wanted: ByLayer, num_layers: int) -> None:
    """
    Make sure that a prefetch names every layer.

    Raises:
        ValueError: it does not.
    """
    if len(wanted) != num_layers:
        raise ValueError(f"a prefetch names {len(wanted)} layers of {num_layers}")
