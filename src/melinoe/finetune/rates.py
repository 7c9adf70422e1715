"""
Ranks and learning rates that work with no option at all, from the model's shape.

    rank of an update             128 / experts per token, in fours, at most 32
    rate of low-rank updates      5e-4 (2000 / width)^0.781
    rate of routers               0.55 / width

The rank follows "LoRA Without Regret" (Thinking Machines, 2025): a mixture's total rank is shared
out over the experts that a token uses. It is 32 for the shipped model (4 of its experts a token),
16 for OLMoE and Qwen3 (8); that also keeps weights, gradients and the optimizer's state of the
updates to an eighth of an OLMoE checkpoint in bfloat16.

The rate of updates is the rule that Thinking Machines fitted over dense models of 1B to 70B for
updates of this form (5e-5 for full fine-tuning, ten times that for low-rank updates, the exponent
for Llama-like models; Tinker's supervised-learning hyperparameters and "LoRA Without Regret",
2025). At the shipped model's width of 128 it gives 4.3e-3; twice as much was better in domain and
forgot half as much again of other text (docs/method.md).

The rate of routers takes a rate that worked at width 128 to other widths as muP does for Adam
(arXiv:2203.03466): the step of a matrix falls as one over its inputs, so that a step moves each
logit alike at every width. At a width of 2,048 it gives 2.7e-4, five times what ReMoE
(arXiv:2605.27081) trains routers alone with for ten times as many steps; MELINOE's own 1e-5
(arXiv:2602.11192) changed nothing of the shipped model in 200 steps.

Measured at width 128 alone (docs/method.md has the table); elsewhere the rules are as good as their
sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from melinoe.config import FinetuneSettings
from melinoe.moe.routing import Router


@dataclass(frozen=True)
class Rates:
    """
    Peak learning rates of a run.

    Attributes:
        width: Inputs of a router: the model's hidden size.
        routers: Of the routers.
        low_rank: Of the low-rank updates.
        rank: Of each update.
    """

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
