"""
Low-rank updates of expert projections, computed for the experts that tokens chose.

The update of one projection of expert *e* is ``alpha / rank x B_e A_e``. PEFT adds it to the whole
stack of weights before each forward pass, and its gradient has the size of that stack; here the
tokens of an expert go through ``A_e`` and ``B_e`` beside their grouped product with ``W_e``. The
numbers are PEFT's up to rounding, which in bfloat16 is less: PEFT rounds ``W + B A``.

Every update is in the graph of every forward pass. An expert that no token chose gets a gradient of
zeros, never none, so that distributed training finds the same gradients on each process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from melinoe.finetune.parts.updates import Updates, acting
from melinoe.moe.dispatch import bind, unbind, use_melinoe
from melinoe.moe.experts import ADAPTER, ExpertsLayer
from melinoe.moe.grouped import aligned_size, grouped_experts, grouped_product

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """
    The updates of one experts module.

    Args:
        layer: The module, on any device; its weights are not read.
        rank: Of each update.
        alpha: Updates are multiplied by ``alpha / rank``.
        generator: On the CPU; decides the starting values.

    Attributes:
        lora_A: Per projection, float32 ``(num_experts, rank, in)``; starts as PEFT's, uniform
            within ``1 / sqrt(in)``.
        enabled: Whether forward passes add them.
        instead: Other updates that act in place of these, or none of them, in a tuple of one.
        lora_B: Per projection, float32 ``(num_experts, out, rank)``; starts at zero.
    """

    def __init__(
        self, layer: ExpertsLayer, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.rank, self.scaling, self.enabled = rank, alpha / rank, True
        # In a tuple, so that it is no submodule, whose parameters would be this module's own.
        self.instead: tuple[LowRank | None] | None = None
        self.is_transposed = bool(getattr(layer.module, "is_transposed", False))
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for tensor in layer.tensors:
            if tensor.name not in PROJECTIONS:
                continue
            device = layer.module.get_parameter(tensor.name).device
            into, out = tensor.shape if self.is_transposed else tensor.shape[::-1]
            start = torch.empty(layer.num_experts, rank, into)
            start.uniform_(-1 / math.sqrt(into), 1 / math.sqrt(into), generator=generator)
            zeros = torch.zeros(layer.num_experts, out, rank, device=device)
            self.lora_A[tensor.name] = nn.Parameter(start.to(device))
            self.lora_B[tensor.name] = nn.Parameter(zeros)

    @property
    def names(self) -> list[str]:
        """The projections that are updated, in the module's own order."""
        return list(self.lora_A)

    def forward(self, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
        """What the update of projection *name* adds; an `Addition` of `grouped_experts`."""
        down, up = self.lora_A[name].to(rows.dtype), self.lora_B[name].to(rows.dtype)
        # Rows of zeros, so that torch's kernel takes any rank.
        if missing := aligned_size(self.rank, rows.dtype) - self.rank:
            down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, missing))
        inner = grouped_product(rows, down.transpose(-2, -1), offsets) * self.scaling
        return grouped_product(inner, up.transpose(-2, -1), offsets)

    @torch.no_grad()
    def add_to(self, module: nn.Module) -> None:
        """Add the updates to the module's weights in place, expert by expert, rounded once."""
        for name in self.names:
            weight, down, up = module.get_parameter(name), self.lora_A[name], self.lora_B[name]
            for expert in range(weight.shape[0]):
                add_update(
                    weight[expert], down[expert], up[expert], self.scaling, self.is_transposed
                )


@torch.no_grad()
def add_update(
    weight: Tensor, down: Tensor, up: Tensor, scaling: float, is_transposed: bool
) -> None:
    """
    Add ``scaling x B A`` to one expert's weight in place: in float32 or wider, rounded once.

    Args:
        weight: ``(out, in)``, or ``(in, out)`` where *is_transposed*.
        down: A, ``(rank, in)``.
        up: B, ``(out, rank)``.
        scaling: Factor of the product.
        is_transposed: Layout of *weight*.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = scaling * (up.to(wide) @ down.to(wide))
    weight.copy_(weight.to(wide) + (update.T if is_transposed else update))


class LowRankUpdates(Updates):
    """
    The updates of all MoE layers of a model, on the model while it trains.

    The parameters are ordinary ones, ``<experts module>.low_rank.lora_A.<projection>``: they are
    seen by ``named_parameters()``, wrapped by DDP and FSDP2, moved with the model. Layers that
    share their weights share their updates.

    Args:
        model: Gets the updates, and their experts function, in place.
        layers: Of *model*, from `find_experts`.
        rank: Of each update.
        alpha: Updates are multiplied by ``alpha / rank``.
        seed: Decides the starting values, equally on each device and process.

    Raises:
        AttachError: a runtime is attached to the model.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[ExpertsLayer], rank: int, alpha: float, seed: int
    ) -> None:
        super().__init__({layer.name: layer.module for layer in layers})
        self.rank, self.alpha = rank, alpha
        self.layers = list(layers)
        generator = torch.Generator().manual_seed(seed)
        by_weight: dict[int, LowRank] = {}
        for layer in self.layers:
            weight = id(layer.module.get_parameter("down_proj"))
            if weight not in by_weight:
                by_weight[weight] = LowRank(layer, rank, alpha, generator)
            layer.module.add_module(ADAPTER, by_weight[weight])
            bind(layer.module, partial(_forward, layer.module))
        self._restore: Callable[[], None] = use_melinoe(model)

    def of(self, layer: ExpertsLayer) -> LowRank:
        """The updates of one layer."""
        return layer.module.get_submodule(ADAPTER)  # type: ignore[return-value]

    def remove(self, *, merge: bool) -> None:
        """Take the updates off the model; with *merge*, add them to its weights before."""
        super().remove(merge=merge)
        for layer in self.layers:
            unbind(layer.module)
        self._restore()


def _forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return grouped_experts(module, hidden_states, top_k_index, top_k_weights, acting(module))
