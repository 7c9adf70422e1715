"""Updates that are left out of a model's passes for a while, or replaced by others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Switching:
    """
    Updates of several places of a model: modules with ``enabled`` and ``instead``.

    ``instead`` is ``None``, or a tuple of one: the update that acts in this one's place, or none.
    """

    def places(self) -> list[Any]:
        """The update modules, one for each place."""
        raise NotImplementedError

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, the model computes as if it had no updates: a pass of the base model."""
        modules = self.places()
        before = [module.enabled for module in modules]
        for module in modules:
            module.enabled = False
        try:
            yield
        finally:
            for module, enabled in zip(modules, before, strict=True):
                module.enabled = enabled

    @contextmanager
    def replaced(self, others: Sequence[Any]) -> Iterator[None]:
        """
        Within it, other updates act in place of these.

        Args:
            others: One for each place, on its device; ``None``: that place has no update.
        """
        modules = self.places()
        before = [module.instead for module in modules]
        for module, other in zip(modules, others, strict=True):
            module.instead = (other,)
        try:
            yield
        finally:
            for module, instead in zip(modules, before, strict=True):
                module.instead = instead
