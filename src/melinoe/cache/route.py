"""Route: which layer a forward pass reaches next, learned from the pass before."""


class Route:
    """
    Which layer a forward pass reaches next, learned from the pass before.

    Most models run all MoE layers in the order of their numbers. Some hold several stacks of
    experts in one decoder layer and send a token through one of them (one for text and one for
    images, say), so that the layer of the next number is not the one that is needed next. Which
    it is, no name tells; the last pass does.

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
        """*layer* made a request in the open pass."""
        if not self._order or layer > self._order[-1]:
            self._order.append(layer)

    def end_pass(self) -> None:
        """The open pass, if there is one, is over: learn its order."""
        order, self._order = self._order, []
        if order and order != self._known:
            for layer, following in zip(order, [*order[1:], None], strict=True):
                self._next[layer] = following
            self._known = order

    def drop_pass(self) -> None:
        """The open pass broke off: nothing is learned from it."""
        self._order = []

    def after(self, layer: int) -> int | None:
        """The layer that is expected to make the next request after *layer*; None for none."""
        return self._next[layer]
