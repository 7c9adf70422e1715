"""The strategies that `melinoe bench` runs: policies x slots x prefetch, and the two extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from melinoe.cache.policy import policy_class
from melinoe.errors import BudgetError, MelinoeError
from melinoe.prefetch import (
    NONE,
    Given,
    Prefetcher,
    Timed,
    prefetcher,
    prefetcher_class,
)

ON_DEMAND, ALL_RESIDENT = "on demand", "all resident"


@dataclass(frozen=True)
class Strategy:
    """
    One way to serve.

    Attributes:
        name: For tables.
        slots: Experts of each layer.
        policy: Which leaves.
        prefetch: What is loaded ahead of need; a name that `melinoe.prefetch` knows.
        warm: Whether the cache keeps what the prompt before left; with every expert resident
            nothing else would make sense.
    """

    name: str
    slots: int
    policy: str
    prefetch: str = NONE
    warm: bool = False

    @property
    def runtime(self) -> tuple[int, str, bool]:
        """Strategies alike in this share a runtime: slots, policy, and whether it stays warm."""
        return self.slots, self.policy, self.warm


def prefetcher_of(strategy: Strategy, given: Given | None) -> Prefetcher | None:
    """
    What a strategy loads ahead, made of *given*; its moment is for those that have a choice.

    Raises:
        MelinoeError: what it is made of is missing.
    """
    if strategy.prefetch == NONE:
        return None
    given = given or Given()
    if not issubclass(prefetcher_class(strategy.prefetch), Timed):
        given = replace(given, at=None)
    return prefetcher(strategy.prefetch, given)


def strategies(
    num_experts: int,
    slots: Sequence[int],
    policies: Sequence[str],
    prefetches: Sequence[str] = (NONE,),
) -> list[Strategy]:
    """
    All combinations, between loading every expert that is asked for and holding all of them.

    Args:
        num_experts: Of a layer.
        slots: Numbers to try; each in ``[1, num_experts]``.
        policies: Names; those that look ahead cannot serve.
        prefetches: Names that `melinoe.prefetch` knows.

    Raises:
        BudgetError: a number of slots that the model cannot have.
        MelinoeError: an unknown policy or prefetch, or a policy that needs the future.
    """
    for count in slots:
        if not 1 <= count <= num_experts:
            raise BudgetError(
                f"{count} slots cannot be in layers of {num_experts} experts; "
                f"choose from 1 to {num_experts}"
            )
    for name in policies:
        if policy_class(name).offline:
            raise MelinoeError(
                f"policy {name!r} needs the future, which nobody has while serving; "
                "use `melinoe simulate` for it"
            )
    for name in prefetches:
        if name != NONE:
            prefetcher_class(name)
    out = [Strategy(ON_DEMAND, 1, "lru")]
    for count in dict.fromkeys(slots):
        for policy in dict.fromkeys(policies):
            for prefetch in dict.fromkeys(prefetches):
                name = policy if prefetch == NONE else f"{policy} + {prefetch} prefetch"
                out.append(Strategy(name, count, policy, prefetch))
    return [*out, Strategy(ALL_RESIDENT, num_experts, "lru", warm=True)]
