"""Carry out a prefetcher's wishes by one rule for the simulator and the runtime."""

from collections.abc import Callable, Collection, Sequence

from melinoe.cache.prefetch import ByLayer, Prefetcher, Prompt


class Route:
    """
    Know which layer a forward pass reaches next, from the pass before.

    Most models run all MoE layers in the order of their numbers. Some hold several stacks of
    experts in one decoder layer and send a token through one of them (one for text and one for
    images, say), so that the layer of the next number is not the one that is needed next. No name
    tells which it is; the last pass does.

    Only layers that made a request count, in ascending order, so that the simulator, which has the
    requests alone, learns what the runtime learns. Until a pass has shown otherwise the next layer
    is the next number; a layer that the last pass left out keeps what was known of it.

    Args:
        num_layers: MoE layers.
    """

    def __init__(self, num_layers: int) -> None:
        self._next: list[int | None] = [*range(1, num_layers), None]
        self._known: list[int] = []  # the order of the last whole pass
        self._order: list[int] = []  # of the open one, so far

    def reached(self, layer: int) -> None:
        """Note that *layer* made a request in the open pass."""
        if not self._order or layer > self._order[-1]:
            self._order.append(layer)

    def end_pass(self) -> None:
        """End the open pass, if there is one, and learn its order."""
        order, self._order = self._order, []
        if order and order != self._known:
            for layer, following in zip(order, [*order[1:], None], strict=True):
                self._next[layer] = following
            self._known = order

    def drop_pass(self) -> None:
        """Learn nothing from the open pass, which broke off."""
        self._order = []

    def after(self, layer: int) -> int | None:
        """The layer that is expected to make the next request after *layer*; None for none."""
        return self._next[layer]


class LoadsAhead:
    """
    Ask a prefetcher, and load what it names.

    Between layers a prefetch evicts nothing that an earlier prefetch named for the same
    layer if that has not made a request since, and nothing that it names itself. What then finds
    no slot is dropped, the least wanted first. The policy chooses whom it evicts; to it a
    prefetch is one request (`Residency.prefetch`). Before a prompt or a completion a prefetch
    spares the experts that it names itself, layer by layer, and nothing else.

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
        """Ask and load; returns how many loads of each layer that takes."""
        return self._all(self.prefetcher.before_prompt(prompt))

    def before_completion(self, prompt: Prompt) -> list[int]:
        """Ask and load; returns how many loads of each layer that takes."""
        return self._all(self.prefetcher.before_completion(prompt))

    def requested(self, layer: int) -> None:
        """Note that a request of *layer* is served: experts brought for it had their chance."""
        self._waiting[layer].clear()

    def after_router(self, layer: int, chosen: Sequence[int], guess: Sequence[int]) -> int:
        """
        Ask and load for the layer that comes next; returns how many loads of it that takes.

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
        layers = len(self._waiting)
        if wanted is None:
            return [0] * layers
        if len(wanted) != layers:
            raise ValueError(f"a prefetch names {len(wanted)} layers of {layers}")
        return [self._one(layer, experts, ()) for layer, experts in enumerate(wanted)]

    def _one(self, layer: int, experts: Sequence[int], spared: Collection[int]) -> int:
        experts = [int(expert) for expert in experts]
        loads = self._load(layer, experts, spared)
        self._waiting[layer].update(experts)
        return loads
