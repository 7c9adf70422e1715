"""
Prefetchers by name: ours, registered ones, and those that an installed package declares.

To add one, subclass `Prefetcher`; then either decorate the class with `register`, or let the
package that holds it declare an entry point, and melinoe finds it wherever prefetches are named:

    [project.entry-points."melinoe.prefetchers"]
    pairs = "my_package.pairs:Pairs"
"""

from typing import TypeVar

from melinoe.cache.prefetcher import Given, Prefetcher
from melinoe.cache.registry import Registry

ENTRY_POINTS = "melinoe.prefetchers"
NONE = "none"

_registry = Registry(
    ENTRY_POINTS,
    Prefetcher,
    {
        "popularity": "melinoe.prefetch.counted:Popularity",
        "prefill": "melinoe.prefetch.counted:Prefill",
        "predictor": "melinoe.prefetch.predicted:Predicted",
        "next-router": "melinoe.prefetch.routed:NextRouter",
    },
    kind="prefetch",
    word="prefetcher",
    none=NONE,
)
_Class = TypeVar("_Class", bound=type[Prefetcher])


def register(cls: _Class) -> _Class:
    """Make a prefetcher known by its `name` in this process; a decorator."""
    return _registry.register(cls)


def prefetcher_names() -> list[str]:
    """All that can be named: ``none``, ours, then registered ones and installed entry points."""
    return _registry.names()


def prefetcher_class(name: str) -> type[Prefetcher]:
    """
    Look a prefetcher up; a name of ours always means ours.

    Raises:
        MelinoeError: unknown name (the message lists the known ones), or an installed package that
            declares it cannot be loaded or declares something else.
    """
    return _registry.find(name)


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
