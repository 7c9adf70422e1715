"""
Eviction policies: which resident expert of a layer leaves when another one needs its slot.

To add one, write a subclass of `Policy` with a name here under ``@register``, or decorate one of
your own. Those that look at the past are a `RankedPolicy` each: a number for every expert, kept up
by a plain function (``note_lru``, ...) that Python calls and `melinoe.cache.kernel` compiles.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from melinoe.errors import MelinoeError

_Policy = TypeVar("_Policy", bound="type[Policy]")
# Policies that the compiled replay knows, numbered there in this order.
COMPILED_POLICIES = ("lru", "lfu", "static", "belady")


class Policy:
    """
    Choose who is evicted; the same calls give the same answers, on every machine. *offline*: it
    must know all requests to come, so that it cannot run a model. *needs_data*: its name alone does
    not make one.
    """

    name: ClassVar[str] = ""
    offline: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    @classmethod
    def for_layer(cls, layer: int, num_layers: int, **options: Any) -> "Policy":
        """Make the policy of one layer; override it if options differ between layers."""
        return cls(**options)

    def reset(self, num_experts: int) -> None:
        """Forget everything; from now on ids lie in ``[0, num_experts)``."""
        raise NotImplementedError

    def use(self, experts: Sequence[int]) -> None:
        """Note one request, before its victims are chosen; experts served later stand later."""
        raise NotImplementedError

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Choose *count* of *candidates*, residents not needed now, ids ascending, who leave."""
        raise NotImplementedError

    def prefetched(self, experts: Sequence[int]) -> None:
        """Note a prefetch, the most wanted expert last; by default like a request."""
        self.use(experts)


_known: dict[str, type[Policy]] = {}


def register(cls: _Policy) -> _Policy:
    """Make a policy known by its name; a decorator. ValueError if the name is taken."""
    if cls.name in ("", *_known):
        raise ValueError(f"a cache policy needs a name of its own, and {cls.name!r} is not one")
    _known[cls.name] = cls
    return cls


def policy_class(name: str) -> type[Policy]:
    """Look a policy up; MelinoeError for an unknown name."""
    if name not in _known:
        raise MelinoeError(f"there is no cache policy {name!r}; choose one of {', '.join(_known)}")
    return _known[name]


# --- policies that look at the past ---------------------------------------------------------------


class RankedPolicy(Policy):
    """
    Keep a rank for every expert, resident or not; the lowest leaves, of equal ones the lowest id.

    Ranks depend on the requests alone, which makes these policies stack algorithms
    (`melinoe.cache.curves`), and outlive eviction. *note* keeps the state up with a request; being
    compiled as well it works on lists and arrays alike and calls nothing but `math`:
    ``note(experts, rank, now, gamma) -> now``, *rank* by expert. *start* is the first *now*.
    """

    note: ClassVar[Callable[..., float]]
    start: ClassVar[float] = 0.0
    gamma = 1.0

    def reset(self, num_experts: int) -> None:
        """Forget all requests."""
        self._now = self.start
        self._rank = [0.0] * num_experts
        self._note = type(self).note  # looked up once: `use` runs per layer and token

    def use(self, experts: Sequence[int]) -> None:
        """Let the rule keep its state up."""
        self._now = self._note(experts, self._rank, self._now, self.gamma)

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Lowest ranks first; *candidates* ascend, and both min and sort keep the first."""
        if count == 1:
            return (min(candidates, key=self._rank.__getitem__),)
        return sorted(candidates, key=self._rank.__getitem__)[:count]


def note_lru(experts, rank, now, gamma):  # type: ignore[no-untyped-def]
    """Stamp each expert with the time of its use."""
    for expert in experts:
        rank[expert] = now
        now += 1.0
    return now


@register
class LRU(RankedPolicy):
    """
    Evict the expert whose last use is longest ago; of one request the one listed earlier.

    Source:
        The usual rule; for experts of one layer, arXiv:2312.17238.
    """

    name = "lru"
    note = staticmethod(note_lru)


def note_lfu(experts, rank, now, gamma):  # type: ignore[no-untyped-def]
    """Decay every rank by growing the unit, *now*, then credit the experts used."""
    unit = now / gamma
    if unit > 2.0**512:
        shift = math.frexp(unit)[1]
        for expert in range(len(rank)):
            rank[expert] = math.ldexp(rank[expert], -shift)
        unit = math.ldexp(unit, -shift)
    for expert in experts:
        rank[expert] += unit
    return unit


@register
class DecayedLFU(RankedPolicy):
    """
    Evict the expert used least, where old uses count less.

    With each request every score becomes ``gamma * score``, then each expert requested gains 1.
    Scores are kept in a unit that grows by ``1 / gamma`` per request instead; near the end of the
    double range all are divided by a power of two, which rounds nothing. *gamma* lies in [0.001,
    1]; 1 never forgets. The default loads less than .9 on every trace of docs/findings.md at half
    of the experts.

    Source:
        The cache of the training loss of arXiv:2602.11192, with hard slots in place of soft ones.
    """

    name = "lfu"
    note = staticmethod(note_lfu)
    start = 1.0

    def __init__(self, gamma: float = 0.98):
        if not 0.001 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}, and must lie between 0.001 and 1")
        self.gamma = gamma

    def scores(self) -> list[float]:
        """Scores in units of one use now, float (num_experts,)."""
        return [rank / self._now for rank in self._rank]


# --- policies that know something -----------------------------------------------------------------


@register
class Static(Policy):
    """
    Keep the experts that were popular on other traffic: the lowest *popularity* leaves, then the
    lowest id.

    `for_layer` takes (layers, num_experts). With the popular ones prefetched and misses computed on
    the host nothing ever moves: that is the source's placement.

    Source:
        Fiddler, arXiv:2402.07033, which places experts by popularity on calibration data.
    """

    name = "static"
    needs_data = True

    def __init__(self, popularity: Sequence[float]):
        self._popularity = [float(value) for value in popularity]

    @classmethod
    def for_layer(cls, layer: int, num_layers: int, **options: Any) -> "Policy":
        """Take this layer's row of the popularities."""
        rows = options.pop("popularity", None)
        if rows is None or len(rows) != num_layers:
            raise MelinoeError(
                f"policy 'static' needs the popularity of every expert in all {num_layers} layers; "
                "give a trace of this model to count it from"
            )
        return cls(rows[layer], **options)

    def reset(self, num_experts: int) -> None:
        """Check the number of experts; there is nothing to forget."""
        if len(self._popularity) != num_experts:
            raise ValueError(
                f"popularity is given for {len(self._popularity)} experts of {num_experts}"
            )

    def use(self, experts: Sequence[int]) -> None:
        """Change nothing: the order was fixed before."""

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Least popular first."""
        return sorted(candidates, key=self._popularity.__getitem__)[:count]


@register
class Belady(Policy):
    """
    Evict the expert whose next use is furthest ahead: the fewest loads possible, offline.

    Those never requested again leave first, of equal ones the lowest id. A request with more
    experts than slots is served in the order of `Residency.request_in_parts`, and the bound holds
    given that order. A prefetch changes nothing. *future*: all requests of the layer in order;
    ValueError from `use` for another one.

    Source:
        L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems
            Journal 5(2), 1966.
    """

    name = "belady"
    offline = True

    def __init__(self, future: Sequence[Sequence[int]]):
        self._future = [request for request in future if len(request)]
        self._ahead: list[list[float]] | None = None

    @classmethod
    def for_layer(cls, layer: int, num_layers: int, **options: Any) -> "Policy":
        """Take this layer's future."""
        future = options.pop("future")
        return cls(future[layer], **options)

    def reset(self, num_experts: int) -> None:
        """Before the first use: start at the first request. Later: keep the place in time."""
        if self._ahead is not None:  # slots are emptied between two prompts; time goes on
            return
        # Requests ahead per expert, the nearest last, so that passing one is a pop.
        self._ahead = [[math.inf] for _ in range(num_experts)]
        for when in range(len(self._future) - 1, -1, -1):
            for expert in self._future[when]:
                self._ahead[expert].append(when)
        self._now = 0

    def use(self, experts: Sequence[int]) -> None:
        """Move one request on."""
        assert self._ahead is not None
        for expert in experts:
            if self._ahead[expert][-1] != self._now:
                raise ValueError(
                    f"request {self._now} uses expert {expert}, which the future did not promise"
                )
            self._ahead[expert].pop()
        self._now += 1

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Furthest next use first."""
        ahead = self._ahead
        assert ahead is not None
        return sorted(candidates, key=lambda expert: ahead[expert][-1], reverse=True)[:count]

    def prefetched(self, experts: Sequence[int]) -> None:
        """Change nothing: the future stays what it is."""


# --- policies by name -----------------------------------------------------------------------------


def servable_names() -> tuple[str, ...]:
    """Names that run a model by themselves: those that need neither data nor the future."""
    return tuple(n for n, cls in _known.items() if not cls.offline and not cls.needs_data)


def policy(name: str, **options: Any) -> Policy:
    """Make a policy for one layer; MelinoeError for an unknown name, or one without its future."""
    return _class_for(name, options)(**options)


def policy_makers(
    name: str, options: Mapping[str, Any], num_layers: int
) -> list[Callable[[], Policy]]:
    """Functions that make the policy of each layer; otherwise as `policy`."""
    cls = _class_for(name, options)
    return [
        lambda layer=layer: cls.for_layer(layer, num_layers, **options)  # type: ignore[misc]
        for layer in range(num_layers)
    ]


def _class_for(name: str, options: Mapping[str, Any]) -> type[Policy]:
    cls = policy_class(name)
    if cls.offline and "future" not in options:
        raise MelinoeError(
            f"policy {cls.name!r} must know all requests to come, so it only works in the "
            "simulator; choose lru or lfu to run a model"
        )
    return cls
