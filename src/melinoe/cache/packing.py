"""
A residency as one row of numbers, so that it can be kept on a device, and back.

The row is int64: ``clock | keys (num_experts,) | slot_of (num_experts,) | expert_of (capacity,) |
unused (num_experts,)``. LRU packs its next stamp and its stamps; decayed LFU its unit and its
scores, as the bits of the doubles; *unused* is 1 for experts that a prefetch brought and nobody has
requested since. Packing and unpacking lose nothing, so plans made before, between and after are
the same.
"""

from __future__ import annotations

import numpy as np

from melinoe.cache.eviction import LRU, DecayedLFU
from melinoe.cache.residency import Residency
from melinoe.errors import MelinoeError

PACKABLE = ("lru", "lfu")


def packed_length(num_experts: int, capacity: int) -> int:
    """Numbers in a row."""
    return 1 + 3 * num_experts + capacity


def pack(residency: Residency) -> np.ndarray:
    """
    The row of *residency*, int64 ``(packed_length,)``.

    Raises:
        MelinoeError: its policy is not one of `PACKABLE`.
    """
    policy, experts = residency.policy, residency.num_experts
    row = np.empty(packed_length(experts, residency.capacity), dtype=np.int64)
    if isinstance(policy, LRU):
        row[0] = policy._clock
        row[1 : 1 + experts] = policy._stamp
    elif isinstance(policy, DecayedLFU):
        as_float = row.view(np.float64)
        as_float[0] = policy._unit
        as_float[1 : 1 + experts] = policy._score
    else:
        raise MelinoeError(
            f"the policy {policy.name!r} cannot run on the device; choose one of "
            f"{', '.join(PACKABLE)}, or the reference engine"
        )
    row[1 + experts : 1 + 2 * experts] = residency.slot_of
    end = 1 + 2 * experts + residency.capacity
    row[1 + 2 * experts : end] = residency.expert_of
    row[end:] = 0
    row[[end + expert for expert in residency._unused]] = 1
    return row


def unpack(row: np.ndarray, residency: Residency) -> None:
    """
    Make *residency* what *row* says; the inverse of `pack`.

    Raises:
        MelinoeError: as `pack`.
        ValueError: a row of another length.
    """
    policy, experts = residency.policy, residency.num_experts
    if row.shape != (packed_length(experts, residency.capacity),):
        raise ValueError(f"a row of shape {row.shape} is not of this residency")
    if isinstance(policy, LRU):
        policy._clock = int(row[0])
        policy._stamp = row[1 : 1 + experts].tolist()
    elif isinstance(policy, DecayedLFU):
        as_float = np.ascontiguousarray(row).view(np.float64)
        policy._unit = float(as_float[0])
        policy._score = as_float[1 : 1 + experts].tolist()
    else:
        pack(residency)  # raises
    residency.slot_of[:] = row[1 + experts : 1 + 2 * experts]
    end = 1 + 2 * experts + residency.capacity
    residency.expert_of[:] = row[1 + 2 * experts : end]
    residency._unused = set(np.flatnonzero(row[end:]).tolist())
    residency._slot.clear()
    # In the order of slots, which is the order in which a fresh residency fills them.
    residency._slot.update({int(e): slot for slot, e in enumerate(residency.expert_of) if e >= 0})
