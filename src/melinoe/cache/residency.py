"""
Residency: which experts of one layer are in which slots, and what a request must load.

It moves no bytes. Simulator and engines make the same calls, which is why their counts agree.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from melinoe.cache import DEFAULT_POLICY
from melinoe.cache.policy import Policy
from melinoe.cache.policy import policy as make_policy
from melinoe.errors import CacheTooSmallError, MelinoeError


class Load(NamedTuple):
    """Copy *expert* into *slot*, which held *evicted* (None: nothing)."""

    expert: int
    slot: int
    evicted: int | None


class Decision(NamedTuple):
    """Experts served from slots, and loads for the others."""

    hits: tuple[int, ...]
    loads: tuple[Load, ...]


_NOTHING: tuple[Load, ...] = ()


def check_capacity(num_experts: int, capacity: int) -> None:
    """Make sure that a layer can have so many slots."""
    if capacity < 1:
        raise CacheTooSmallError(f"a layer was given {capacity} slots; it needs at least 1")
    if capacity > num_experts:
        raise MelinoeError(
            f"a layer was given {capacity} slots, but has {num_experts} experts; "
            f"give it at most {num_experts} slots"
        )


class Residency:
    """
    The slots of one layer, at least 1 and at most as many as experts, filled lowest first.

    After that a load takes the slot of the expert that *policy* (used by no other layer, or a name)
    gives up. Experts of one decision are never evicted for one another. *slot_of* int64
    (num_experts,) and *expert_of* int64 (capacity,), -1 for none, are always the same arrays.
    """

    def __init__(self, num_experts: int, capacity: int, policy: "Policy | str" = DEFAULT_POLICY):
        check_capacity(num_experts, capacity)
        self.num_experts = num_experts
        self.capacity = capacity
        self.slot_of = np.full(num_experts, -1, dtype=np.int64)
        self.expert_of = np.full(capacity, -1, dtype=np.int64)
        # The same facts again as a dictionary: looking one id up in an array costs five times more.
        self._slot: dict[int, int] = {}
        self._all = frozenset(range(num_experts))
        self.policy: Policy = make_policy(policy) if isinstance(policy, str) else policy
        self.policy.reset(num_experts)
        self._use = self.policy.use

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, expert: int) -> bool:
        return expert in self._slot

    # --- requests -------------------------------------------------------------------------------

    def request(self, experts: Sequence[int]) -> Decision:
        """
        Make *experts* resident together, and say which transfers that takes.

        They are distinct ids, ascending, which is what breaks the policy's ties; both hits and
        loads come in their order. No ids, no request.

        Raises:
            CacheTooSmallError: more ids than slots. Nothing has changed; use `request_in_parts`.
            ValueError: an id out of range or given twice; looked at only when something is missing.
        """
        if isinstance(experts, np.ndarray):
            experts = experts.tolist()
        slot = self._slot
        missing = [expert for expert in experts if expert not in slot]
        if not missing:  # which also proves all ids to be in range
            if experts:
                self._use(experts)
            return Decision(tuple(experts), _NOTHING)
        if len(experts) > self.capacity:
            raise CacheTooSmallError(
                f"one request needs {len(experts)} experts of a layer that has {self.capacity} "
                f"slots; give the layer {len(experts)} slots, or feed fewer tokens at once"
            )
        needed = self.check(experts)
        # Lists, not generators: this runs per layer and token, and they take half the time.
        hits = tuple([expert for expert in experts if expert in slot])
        self._use(experts)
        return Decision(hits, self._admit(missing, needed))

    def request_in_parts(
        self, experts: Sequence[int], uses: Sequence[int] | None = None
    ) -> Iterator[Decision]:
        """
        Serve a request of any size, by as many decisions as it takes.

        One that fits is that of `request`. Otherwise the first holds the residents, ids ascending,
        and as many missing ones as there are slots left; the rest follow in decisions of
        `capacity`. The missing come in ascending order of *uses* (absent: one each), then id, so
        that the most used stay resident. The policy notes one request, in the order served. Compute
        with one decision before asking for the next, which may evict. ValueError as in `request`.
        """
        if len(experts) <= self.capacity:
            return iter((self.request(experts),))
        if isinstance(experts, np.ndarray):
            experts = experts.tolist()
        self.check(experts)
        return self._parts(experts, uses)

    def _parts(self, experts: Sequence[int], uses: Sequence[int] | None) -> Iterator[Decision]:
        hits, missing = self._sorted(experts, uses)
        self._use(hits + missing)
        room = self.capacity - len(hits)
        first = missing[:room]
        yield Decision(tuple(hits), self._admit(first, {*hits, *first}))
        for start in range(room, len(missing), self.capacity):
            part = missing[start : start + self.capacity]
            yield Decision((), self._admit(part, set(part)))

    def request_with_host(
        self,
        experts: Sequence[int],
        uses: Sequence[int] | None = None,
        *,
        load: Callable[[Sequence[int]], int],
    ) -> tuple[Decision, tuple[int, ...]]:
        """
        Serve a request of any size by loading some of the missing, and leave others to the host.

        *load* says from the *uses* of each missing expert, ascending, how many are loaded: the most
        used, ties the higher ids, cut to the slots beside the hits. The policy notes one request of
        all. Returns the decision, and the ids left to the host, least used first.
        """
        if isinstance(experts, np.ndarray):
            experts = experts.tolist()
        self.check(experts)
        if not experts:
            return Decision((), _NOTHING), ()
        hits, missing = self._sorted(experts, uses)
        of = dict(zip(experts, [1] * len(experts) if uses is None else uses, strict=True))
        # In the order of `request_in_parts`, so that to load everything is to be served by it.
        self._use(list(experts) if len(experts) <= self.capacity else hits + missing)
        wanted = load([of[expert] for expert in missing]) if missing else 0
        count = max(0, min(wanted, self.capacity - len(hits)))
        on_host, loaded = missing[: len(missing) - count], missing[len(missing) - count :]
        return Decision(tuple(hits), self._admit(loaded, {*hits, *loaded})), tuple(on_host)

    def _sorted(
        self, experts: Sequence[int], uses: Sequence[int] | None
    ) -> tuple[list[int], list[int]]:
        """Residents by id, and the missing by uses and id, the most used last."""
        of = dict(zip(experts, [1] * len(experts) if uses is None else uses, strict=True))
        hits = sorted(expert for expert in experts if expert in self._slot)
        missing = (expert for expert in experts if expert not in self._slot)
        return hits, sorted(missing, key=lambda expert: (of[expert], expert))

    # --- prefetches -----------------------------------------------------------------------------

    def prefetch(self, experts: Sequence[int]) -> Decision:
        """
        Load *experts* ahead of need, the most wanted first; those beyond `capacity` are dropped.
        None is evicted for another of the same call. To the policy it is one request, the most
        wanted served last, unless `Policy.prefetched` says else.
        """
        if isinstance(experts, np.ndarray):
            experts = experts.tolist()
        self.check(experts)
        kept = experts[: self.capacity]
        if not kept:
            return Decision((), _NOTHING)
        missing = [expert for expert in kept if expert not in self._slot]
        hits = tuple([expert for expert in kept if expert in self._slot])
        self.policy.prefetched(kept[::-1])
        return Decision(hits, self._admit(missing, set(kept)))

    # --- slots ----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Empty all slots, and let the policy forget."""
        self._slot.clear()
        self.slot_of.fill(-1)
        self.expert_of.fill(-1)
        self.policy.reset(self.num_experts)

    def _admit(self, missing: Sequence[int], needed: set[int]) -> tuple[Load, ...]:
        """Put *missing* into the free slots, then into those of victims; nobody of *needed*."""
        slot_of, expert_of, slot = self.slot_of, self.expert_of, self._slot
        # A slot once filled never falls free but by `reset`, so the free ones are the last ones.
        filled = len(slot)
        free = self.capacity - filled
        victims: Sequence[int] = ()
        if not missing:
            return _NOTHING
        if len(missing) > free:
            candidates = sorted([expert for expert in slot if expert not in needed])
            victims = self.policy.victims(candidates, len(missing) - free)
        loads = []
        for number, expert in enumerate(missing):
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

    def check(self, experts: Sequence[int]) -> set[int]:
        """Make *experts* a set; ValueError if an id is out of range or given twice."""
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


# --- prompts that must not push out what decoding uses --------------------------------------------


class Stream(NamedTuple):
    """Split a request: resident ids, ascending; ids given slots; ids that pass, most used first."""

    hits: tuple[int, ...]
    admitted: tuple[Load, ...]
    passing: tuple[int, ...]

    @property
    def loads(self) -> int:
        """Experts copied: each that was not resident, once."""
        return len(self.admitted) + len(self.passing)


@dataclass(frozen=True)
class StreamedPrefill:
    """
    Serve prompts without losing the experts that decoding uses.

    Experts that are not resident pass through staging memory; only the most used of them (ties: the
    lowest id) get slots: the free ones, and at most *admit* more (None: no limit), in place of
    residents that the pass does not use, by the policy. The policy hears of one request, ascending
    by uses, then id.
    """

    admit: int | None = None

    def __post_init__(self) -> None:
        if self.admit is not None and self.admit < 0:
            raise ValueError(f"admit cannot be {self.admit}; it must be 0 or more, or None")

    def serve(self, residency: Residency, experts: Sequence[int], uses: Sequence[int]) -> Stream:
        """Decide one request of a prompt, and remember what it admits."""
        if not len(experts):
            return Stream((), (), ())
        needed = residency.check(experts)
        count = dict(zip(experts, uses, strict=True))
        hits = tuple(expert for expert in experts if expert in residency)
        missing = sorted(needed.difference(hits), key=lambda expert: (-count[expert], expert))
        residency.policy.use(sorted(experts, key=lambda expert: (count[expert], expert)))
        free = residency.capacity - len(residency)
        replaceable = len(residency) - len(hits)
        room = free + (replaceable if self.admit is None else min(self.admit, replaceable))
        admitted = residency._admit(missing[:room], needed)
        return Stream(hits, admitted, tuple(missing[room:]))
