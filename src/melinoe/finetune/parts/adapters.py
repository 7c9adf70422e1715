"""
What is trained: the routers in full, low-rank updates of expert projections and, where a run asks
for it, of attention projections; nothing else.

The updates have PEFT's form and starting values, and are kept in PEFT's files; they are computed in
`melinoe.finetune.parts.low_rank` and `melinoe.finetune.parts.attention`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import nn

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.finetune.parts.attention import AttentionUpdates
from melinoe.finetune.parts.low_rank import LowRankUpdates
from melinoe.finetune.parts.updates import once
from melinoe.moe.attention import find_attention
from melinoe.moe.experts import ExpertsLayer, family
from melinoe.moe.routing import Router


@dataclass
class TrainedParts:
    """
    The trained parameters of a model, and how to make it plain again.

    Attributes:
        router: Router parameters by full name.
        lora: Parameters of the updates by full name; empty if only routers are trained.
        routers: The routers they belong to.
        updates: The updates of experts, as long as they are on the model.
        attention: The updates of attention projections, likewise.
    """

    router: dict[str, nn.Parameter]
    lora: dict[str, nn.Parameter]
    routers: list[Router] = field(default_factory=list, repr=False)
    updates: LowRankUpdates | None = field(default=None, repr=False)
    attention: AttentionUpdates | None = field(default=None, repr=False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, no update acts: with base routers, a pass is the base model's."""
        with ExitStack() as stack:
            for updates in (self.updates, self.attention):
                if updates is not None:
                    stack.enter_context(updates.disabled())
            yield

    def all(self) -> list[nn.Parameter]:
        """Every trained parameter, routers first."""
        return [*self.router.values(), *self.lora.values()]

    def names(self) -> list[str]:
        """Full names of all tensors of the model that training and `merge` change."""
        names = list(self.router)
        if self.updates is not None:
            for layer in self.updates.layers:
                names += [f"{layer.name}.{one}" for one in self.updates.of(layer).names]
        if self.attention is not None:
            names += [f"{name}.weight" for name in self.attention.projections]
        return names

    def merge(self, model: nn.Module) -> None:
        """
        Add the updates to the weights they belong to and take them off *model*, in place.

        The sums are rounded to the weights' own type once.
        """
        for updates in (self.updates, self.attention):
            if updates is not None:
                updates.remove(merge=True)
        self.updates = self.attention = None


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
        UnsupportedModelError: attention is to be trained, and none is found.
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
    attention = None
    if settings.train == "router+experts+attention":
        attention = find_attention(model, layers)
    rank, alpha, seed = settings.lora_rank, settings.lora_alpha, settings.seed
    updates = LowRankUpdates(model, layers, rank, alpha, seed)
    parts = TrainedParts(router, updates.parameters(), routers, updates)
    if attention is not None:
        parts.attention = AttentionUpdates(attention, rank, alpha, seed)
        parts.lora |= parts.attention.parameters()
    return parts
