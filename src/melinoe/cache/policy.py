"""
Policies: which resident expert leaves when another needs its slot.

A policy belongs to one layer of one model. It hears of every request before it is asked for
victims, and it never sees slots or bytes. To add one: subclass `Policy`, give it a name, and
decorate it with `register`.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from melinoe.errors import MelinoeError


class Policy:
    """
    What a residency asks before it evicts.

    Both methods must be deterministic: the same calls give the same answers, on every machine.
    """

    name: ClassVar[str] = ""

    def reset(self, num_experts: int) -> None:
        """Forget everything; from now on ids lie in ``[0, num_experts)``."""
        raise NotImplementedError

    def use(self, experts: Sequence[int]) -> None:
        """
        Note one request.

        Called once per request, before its victims are chosen, with all its distinct experts (at
        least one), resident or not. Those listed later are served later: ids ascend when the
        request fits into the slots (see `melinoe.cache.residency` for the order when it does not).
        """
        raise NotImplementedError

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """
        Choose who leaves, the first to go first.

        Args:
            candidates: Resident experts that may leave, ids ascending; none is needed now.
            count: How many must leave, between 1 and ``len(candidates)``.

        Returns:
            *count* distinct ids out of *candidates*.
        """
        raise NotImplementedError

    def prefetched(self, experts: Sequence[int]) -> None:
        """Note a prefetch, the most wanted expert last; unless a policy differs, one request."""
        self.use(experts)


_known: dict[str, type[Policy]] = {}
_Class = TypeVar("_Class", bound=type[Policy])


def register(cls: _Class) -> _Class:
    """Make a policy known by its `name`; a decorator."""
    if not cls.name or cls.name in _known:
        raise ValueError(f"a policy needs a name of its own, and {cls.name!r} is not one")
    _known[cls.name] = cls
    return cls


def policy_names() -> list[str]:
    """Names of all known policies, sorted."""
    return sorted(_known)


def policy_class(name: str) -> type[Policy]:
    """
    Look a policy up.

    Raises:
        MelinoeError: unknown name; the message lists the known ones.
    """
    if name not in _known:
        raise MelinoeError(
            f"there is no cache policy {name!r}; choose one of {', '.join(policy_names())}"
        )
    return _known[name]


def policy(name: str, **options: Any) -> Policy:
    """
    Make a policy for one layer.

    Args:
        name: One of `policy_names`.
        options: What its class takes, for example ``gamma=0.9`` for ``lfu``.

    Raises:
        MelinoeError: unknown name, or ``belady`` without the requests to come.
    """
    cls = policy_class(name)
    if cls is Belady and "future" not in options:
        raise MelinoeError(
            "policy 'belady' must know all requests to come, so it only works in the simulator; "
            "choose lru or lfu to run a model"
        )
    return cls(**options)


@register
class LRU(Policy):
    """
    Evict the expert whose last use is longest ago.

    Rule: a clock ticks once per expert served; an expert's stamp is the tick of its last use;
    the lowest stamp leaves. Experts of one request are stamped in the order listed, so of two
    last used together the lower id leaves first. No two stamps are equal.

    Source:
        The usual rule; for experts of one layer, arXiv:2312.17238.
    """

    name = "lru"

    def reset(self, num_experts: int) -> None:
        """Forget all uses."""
        self._clock = 0
        self._stamp = [-1] * num_experts

    def use(self, experts: Sequence[int]) -> None:
        """Stamp the experts in the order listed."""
        clock, stamp = self._clock, self._stamp
        for expert in experts:
            stamp[expert] = clock
            clock += 1
        self._clock = clock

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Lowest stamps first."""
        if count == 1:
            return (min(candidates, key=self._stamp.__getitem__),)
        return sorted(candidates, key=self._stamp.__getitem__)[:count]


@register
class DecayedLFU(Policy):
    """
    Evict the expert with the lowest exponentially decayed count of uses.

    Rule: at each request every expert's score becomes ``gamma * score + (1 if used else 0)``,
    whether it is resident or not; the lowest score leaves, and of equal ones the lowest id.
    How many tokens of a request used an expert does not matter.

    Scores are kept in a growing unit instead of being decayed one by one, so a request costs as
    many additions as it has experts: the n-th request adds ``gamma ** -n``. When that unit
    passes 2**512, it and all scores are divided by the power of two in it, which rounds nothing;
    a score that falls below the smallest double this way counts as zero.

    Args:
        gamma: Decay per request, in [0.001, 1]; 1 counts uses without forgetting.

    Raises:
        ValueError: *gamma* is outside its range.

    Source:
        The cache of the training loss of arXiv:2602.11192 (closed form s <- gamma s + r), with
        hard slots in place of soft ones.
    """

    name = "lfu"

    def __init__(self, gamma: float = 0.9):
        if not 0.001 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}, and must lie between 0.001 and 1")
        self.gamma = gamma

    def reset(self, num_experts: int) -> None:
        """All scores zero."""
        self._unit = 1.0
        self._score = [0.0] * num_experts

    def use(self, experts: Sequence[int]) -> None:
        """Decay everyone by growing the unit, then credit the experts used."""
        unit = self._unit / self.gamma
        if unit > 2.0**512:
            unit = self._rescale(unit)
        self._unit = unit
        score = self._score
        for expert in experts:
            score[expert] += unit

    def _rescale(self, unit: float) -> float:
        shift = math.frexp(unit)[1]
        self._score[:] = [math.ldexp(score, -shift) for score in self._score]
        return math.ldexp(unit, -shift)

    def scores(self) -> list[float]:
        """Scores in units of one use now, float (num_experts,)."""
        return [score / self._unit for score in self._score]

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Lowest scores first; *candidates* ascend, and both min and sort keep the first."""
        if count == 1:
            return (min(candidates, key=self._score.__getitem__),)
        return sorted(candidates, key=self._score.__getitem__)[:count]


@register
class Belady(Policy):
    """
    Evict the expert whose next use is furthest ahead: the fewest loads possible, offline.

    Rule: the expert whose next request comes last leaves, those never requested again first,
    and of equal ones the lowest id. Experts next used by the same request are equal for good:
    whichever leaves, one of them must be loaded then. A request with more experts than slots is
    served in the order that `Residency.plans` fixes, and the bound holds given that order.
    A prefetch is no request, and changes nothing.

    Args:
        future: All requests of the layer in order, each its distinct experts; empty ones are none.

    Raises:
        ValueError: from `use`, when a request is not the promised one.

    Source:
        L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM
        Systems Journal 5(2), 1966.
    """

    name = "belady"

    def __init__(self, future: Sequence[Sequence[int]]):
        self._future = [request for request in future if len(request)]
        self._ahead: list[list[float]] | None = None

    def reset(self, num_experts: int) -> None:
        """
        Before the first use: start at the first request. Later: empty slots, same place in time.

        The requests to come are still to come when the cache is emptied between two prompts.
        """
        if self._ahead is not None:
            return
        # Requests ahead per expert, the nearest last, so that passing one is a pop.
        ahead: list[list[float]] = [[math.inf] for _ in range(num_experts)]
        for when in range(len(self._future) - 1, -1, -1):
            for expert in self._future[when]:
                ahead[expert].append(when)
        self._ahead = ahead
        self._next = [of_one[-1] for of_one in ahead]
        self._now = 0

    def use(self, experts: Sequence[int]) -> None:
        """Move one request on."""
        assert self._ahead is not None
        for expert in experts:
            if self._next[expert] != self._now:
                raise ValueError(
                    f"request {self._now} uses expert {expert}, which the future did not promise"
                )
            self._ahead[expert].pop()
            self._next[expert] = self._ahead[expert][-1]
        self._now += 1

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Furthest next use first."""
        return sorted(candidates, key=self._next.__getitem__, reverse=True)[:count]

    def prefetched(self, experts: Sequence[int]) -> None:
        """Nothing: the future stays what it is."""
