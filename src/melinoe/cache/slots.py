"""Slots, which hold one expert each, and the decision that changes what they hold."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from melinoe.errors import CacheTooSmallError, MelinoeError


class Load(NamedTuple):
    """Copy *expert* into *slot*, which held *evicted* (None: nothing)."""

    expert: int
    slot: int
    evicted: int | None


class Decision(NamedTuple):
    """
    How one request is served: from slots, and by loads.

    Attributes:
        hits: Experts that were resident.
        loads: One for each expert that was not.
        first_uses: How many of the hits a prefetch had brought and no request had used since.
    """

    hits: tuple[int, ...]
    loads: tuple[Load, ...]
    first_uses: int = 0


def check_capacity(num_experts: int, capacity: int) -> None:
    """
    Make sure that a layer can have so many slots.

    Raises:
        CacheTooSmallError: *capacity* is below 1.
        MelinoeError: it is above *num_experts*.
    """
    if capacity < 1:
        raise CacheTooSmallError(f"a layer was given {capacity} slots; it needs at least 1")
    if capacity > num_experts:
        raise MelinoeError(
            f"a layer was given {capacity} slots, but has {num_experts} experts; "
            f"give it at most {num_experts} slots"
        )


class Slots:
    """
    Which expert of a layer is in which slot; who comes and who leaves is decided elsewhere.

    Free slots are filled lowest first; after that who comes takes the slot of who leaves.

    Args:
        num_experts: Experts of the layer; ids lie in ``[0, num_experts)``.
        capacity: Slots, at least 1 and at most *num_experts*.

    Attributes:
        slot_of: int64 (num_experts,), -1 where absent; always the same array, changed in place.
        expert_of: int64 (capacity,), -1 where empty; always the same array, changed in place.

    Raises:
        CacheTooSmallError: *capacity* is below 1.
        MelinoeError: *capacity* is above *num_experts*.
    """

    def __init__(self, num_experts: int, capacity: int):
        check_capacity(num_experts, capacity)
        self.num_experts = num_experts
        self.capacity = capacity
        self.slot_of = np.full(num_experts, -1, dtype=np.int64)
        self.expert_of = np.full(capacity, -1, dtype=np.int64)
        # The same facts again as a dictionary: looking one id up in an array costs five times more.
        self._slot: dict[int, int] = {}
        self._all = frozenset(range(num_experts))

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, expert: int) -> bool:
        return expert in self._slot

    @property
    def free(self) -> int:
        """Slots that hold no expert."""
        return self.capacity - len(self._slot)

    def put(self, experts: Sequence[int], victims: Sequence[int] = ()) -> tuple[Load, ...]:
        """
        Put absent *experts* into slots: the free ones, then those of the *victims* in their order.

        Args:
            experts: Distinct ids, none of them resident.
            victims: Residents, as many as slots are missing.
        """
        slot_of, expert_of, slot = self.slot_of, self.expert_of, self._slot
        # A slot once filled never falls free but by `clear`, so the free ones are the last ones.
        filled = len(slot)
        free = self.capacity - filled
        loads = []
        for number, expert in enumerate(experts):
            evicted: int | None = None
            if number < free:
                place = filled + number
            else:
                evicted = victims[number - free]
                place = slot.pop(evicted)
                slot_of[evicted] = -1
            slot[expert] = place
            slot_of[expert] = place
            expert_of[place] = expert
            loads.append(Load(expert, place, evicted))
        return tuple(loads)

    def clear(self) -> None:
        """Empty all slots."""
        self._slot.clear()
        self.slot_of.fill(-1)
        self.expert_of.fill(-1)

    def check(self, experts: Sequence[int]) -> set[int]:
        """
        *experts* as a set; changes nothing.

        Raises:
            ValueError: an id is out of range or given twice.
        """
        distinct = set(experts)
        if len(distinct) != len(experts):
            raise ValueError(f"a request names an expert twice: {list(experts)}")
        if not distinct <= self._all:
            raise ValueError(
                f"a request names an expert outside 0 to {self.num_experts - 1}: {list(experts)}"
            )
        return distinct

    def check_invariants(self) -> None:
        """Assert that all views of the slots agree; for tests."""
        resident = {int(e): int(s) for e, s in enumerate(self.slot_of) if s >= 0}
        assert resident == self._slot
        assert {int(s): int(e) for s, e in enumerate(self.expert_of) if e >= 0} == {
            s: e for e, s in resident.items()
        }
        assert len(resident) <= self.capacity
        assert sorted(resident.values()) == list(range(len(resident)))
