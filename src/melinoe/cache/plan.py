"""Plan: what one request finds resident, and which transfers it takes."""

from typing import NamedTuple


class Load(NamedTuple):
    """Copy *expert* into *slot*, where *evicted* was (None: the slot was free)."""

    expert: int
    slot: int
    evicted: int | None


class Plan(NamedTuple):
    """
    Experts that were resident, and the transfers that make the others so.

    Attributes:
        hits: Ids that were resident.
        loads: One for each that was not.
        first_uses: How many of the hits had been prefetched, and were not requested since.
    """

    hits: tuple[int, ...]
    loads: tuple[Load, ...]
    first_uses: int = 0
