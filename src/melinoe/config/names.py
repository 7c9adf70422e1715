"""Words and shares that settings and commands have in common."""

from importlib.metadata import PackageNotFoundError, version

from melinoe.cache import MISSES, PREFETCH_AT, PREFETCH_MOMENTS, PrefetchAt

__all__ = [
    "MISSES",
    "PREFETCH_AT",
    "PREFETCH_MOMENTS",
    "QUARTER",
    "STORES",
    "PrefetchAt",
    "experts_in_share",
    "policies",
    "version_of",
]

STORES = ("auto", "ram", "pinned", "disk")
# Share of a layer's experts that is resident where experiments do not say how many are.
QUARTER = 0.25


def experts_in_share(share: float, num_experts: int) -> int:
    """
    Count the experts in a share of a layer's experts: rounded to the nearest, at least one.

    Halves round up, so 0.25 of 6 experts is 2 and 0.25 of 64 is 16.
    """
    return max(1, min(num_experts, int(share * num_experts + 0.5)))


def policies() -> tuple[str, ...]:
    """Name the cache policies that can run a model: ours, and those of installed packages."""
    from melinoe.cache.policy import servable_names

    return servable_names()


def version_of(package: str) -> str:
    """Give the installed version of *package*, or say that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
