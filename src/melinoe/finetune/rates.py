"""
Ranks and learning rates that work with no option at all, from the model's shape.

    rank of an update             128 / experts per token, in fours, at most 32
    rate of low-rank updates      5e-4 (2000 / width)^0.781
    rate of routers               0.55 / width

Sources, and what was measured at width 128: docs/method.md#learning-rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from melinoe.config import FinetuneSettings
from melinoe.moe.routing import Router


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of a run, the rank of its updates, and the model's width."""

    width: int
    routers: float
    low_rank: float
    rank: int

    @classmethod
    def of(cls, routers: Sequence[Router], settings: FinetuneSettings) -> "Rates":
        """Take what *settings* name, and the rules for the rest; see `FinetuneSettings`."""
        width = routers[0].weight.shape[-1]
        named = settings.learning_rate
        low_rank = settings.lora_learning_rate or named or 5e-4 * (2000 / width) ** 0.781
        rank = settings.lora_rank or default_rank(routers[0].top_k or 4)
        return cls(width, named or 0.55 / width, low_rank, rank)


def default_rank(top_k: int) -> int:
    """Rank of each expert's update in a model that uses *top_k* experts a token."""
    return max(4, min(32, 128 // top_k // 4 * 4))
