"""
Learning rates that work with no option at all, from the model's width.

    low-rank updates   5e-4 (2000 / width)^0.781
    routers            0.55 / width

The first is the rule that Thinking Machines fitted over dense models of 1B to 70B for updates of
this form (5e-5 for full fine-tuning, ten times that for low-rank updates, the exponent for
Llama-like models; Tinker's supervised-learning hyperparameters and "LoRA Without Regret", 2025). At
the shipped model's width of 128 it gives 4.3e-3, the best of the rates that were tried there.

The second takes the rate that was best at width 128 to other widths as muP does for Adam
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
    """

    width: int
    routers: float
    low_rank: float

    @classmethod
    def of(cls, routers: Sequence[Router], settings: FinetuneSettings) -> "Rates":
        """Take what *settings* name, and the rules for the rest; see `FinetuneSettings`."""
        width = routers[0].weight.shape[-1]
        named = settings.learning_rate
        low_rank = settings.lora_learning_rate or named or 5e-4 * (2000 / width) ** 0.781
        return cls(width, named or 0.55 / width, low_rank)
