"""Updates on a model in training: named, left out of a pass, replaced by others, merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from melinoe.moe.experts import ADAPTER


class Updates:
    """
    The updates of several modules of a model, each a child of the module that it changes.

    An update is a module with ``add_to(module)``, ``enabled`` and ``instead``. The last is
    ``None``, or a tuple of one: the update that acts in this one's place, or none.

    Args:
        sites: Full name and module of each that has an update.
    """

    def __init__(self, sites: Mapping[str, nn.Module]) -> None:
        self._sites = dict(sites)

    def places(self) -> list[Any]:
        """The update modules, one for each site; shared ones come again."""
        return [site.get_submodule(ADAPTER) for site in self._sites.values()]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Full name and parameter of every update; a shared one by its first name."""
        return once(
            (f"{name}.{ADAPTER}.{key}", parameter)
            for name, update in zip(self._sites, self.places(), strict=True)
            for key, parameter in update.named_parameters()
        )

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

    def remove(self, *, merge: bool) -> None:
        """Take the updates off the model; with *merge*, add them to its weights before."""
        merged: set[nn.Module] = set()
        for site, update in zip(self._sites.values(), self.places(), strict=True):
            if merge and update not in merged:
                update.add_to(site)
                merged.add(update)
            delattr(site, ADAPTER)


def acting(site: nn.Module) -> Any:
    """The update that acts on a module now, or none."""
    update: Any = getattr(site, ADAPTER)
    if update.instead is not None:
        return update.instead[0]
    return update if update.enabled else None


def once(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Parameters by name; one that has several names by its first, as in ``named_parameters()``."""
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named:
        first.setdefault(id(parameter), (name, parameter))
    return dict(first.values())
