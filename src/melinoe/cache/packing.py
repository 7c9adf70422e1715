"""
A residency as one row of numbers, so that it can be kept on a device, and back; nothing is lost.

The row is int64: ``now | rank (num_experts,) | slot_of (num_experts,) | expert_of (capacity,)``.
*now* and *rank* are LRU's clock and stamps, or decayed LFU's unit and scores as the bits of the
doubles.
"""

from __future__ import annotations

import numpy as np

from melinoe.cache.policy import RankedPolicy
from melinoe.cache.residency import Residency
from melinoe.errors import MelinoeError

PACKABLE = ("lru", "lfu")


def packed_length(num_experts: int, capacity: int) -> int:
    """Numbers in a row."""
    return 1 + 2 * num_experts + capacity


def pack(residency: Residency) -> np.ndarray:
    """Write *residency* as a row; MelinoeError if its policy is not one of `PACKABLE`."""
    row = np.zeros(packed_length(residency.num_experts, residency.capacity), dtype=np.int64)
    policy, rank, slot_of, expert_of = _parts(row, residency)
    (row if policy.name == "lru" else row.view(np.float64))[0] = policy._now
    rank[:], slot_of[:], expert_of[:] = policy._rank, residency.slot_of, residency.expert_of
    return row


def unpack(row: np.ndarray, residency: Residency) -> None:
    """Bring *residency* into the state that *row* holds; the inverse of `pack`."""
    if row.shape != (packed_length(residency.num_experts, residency.capacity),):
        raise ValueError(f"a row of shape {row.shape} is not of this residency")
    row = np.ascontiguousarray(row)
    policy, rank, slot_of, expert_of = _parts(row, residency)
    policy._now = float((row if policy.name == "lru" else row.view(np.float64))[0])
    policy._rank = rank.astype(np.float64).tolist()
    residency.slot_of[:], residency.expert_of[:] = slot_of, expert_of
    residency._slot.clear()
    # In the order of slots, which is the order in which a fresh residency fills them.
    residency._slot.update({int(e): slot for slot, e in enumerate(expert_of) if e >= 0})


def _parts(
    row: np.ndarray, residency: Residency
) -> tuple[RankedPolicy, np.ndarray, np.ndarray, np.ndarray]:
    """The policy, and views of what follows *now*."""
    policy, experts = residency.policy, residency.num_experts
    if policy.name not in PACKABLE or not isinstance(policy, RankedPolicy):
        raise MelinoeError(
            f"the policy {policy.name!r} cannot run on the device; choose one of "
            f"{', '.join(PACKABLE)}, or the reference engine"
        )
    _, rank, slot_of, expert_of = np.split(row, np.cumsum([1, experts, experts]))
    rank = rank if policy.name == "lru" else rank.view(np.float64)
    return policy, rank, slot_of, expert_of
