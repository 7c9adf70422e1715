"""
Residency: which experts of one layer are in which slots, and what a request must load.

It decides and remembers; it moves no bytes. The simulator and the runtime drive the same class
with the same calls, which is why their counts agree.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from melinoe.cache.policy import Policy
from melinoe.cache.policy import policy as make_policy
from melinoe.cache.slots import Decision, Load, Slots
from melinoe.errors import CacheTooSmallError

__all__ = ["Decision", "Load", "Residency"]

_NOTHING: tuple[Load, ...] = ()


class Residency(Slots):
    """
    The slots of one layer.

    Free slots are filled lowest first; after that a load takes the slot of the expert that the
    policy gives up. Experts of one plan are never evicted for one another.

    Args:
        num_experts: Experts of the layer; ids lie in ``[0, num_experts)``.
        capacity: Slots, at least 1 and at most *num_experts*.
        policy: A `Policy` used by no other layer, or the name of one.

    Attributes:
        slot_of: int64 (num_experts,), -1 where absent; always the same array, changed in place.
        expert_of: int64 (capacity,), -1 where empty; always the same array, changed in place.

    Raises:
        CacheTooSmallError: *capacity* is below 1.
        MelinoeError: *capacity* is above *num_experts*, or no policy has that name.
    """

    def __init__(self, num_experts: int, capacity: int, policy: "Policy | str" = "lru"):
        super().__init__(num_experts, capacity)
        self.policy: Policy = make_policy(policy) if isinstance(policy, str) else policy
        self._unused: set[int] = set()  # resident by a prefetch, and not requested since
        self.policy.reset(num_experts)
        self._use = self.policy.use

    def request(
        self,
        experts: Sequence[int],
        uses: Sequence[int] | None = None,
        scores: Sequence[float] | None = None,
    ) -> Decision:
        """
        Make *experts* resident together, and say which transfers that takes.

        Args:
            experts: Distinct ids, ascending (any order works, but the order is what breaks the
                policy's ties), at most `capacity` of them.
            uses: How many (token, choice) pairs picked each; one plan does not depend on it.
            scores: How much the router wanted each, for policies that ask (`Policy.weigh`).

        Returns:
            Ids that were resident, and one `Load` per id that was not, both in the order given.
            No ids, no request: the plan is empty and the policy does not hear of it.

        Raises:
            CacheTooSmallError: more ids than slots. Nothing has changed; use `request_in_parts`.
            ValueError: an id is out of range or given twice. Nothing has changed. (Looked at
                only when something is missing, to keep the usual request cheap.)
        """
        if isinstance(experts, np.ndarray):
            experts = experts.tolist()
        slot = self._slot
        missing = [expert for expert in experts if expert not in slot]
        if not missing:  # which also proves all ids to be in range
            if experts:  # else nobody chose an expert here, and the policy hears of no request
                if scores is not None:
                    self.policy.weigh(experts, scores)
                self._use(experts)
            first = self.first_uses(experts) if self._unused else 0
            return Decision(tuple(experts), _NOTHING, first)
        if len(experts) > self.capacity:
            raise CacheTooSmallError(
                f"one request needs {len(experts)} experts of a layer that has {self.capacity} "
                f"slots; give the layer {len(experts)} slots, or feed fewer tokens at once"
            )
        needed = self.check(experts)
        # Lists, not generators: this runs per layer and token, and they take half the time.
        hits = tuple([expert for expert in experts if expert in slot])
        if scores is not None:
            self.policy.weigh(experts, scores)
        self._use(experts)
        first = self.first_uses(experts) if self._unused else 0
        return Decision(hits, self._admit(missing, needed), first)

    def request_in_parts(
        self,
        experts: Sequence[int],
        uses: Sequence[int] | None = None,
        scores: Sequence[float] | None = None,
    ) -> Iterator[Decision]:
        """
        Serve a request of any size, in as many plans as it takes.

        A request that fits is one plan, that of `request`. Otherwise the first plan holds the
        resident experts, ids ascending, and as many missing ones as there are slots left; the
        rest follow in plans of `capacity` experts. The missing come in ascending order of
        *uses*, ties by ascending id, so that the most used come last and stay resident. The
        policy notes one request, with the experts in the order in which they are served.

        Each expert is in exactly one plan. Compute with one plan before asking for the next:
        a later plan may evict the experts of an earlier one. Do not begin another request in
        between.

        Args:
            experts: Distinct ids, ascending.
            uses: How many (token, choice) pairs picked each; absent means one each.
            scores: As in `request`.

        Raises:
            ValueError: an id is out of range or given twice. Nothing has changed.
        """
        if len(experts) <= self.capacity:
            return iter((self.request(experts, None, scores),))
        if isinstance(experts, np.ndarray):
            experts = experts.tolist()
        self.check(experts)
        return self._in_parts(experts, uses, scores)

    def _in_parts(
        self,
        experts: Sequence[int],
        uses: Sequence[int] | None,
        scores: Sequence[float] | None,
    ) -> Iterator[Decision]:
        hits, missing = self._sorted(experts, uses)
        if scores is not None:
            self.policy.weigh(experts, scores)
        self._use(hits + missing)
        first_uses = self.first_uses(experts) if self._unused else 0
        room = self.capacity - len(hits)
        first = missing[:room]
        loads = self._admit(first, {*hits, *first}) if first else _NOTHING
        yield Decision(tuple(hits), loads, first_uses)
        for start in range(room, len(missing), self.capacity):
            part = missing[start : start + self.capacity]
            yield Decision((), self._admit(part, set(part)))

    def request_with_host(
        self,
        experts: Sequence[int],
        uses: Sequence[int] | None = None,
        scores: Sequence[float] | None = None,
        *,
        load: Callable[[Sequence[int]], int],
    ) -> tuple[Decision, tuple[int, ...]]:
        """
        Serve a request of any size by loading some of the missing, and computing the rest there.

        What is not loaded is computed where it lives (on the host's processor), so that it needs
        no slot and everything is one plan. The most used are loaded, of equally used ones those of
        the higher ids, which `request_in_parts` keeps too. The policy notes one request of all.

        Args:
            experts, uses, scores: As in `request_in_parts`.
            load: From the *uses* of each missing expert, ascending, to how many of them to load;
                cut to the slots beside the hits.

        Returns:
            The plan, and the ids that were neither resident nor loaded, least used first.

        Raises:
            ValueError: an id is out of range or given twice. Nothing has changed.
        """
        if isinstance(experts, np.ndarray):
            experts = experts.tolist()
        self.check(experts)
        if not experts:
            return Decision((), _NOTHING), ()
        hits, missing = self._sorted(experts, uses)
        of = {} if uses is None else dict(zip(experts, uses, strict=True))
        if scores is not None:
            self.policy.weigh(experts, scores)
        # In the order of `request_in_parts`, so that to load everything is to be served by it.
        self._use(list(experts) if len(experts) <= self.capacity else hits + missing)
        wanted = load([of.get(expert, 1) for expert in missing]) if missing else 0
        count = max(0, min(wanted, self.capacity - len(hits)))
        there, here = missing[: len(missing) - count], missing[len(missing) - count :]
        first = self.first_uses(experts) if self._unused else 0
        loads = self._admit(here, {*hits, *here}) if here else _NOTHING
        return Decision(tuple(hits), loads, first), tuple(there)

    def _sorted(
        self, experts: Sequence[int], uses: Sequence[int] | None
    ) -> tuple[list[int], list[int]]:
        """Residents by id, and the missing by uses and id, the most used last."""
        hits = sorted(expert for expert in experts if expert in self._slot)
        weight = (
            dict.fromkeys(experts, 1) if uses is None else dict(zip(experts, uses, strict=True))
        )
        missing = sorted(
            (expert for expert in experts if expert not in self._slot),
            key=lambda expert: (weight[expert], expert),
        )
        return hits, missing

    def first_uses(self, experts: Sequence[int]) -> int:
        """Note that a request needs *experts*; how many a prefetch had brought for the first."""
        used = self._unused.intersection(experts)
        self._unused -= used
        return len(used)

    def forget_prefetches(self, but: Collection[int] = ()) -> None:
        """
        Count no longer whether what prefetches brought so far is used.

        That is done when a text begins: what was brought for the one before, and not used by it,
        was wasted, whatever the next one finds.

        Args:
            but: Ids that still count.
        """
        self._unused.intersection_update(but)

    def prefetch(self, experts: Sequence[int], spare: Collection[int] = ()) -> Decision:
        """
        Load experts ahead of need.

        Only those not resident are loaded, and none is evicted for another of the same call.
        To the policy a prefetch is one request of the experts kept, the most wanted served last
        (so most recently); a policy may differ and says so in `Policy.prefetched`.

        Args:
            experts: Distinct ids, the most wanted first; those beyond `capacity` are dropped.
            spare: Ids that are not evicted for them; what then finds no slot is dropped too.

        Raises:
            ValueError: an id is out of range or given twice. Nothing has changed.
        """
        if isinstance(experts, np.ndarray):
            experts = experts.tolist()
        self.check(experts)
        kept = experts[: self.capacity]
        needed = set(kept)
        if spare:
            needed.update(spare)
            room = self.capacity - sum(expert in needed for expert in self._slot)
            absent = [expert for expert in kept if expert not in self._slot]
            dropped = set(absent[max(room, 0) :])
            kept = [expert for expert in kept if expert not in dropped]
        if not kept:
            return Decision((), _NOTHING)
        hits = tuple([expert for expert in kept if expert in self._slot])
        missing = [expert for expert in kept if expert not in self._slot]
        self.policy.prefetched(kept[::-1])
        loads = self._admit(missing, needed) if missing else _NOTHING
        self._unused.update(missing)
        return Decision(hits, loads)

    def reset(self) -> None:
        """Empty all slots, and let the policy forget."""
        self.clear()
        self._unused.clear()
        self.policy.reset(self.num_experts)

    def _admit(self, missing: Sequence[int], needed: set[int]) -> tuple[Load, ...]:
        """Put *missing* into slots, evicting nobody in *needed*."""
        short = len(missing) - self.free
        if short <= 0:
            return self.put(missing)
        candidates = sorted([expert for expert in self._slot if expert not in needed])
        victims = self.policy.victims(candidates, short)
        self._unused.difference_update(victims)
        return self.put(missing, victims)

    def check_invariants(self) -> None:
        """As `Slots.check_invariants`; and what a prefetch brought is there."""
        super().check_invariants()
        assert self._unused <= self._slot.keys()
