"""One cache for the experts of all layers: the same residency, seen by each layer as its own."""

from collections.abc import Callable, Collection, Iterator, Sequence

from melinoe.cache.policy import Policy
from melinoe.cache.residency import Load, Plan, Residency


class SharedLayer:
    """
    What one layer sees of a residency that all layers share; made by `share`.

    It takes and returns the layer's own ids, as a `Residency` of the layer would. Slots are those
    of the whole cache, and `Load.evicted` is ``layer * num_experts + expert``, because the expert
    that leaves may be another layer's.

    Attributes:
        num_experts: Of this layer.
        capacity: Slots of the whole cache.
        policy: Of the whole cache.
        slot_of: int64 (num_experts,), -1 where absent; always the same array, changed in place.
        key: What an expert's id grows by to be its name in the whole cache.
    """

    def __init__(self, whole: Residency, layer: int, num_experts: int):
        self._whole = whole
        self.num_experts = num_experts
        self.capacity = whole.capacity
        self.policy = whole.policy
        self.key = layer * num_experts
        self.slot_of = whole.slot_of[self.key : self.key + num_experts]

    def request(
        self,
        experts: Sequence[int],
        uses: Sequence[int] | None = None,
        scores: Sequence[float] | None = None,
    ) -> Plan:
        """As `Residency.request`."""
        return self._own(self._whole.request(self._keys(experts), uses, scores))

    def plans(
        self,
        experts: Sequence[int],
        uses: Sequence[int] | None = None,
        scores: Sequence[float] | None = None,
    ) -> Iterator[Plan]:
        """As `Residency.plans`."""
        return map(self._own, self._whole.plans(self._keys(experts), uses, scores))

    def partly(
        self,
        experts: Sequence[int],
        uses: Sequence[int] | None = None,
        scores: Sequence[float] | None = None,
        *,
        load: Callable[[Sequence[int]], int],
    ) -> tuple[Plan, tuple[int, ...]]:
        """As `Residency.partly`."""
        plan, there = self._whole.partly(self._keys(experts), uses, scores, load=load)
        return self._own(plan), tuple([expert - self.key for expert in there])

    def prefetch(self, experts: Sequence[int], spare: Collection[int] = ()) -> Plan:
        """As `Residency.prefetch`; ids to spare are those of the whole cache."""
        return self._own(self._whole.prefetch(self._keys(experts), spare))

    def forget_prefetches(self, *, but: Collection[int] = ()) -> None:
        """As `Residency.forget_prefetches`, of this layer's experts."""
        own = range(self.key, self.key + self.num_experts)
        self._whole.forget_prefetches(own, self._keys(list(but)))

    def reset(self) -> None:
        """Empty the whole cache: all layers' slots, and the policy's memory."""
        self._whole.reset()

    def check(self, experts: Sequence[int]) -> set[int]:
        """As `Residency.check`."""
        self._whole.check(self._keys(experts))
        return set(experts)

    def __contains__(self, expert: int) -> bool:
        return self.key + expert in self._whole

    def _keys(self, experts: Sequence[int]) -> list[int]:
        if len(experts) and not (min(experts) >= 0 and max(experts) < self.num_experts):
            raise ValueError(
                f"a request names an expert outside 0 to {self.num_experts - 1}: {list(experts)}"
            )
        return [self.key + expert for expert in experts]

    def _own(self, plan: Plan) -> Plan:
        key = self.key
        return Plan(
            tuple([expert - key for expert in plan.hits]),
            tuple([Load(load.expert - key, load.slot, load.evicted) for load in plan.loads]),
            plan.first_uses,
        )


def share(
    num_layers: int, num_experts: int, capacity: int, policy: "Policy | str"
) -> list[SharedLayer]:
    """
    One cache of *capacity* slots for all layers, as each layer sees it.

    Args:
        num_layers: Layers that share it.
        num_experts: Experts of each layer.
        capacity: Slots in all, 1 to ``num_layers * num_experts``.
        policy: Of the whole cache; it hears of every layer's requests, in the order they are made.

    Raises:
        CacheTooSmallError, MelinoeError: as `Residency`.
    """
    whole = Residency(num_layers * num_experts, capacity, policy)
    return [SharedLayer(whole, layer, num_experts) for layer in range(num_layers)]
