"""
A residency as one row of numbers, so that it can be kept on a device, and back.

The row is int64: ``now | rank (num_experts,) | slot_of (num_experts,) | expert_of (capacity,) |
unused (num_experts,)``. *now* and *rank* are the policy's: LRU's clock and stamps, or decayed LFU's
unit and scores, as the bits of the doubles; *unused* is 1 for experts that a prefetch brought and
no request has used since. Nothing is lost: decisions made before, between and after are the same.
"""

from __future__ import annotations

import numpy as np

from melinoe.cache.policy import RankedPolicy
from melinoe.cache.residency import Residency
from melinoe.errors import MelinoeError

PACKABLE = ("lru", "lfu")


def packed_length(num_experts: int, capacity: int) -> int:
    """Numbers in a row."""
    return 1 + 3 * num_experts + capacity


def pack(residency: Residency) -> np.ndarray:
    """
    Write *residency* as a row, int64 ``(packed_length,)``.

    Raises:
        MelinoeError: its policy is not one of `PACKABLE`.
    """
    policy, experts = _packable(residency), residency.num_experts
    row = np.zeros(packed_length(experts, residency.capacity), dtype=np.int64)
    ranks = row if policy.name == "lru" else row.view(np.float64)
    ranks[0] = policy._now
    ranks[1 : 1 + experts] = policy._rank
    row[1 + experts : 1 + 2 * experts] = residency.slot_of
    end = 1 + 2 * experts + residency.capacity
    row[1 + 2 * experts : end] = residency.expert_of
    row[[end + expert for expert in residency._unused]] = 1
    return row


def unpack(row: np.ndarray, residency: Residency) -> None:
    """
    Bring *residency* into the state that *row* holds; the inverse of `pack`.

    Raises:
        MelinoeError: as `pack`.
        ValueError: a row of another length.
    """
    policy, experts = _packable(residency), residency.num_experts
    if row.shape != (packed_length(experts, residency.capacity),):
        raise ValueError(f"a row of shape {row.shape} is not of this residency")
    ranks = row if policy.name == "lru" else np.ascontiguousarray(row).view(np.float64)
    policy._now = float(ranks[0])
    policy._rank = ranks[1 : 1 + experts].astype(np.float64).tolist()
    residency.slot_of[:] = row[1 + experts : 1 + 2 * experts]
    end = 1 + 2 * experts + residency.capacity
    residency.expert_of[:] = row[1 + 2 * experts : end]
    residency._unused = set(np.flatnonzero(row[end:]).tolist())
    residency._slot.clear()
    # In the order of slots, which is the order in which a fresh residency fills them.
    residency._slot.update({int(e): slot for slot, e in enumerate(residency.expert_of) if e >= 0})


def _packable(residency: Residency) -> RankedPolicy:
    policy = residency.policy
    if policy.name not in PACKABLE or not isinstance(policy, RankedPolicy):
        raise MelinoeError(
            f"the policy {policy.name!r} cannot run on the device; choose one of "
            f"{', '.join(PACKABLE)}, or the reference engine"
        )
    return policy
