"""
Policies: which resident expert leaves when another needs its slot.

A policy belongs to the cache of one layer. It hears of every request before it is asked for
victims, and it never sees slots or bytes. To add one, subclass `Policy` and give it a name; then
either decorate the class with `register`, or let the package that holds it declare an entry point,
and melinoe finds it wherever policies are named:

    [project.entry-points."melinoe.policies"]
    mru = "my_package.mru:Mru"
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from melinoe.cache.registry import Registry
from melinoe.errors import MelinoeError

ENTRY_POINTS = "melinoe.policies"


class Policy:
    """
    What a residency asks before it evicts.

    All methods must be deterministic: the same calls give the same answers, on every machine.

    Attributes:
        name: By which it is chosen; the entry point that declares it has the same name.
        uses_scores: Whether `weigh` must be told the router's weights.
        offline: Whether it must know all requests to come, so that it cannot run a model.
    """

    name: ClassVar[str] = ""
    uses_scores: ClassVar[bool] = False
    offline: ClassVar[bool] = False

    @classmethod
    def for_layer(cls, layer: int, num_layers: int, **options: Any) -> "Policy":
        """
        Make the policy of one layer.

        A class whose options differ between layers overrides this.
        """
        return cls(**options)

    def reset(self, num_experts: int) -> None:
        """Forget everything; from now on ids lie in ``[0, num_experts)``."""
        raise NotImplementedError

    def weigh(self, experts: Sequence[int], scores: Sequence[float]) -> None:
        """
        Note how much the router wanted each expert of the request that `use` is told of next.

        Args:
            experts: As in `use`, ids ascending.
            scores: Mean over the pass's rows of the weight that the router gave the expert, 0 in
                rows that did not choose it; so they add up to at most 1 where a row's weights do.
        """

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


_registry = Registry(
    ENTRY_POINTS,
    Policy,
    {
        "belady": "melinoe.cache.belady:Belady",
        "lfru": "melinoe.cache.eviction:LFRU",
        "lfu": "melinoe.cache.eviction:DecayedLFU",
        "lru": "melinoe.cache.eviction:LRU",
        "score": "melinoe.cache.eviction:Score",
        "static": "melinoe.cache.eviction:Static",
    },
    kind="cache policy",
    word="cache policy",
)
_Class = TypeVar("_Class", bound=type[Policy])


def register(cls: _Class) -> _Class:
    """Make a policy known by its `name` in this process; a decorator."""
    return _registry.register(cls)


def policy_names() -> list[str]:
    """Names of all known policies, sorted: ours, registered ones, and installed entry points."""
    return sorted(_registry.names())


def policy_class(name: str) -> type[Policy]:
    """
    Look a policy up; a name of ours always means ours.

    Raises:
        MelinoeError: unknown name (the message lists the known ones), or an installed package that
            declares it cannot be loaded or declares something else.
    """
    return _registry.find(name)


def policy(name: str, **options: Any) -> Policy:
    """
    Make a policy for one layer.

    Args:
        name: One of `policy_names`.
        options: What its class takes, for example ``gamma=0.9`` for ``lfu``.

    Raises:
        MelinoeError: unknown name, or a policy that must know the requests to come and does not.
    """
    cls = policy_class(name)
    _check_future(cls, options)
    return cls(**options)


def policy_makers(
    name: str, options: Mapping[str, Any], num_layers: int
) -> list[Callable[[], Policy]]:
    """
    Functions that make the policy of each layer.

    Raises:
        MelinoeError: as `policy`.
    """
    cls = policy_class(name)
    _check_future(cls, options)
    return [
        lambda layer=layer: cls.for_layer(layer, num_layers, **options)  # type: ignore[misc]
        for layer in range(num_layers)
    ]


def _check_future(cls: type[Policy], options: Mapping[str, Any]) -> None:
    if cls.offline and "future" not in options:
        raise MelinoeError(
            f"policy {cls.name!r} must know all requests to come, so it only works in the "
            "simulator; choose lru or lfu to run a model"
        )


def __getattr__(name: str) -> Any:
    """Our own policies can also be imported from here, where their base is."""
    try:
        return _registry.own(name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
