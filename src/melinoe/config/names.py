"""Words that settings and commands share: policies, stores, moments, versions."""

from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Literal, get_args

# Those of ours that run a model by name alone; a test holds them against the registry.
POLICIES = ("lru", "lfu", "lfru", "score")
STORES = ("auto", "ram", "pinned", "disk")
# When experts known before the prompt are loaded: a prompt that uses more experts than there are
# slots would evict them again, so after it unless told otherwise.
PrefetchAt = Literal["prompt", "completion"]
PREFETCH_MOMENTS: tuple[str, ...] = get_args(PrefetchAt)
PREFETCH_AT: PrefetchAt = "completion"


def policies() -> tuple[str, ...]:
    """Cache policies that can be named to run a model: ours, and those of installed packages."""
    outside = {point.name for point in entry_points(group="melinoe.policies")}
    return (*POLICIES, *sorted(outside.difference(POLICIES)))


def version_of(package: str) -> str:
    """What is installed of *package*; of code that runs from a checkout, that it does."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
