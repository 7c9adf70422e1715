"""Strategies for `melinoe bench`: policies x slots x prefetches x misses x engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from melinoe.cache.policy import policy_class
from melinoe.cache.prefetch import (
    NONE,
    Given,
    Prefetcher,
    Timed,
    prefetcher,
    prefetcher_class,
)
from melinoe.errors import BudgetError, MelinoeError

ON_DEMAND, ON_THE_CPU, ALL_RESIDENT = "on demand", "all misses by the CPU", "all resident"
_MISSES = {"wait": "", "cpu": ", misses by the CPU", "split": ", misses split"}


@dataclass(frozen=True)
class Strategy:
    """
    One way to serve.

    Attributes:
        name: For tables.
        slots: Experts of each layer.
        policy: Which leaves.
        prefetch: What is loaded ahead of need; a name that `melinoe.cache.prefetch` knows.
        warm: Whether the cache keeps what the prompt before left; with every expert resident
            nothing else would make sense.
        miss: What is done about a miss: ``wait``, ``cpu``, ``split``.
        engine: ``reference`` or ``fast``.
    """

    name: str
    slots: int
    policy: str
    prefetch: str = NONE
    warm: bool = False
    miss: str = "wait"
    engine: str = "reference"

    @property
    def between_extremes(self) -> bool:
        """Whether it neither loads everything that is asked for nor holds everything."""
        return not self.name.startswith((ON_DEMAND, ON_THE_CPU, ALL_RESIDENT))

    @property
    def runtime(self) -> Strategy:
        """Strategies alike in all but prefetch share a runtime."""
        return replace(self, name="", prefetch=NONE)


def prefetcher_of(strategy: Strategy, given: Given | None) -> Prefetcher | None:
    """
    Make the prefetcher of a strategy of *given*; its moment is for those that have a choice.

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
    misses: Sequence[str] = ("wait",),
    engines: Sequence[str] = ("reference",),
) -> list[Strategy]:
    """
    All combinations, between loading every expert that is asked for and holding all of them.

    If the CPU computes all misses and nothing is loaded ahead, slots stay empty, so that is one
    strategy whatever the slots and the policy. The fast engine waits for misses, always.

    Args:
        num_experts: Of a layer.
        slots: Numbers to try; each in ``[1, num_experts]``.
        policies: Names; those that look ahead cannot serve.
        prefetches: Names that `melinoe.cache.prefetch` knows.
        misses: ``wait``, ``cpu``, ``split``.
        engines: ``reference``, ``fast``; each has its own run with every expert resident.

    Raises:
        BudgetError: a number of slots that the model cannot have.
        MelinoeError: an unknown policy or prefetch, or a policy that needs the future; or the fast
            engine alone is to compute misses on the CPU.
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
    if "reference" not in engines and set(misses) != {"wait"}:
        raise MelinoeError(
            "the fast engine waits for missing experts and cannot have the CPU compute them; leave "
            "--miss out, or add --engine reference"
        )
    out = []
    for engine in dict.fromkeys(engines):
        suffix = "" if engine == "reference" else f", {engine} engine"
        if engine == "reference":
            out.append(Strategy(ON_DEMAND, 1, "lru"))
        for miss in dict.fromkeys(misses) if engine == "reference" else ("wait",):
            for count in dict.fromkeys(slots):
                for policy in dict.fromkeys(policies):
                    out += [
                        Strategy(
                            _name(policy, prefetch, miss) + suffix, count, policy, prefetch,
                            miss=miss, engine=engine,
                        )
                        for prefetch in dict.fromkeys(prefetches)
                        if (miss, prefetch) != ("cpu", NONE)
                    ]  # fmt: skip
            if miss == "cpu" and NONE in prefetches:
                out.append(Strategy(ON_THE_CPU, slots[0], policies[0], miss=miss))
        out.append(Strategy(ALL_RESIDENT + suffix, num_experts, "lru", warm=True, engine=engine))
    return out


def _name(policy: str, prefetch: str, miss: str) -> str:
    ahead = "" if prefetch == NONE else f" + {prefetch} prefetch"
    return policy + ahead + _MISSES[miss]
