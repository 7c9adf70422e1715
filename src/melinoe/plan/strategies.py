"""The strategies that `melinoe bench` runs: policies x slots x prefetch, and the two extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from melinoe.cache.policy import policy_class
from melinoe.errors import BudgetError, MelinoeError
from melinoe.predictor import Predictor

ON_DEMAND, ALL_RESIDENT = "on demand", "all resident"


@dataclass(frozen=True)
class Strategy:
    """
    One way to serve.

    Attributes:
        name: For tables.
        slots: Experts of each layer.
        policy: Which leaves.
        prefetch: What is loaded ahead of need: ``none``, ``learned``, ``popularity``.
        warm: Whether the cache keeps what the prompt before left; with every expert resident
            nothing else would make sense.
    """

    name: str
    slots: int
    policy: str
    prefetch: str = "none"
    warm: bool = False

    @property
    def runtime(self) -> tuple[int, str, bool]:
        """Strategies alike in this share a runtime: slots, policy, and whether it stays warm."""
        return self.slots, self.policy, self.warm


class Popularity:
    """A predictor's rival: experts that were popular where it was fitted, whatever the prompt."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def bind(self, model: Any, tokenizer: Any = None) -> None:
        """As `Predictor.bind`."""
        self._predictor.bind(model, tokenizer)

    def top(self, token_ids: Sequence[int], slots: int | None = None) -> list[list[int]]:
        """As `Predictor.top`; *token_ids* make no difference."""
        return self._predictor.top((), slots)


def strategies(
    num_experts: int,
    slots: Sequence[int],
    policies: Sequence[str],
    prefetches: Sequence[str] = ("none",),
) -> list[Strategy]:
    """
    All combinations, between loading every expert that is asked for and holding all of them.

    Args:
        num_experts: Of a layer.
        slots: Numbers to try; each in ``[1, num_experts]``.
        policies: Names; those that look ahead cannot serve.
        prefetches: ``none``, ``learned``, ``popularity``.

    Raises:
        BudgetError: a number of slots that the model cannot have.
        MelinoeError: an unknown policy, or one that needs the future.
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
    out = [Strategy(ON_DEMAND, 1, "lru")]
    for count in dict.fromkeys(slots):
        for policy in dict.fromkeys(policies):
            for prefetch in dict.fromkeys(prefetches):
                name = policy if prefetch == "none" else f"{policy} + {prefetch} prefetch"
                out.append(Strategy(name, count, policy, prefetch))
    return [*out, Strategy(ALL_RESIDENT, num_experts, "lru", warm=True)]
