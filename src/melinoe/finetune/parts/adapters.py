"""
What is trained: the routers in full, low-rank updates of the expert projections, nothing else.

The updates have PEFT's form and starting values, and are kept in PEFT's files; they are computed in
`melinoe.finetune.parts.low_rank`.
"""

from dataclasses import dataclass, field

from torch import nn

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.finetune.parts.low_rank import LowRankUpdates, once
from melinoe.moe.experts import ExpertsLayer, family
from melinoe.moe.routing import Router


@dataclass
class TrainedParts:
    """
    The trained parameters of a model, and how to make it plain again.

    Attributes:
        router: Router parameters by full name.
        lora: Parameters of the expert updates by full name; empty if only routers are trained.
        routers: The routers they belong to.
        updates: The expert updates, as long as they are on the model.
    """

    router: dict[str, nn.Parameter]
    lora: dict[str, nn.Parameter]
    routers: list[Router] = field(default_factory=list, repr=False)
    updates: LowRankUpdates | None = field(default=None, repr=False)

    def all(self) -> list[nn.Parameter]:
        """Every trained parameter, routers first."""
        return [*self.router.values(), *self.lora.values()]

    def merge(self, model: nn.Module) -> None:
        """
        Add the updates to the experts' weights and take them off *model*, in place.

        The sum is rounded to the weights' own type once.
        """
        if self.updates is not None:
            self.updates.remove(merge=True)
            self.updates = None


def make_trainable(
    model: nn.Module,
    routers: list[Router],
    layers: list[ExpertsLayer],
    settings: FinetuneSettings,
) -> TrainedParts:
    """
    Freeze *model* and open the parts that *settings* name, in float32.

    Args:
        model: Changed in place: with updates of experts, a low-rank function computes them.
        routers: Of *model*, from `find_routers`.
        layers: Of *model*, from `find_experts`.
        settings: ``train``, ``lora_rank``, ``lora_alpha``, ``seed``.

    Raises:
        TrainingError: the routers' weights are frozen by the model itself, or hold integers.
    """
    # Some families keep constants as parameters that never need a gradient; they stay constant.
    router = once(
        (name, parameter)
        for one in routers
        for name, parameter in one.parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    )
    if any(not one.weight.requires_grad for one in routers):
        raise TrainingError(
            f"the routers of {family(model)} are frozen; load it without frozen weights"
        )
    model.requires_grad_(False)
    for parameter in router.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if settings.train == "router":
        return TrainedParts(router, {}, routers)
    updates = LowRankUpdates(
        model, layers, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=settings.seed
    )
    return TrainedParts(router, updates.parameters(), routers, updates)
