"""Words that settings and commands share: policies, stores, moments, versions."""

from importlib.metadata import PackageNotFoundError, version

from melinoe.cache import MISSES, PREFETCH_AT, PREFETCH_MOMENTS, PrefetchAt

__all__ = [
    "MISSES",
    "PREFETCH_AT",
    "PREFETCH_MOMENTS",
    "STORES",
    "PrefetchAt",
    "policies",
    "version_of",
]

STORES = ("auto", "ram", "pinned", "disk")


def policies() -> tuple[str, ...]:
    """Cache policies that can be named to run a model: ours, and those of installed packages."""
    from melinoe.cache.policy import servable_names

    return servable_names()


def version_of(package: str) -> str:
    """What is installed of *package*; of code that runs from a checkout, that it does."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
