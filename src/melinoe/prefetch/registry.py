"""
Prefetchers by name: ours, registered ones, and those that an installed package declares.

To add one, subclass `Prefetcher`; then either decorate the class with `register`, or let the
package that holds it declare an entry point, and melinoe finds it wherever prefetches are named:

    [project.entry-points."melinoe.prefetchers"]
    pairs = "my_package.pairs:Pairs"
"""

from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

from melinoe.cache.declared import declared_class
from melinoe.cache.prefetcher import Given, Prefetcher
from melinoe.errors import MelinoeError

ENTRY_POINTS = "melinoe.prefetchers"
NONE = "none"

# Ours are found as those from outside are: by name, loaded when first asked for.
_BUILT_IN = {
    "popularity": "melinoe.prefetch.counted:Popularity",
    "prefill": "melinoe.prefetch.counted:Prefill",
    "predictor": "melinoe.prefetch.predicted:Predicted",
    "next-router": "melinoe.prefetch.routed:NextRouter",
    "nearest": "melinoe.prefetch.nearest:Nearest",
}
_known: dict[str, type[Prefetcher]] = {}
_Class = TypeVar("_Class", bound=type[Prefetcher])


def register(cls: _Class) -> _Class:
    """Make a prefetcher known by its `name` in this process; a decorator."""
    if not cls.name or cls.name == NONE or cls.name in _known or cls.name in _BUILT_IN:
        raise ValueError(f"a prefetcher needs a name of its own, and {cls.name!r} is not one")
    _known[cls.name] = cls
    return cls


def prefetcher_names() -> list[str]:
    """All that can be named: ``none``, ours, then registered ones and installed entry points."""
    ours = (NONE, *_BUILT_IN)
    outside = {point.name for point in entry_points(group=ENTRY_POINTS)}
    return [*ours, *sorted({*_known, *outside}.difference(ours))]


def prefetcher_class(name: str) -> type[Prefetcher]:
    """
    Look a prefetcher up; a name of ours always means ours.

    Raises:
        MelinoeError: unknown name (the message lists the known ones), or an installed package that
            declares it cannot be loaded or declares something else.
    """
    if name in _known:
        return _known[name]
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        _known[name] = getattr(import_module(module), attribute)
        return _known[name]
    cls = None
    if name != NONE:
        cls = declared_class(ENTRY_POINTS, name, Prefetcher, "prefetch", "prefetcher")
    if cls is None:
        raise MelinoeError(
            f"there is no prefetch {name!r}; choose one of {', '.join(prefetcher_names())}"
        )
    _known[name] = cls
    return cls


def prefetcher(name: str, given: Given | None = None) -> Prefetcher | None:
    """
    Make a prefetcher; None for ``none``.

    Args:
        name: One of `prefetcher_names`.
        given: What it may be made of.

    Raises:
        MelinoeError: unknown name, or what it is made of is missing.
    """
    if name == NONE:
        return None
    return prefetcher_class(name).make(given or Given())
