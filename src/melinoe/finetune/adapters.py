"""
What is trained: the routers in full, low-rank updates of the expert projections, nothing else.

The updates are PEFT's (``target_parameters``), so their layout is PEFT's too. PEFT builds the whole
updated stack of a layer in each forward pass, whichever experts ran; for stacks of some megabytes
that costs little.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.moe.experts import ExpertsLayer
from melinoe.moe.routing import Router

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass
class TrainedParts:
    """
    The trained parameters of a model, and how to make it plain again.

    Attributes:
        router: Router parameters by full name.
        lora: Parameters of the expert updates by name; empty if only routers are trained.
    """

    router: dict[str, nn.Parameter]
    lora: dict[str, nn.Parameter]
    tuner: object | None = field(default=None, repr=False)

    def all(self) -> list[nn.Parameter]:
        """Every trained parameter, routers first."""
        return [*self.router.values(), *self.lora.values()]

    def merge(self, model: nn.Module) -> None:
        """
        Add the updates to the experts' weights and take the adapters off *model*, in place.

        The sum is rounded to the weights' own type once.
        """
        if self.tuner is not None:
            self.tuner.merge_and_unload()  # type: ignore[attr-defined]
            self.tuner = None


def make_trainable(
    model: nn.Module,
    routers: list[Router],
    layers: list[ExpertsLayer],
    settings: FinetuneSettings,
) -> TrainedParts:
    """
    Freeze *model* and open the parts that *settings* name, in float32.

    Args:
        model: Changed in place: with updates of experts, their modules are wrapped.
        routers: Of *model*, from `find_routers`.
        layers: Of *model*, from `find_experts`.
        settings: ``train``, ``lora_rank``, ``lora_alpha``, ``seed``.

    Raises:
        TrainingError: the routers' weights are frozen by the model itself, or hold integers.
    """
    # Some families keep constants as parameters that never need a gradient; they stay constant.
    router = {
        name: parameter
        for one in routers
        for name, parameter in one.parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }
    if not router:
        raise TrainingError("the model's routers are frozen; load it without frozen weights")
    model.requires_grad_(False)
    tuner, lora = None, {}
    if settings.train == "router+experts":
        tuner = _wrap(model, layers, settings)
        lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for parameter in (*router.values(), *lora.values()):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return TrainedParts(router, lora, tuner)


def _wrap(model: nn.Module, layers: list[ExpertsLayer], settings: FinetuneSettings) -> object:
    # Slow to import, and not needed to train routers.
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    targets = [
        f"{layer.name}.{tensor.name}"
        for layer in layers
        for tensor in layer.tensors
        if tensor.name in _PROJECTIONS
    ]
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        target_modules=[],
        target_parameters=targets,
        lora_dropout=0.0,
    )
    torch.manual_seed(settings.seed)
    return LoraModel(model, config, "default")
