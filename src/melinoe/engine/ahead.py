"""Which prefetches belong to the text to come, so that each is judged by the one it was for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence


class Ahead:
    """
    Which prefetches belong to the text to come.

    What is loaded ahead before a text's first pass, and since the pass before, is for that text;
    what was loaded earlier was for an earlier one, which did not use it: it was wasted, and is
    counted so even where a later text finds it resident. The simulator, which knows where a text
    begins before it loads for it, comes to the same.

    Args:
        num_layers: MoE layers.

    Attributes:
        forget: told, when a text begins, what is not to be forgotten of what was loaded ahead, by
            layer (`melinoe.cache.residency.Residency.forget_prefetches`).
    """

    def __init__(self, num_layers: int) -> None:
        self._waiting: list[list[int]] = [[] for _ in range(num_layers)]
        self._any = False  # whether anything was loaded ahead since a text began
        self.forget: Callable[[Sequence[Collection[int]]], None] = lambda _: None

    def loaded(self, layer: int, experts: Sequence[int], waits: bool) -> None:
        """*experts* of *layer* were loaded ahead; *waits*: between passes, not within one."""
        if experts:
            self._any = True
            if waits:
                self._waiting[layer].extend(experts)

    def text_begins(self) -> None:
        """A pass is about to begin that is a text's first."""
        if self._any:
            self.forget(self._waiting)
            self._any = any(self._waiting)

    def pass_begins(self) -> None:
        """A pass begins: nothing waits for it any more."""
        if self._any:
            for waiting in self._waiting:
                waiting.clear()

    def reset(self) -> None:
        """Counters begin anew: nothing that was loaded so far counts."""
        self.pass_begins()
        self.forget(self._waiting)
        self._any = False

    @property
    def waiting(self) -> list[int]:
        """How many experts of each layer were loaded ahead for the text to come."""
        return [len(experts) for experts in self._waiting]
