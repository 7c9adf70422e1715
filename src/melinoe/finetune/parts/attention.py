"""
Low-rank updates of attention projections, beside plain linear layers.

The numbers, starting values and files are PEFT's of a ``Linear``. PEFT's own layer does not take
the projection's place, since that renames base weights within the model: here a model in training
keeps every name it had, by which teachers, checkpoints of a run and sharding know it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from melinoe.finetune.parts.low_rank import add_update
from melinoe.finetune.parts.updates import Updates, acting
from melinoe.moe.experts import ADAPTER


class LinearUpdate(nn.Module):
    """
    The update of one linear projection: ``alpha / rank x B A``.

    Args:
        projection: Gives shapes and device; its weight is not read.
        rank: Of the update.
        alpha: The update is multiplied by ``alpha / rank``.
        generator: On the CPU; decides the starting values.

    Attributes:
        lora_A: float32 ``(rank, in)``; starts as PEFT's, uniform within ``1 / sqrt(in)``.
        lora_B: float32 ``(out, rank)``; starts at zero.
        enabled: Whether forward passes add it.
        instead: Another update that acts in its place, or none, in a tuple of one.
    """

    def __init__(
        self, projection: nn.Linear, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.scaling, self.enabled = alpha / rank, True
        # In a tuple, so that it is no submodule, whose parameters would be this module's own.
        self.instead: tuple[LinearUpdate | None] | None = None
        bound = 1 / math.sqrt(projection.in_features)
        start = torch.empty(rank, projection.in_features).uniform_(
            -bound, bound, generator=generator
        )
        device = projection.weight.device
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(projection.out_features, rank, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        """What the update adds to the projection of *inputs*, ``(..., in)`` to ``(..., out)``."""
        inner = linear(inputs, self.lora_A.to(inputs.dtype)) * self.scaling
        return linear(inner, self.lora_B.to(inner.dtype))

    @torch.no_grad()
    def add_to(self, projection: nn.Linear) -> None:
        """Add the update to the projection's weight in place, rounded once."""
        add_update(projection.weight, self.lora_A, self.lora_B, self.scaling, False)


class AttentionUpdates(Updates):
    """
    The updates of all attention projections of a model, on the model while it trains.

    The parameters are ordinary ones, ``<projection>.low_rank.lora_A``. Projections that share their
    weights share their updates.

    Args:
        projections: Full name and module, from `find_attention`; each gets its update, in place.
        rank: Of each update.
        alpha: Updates are multiplied by ``alpha / rank``.
        seed: Decides the starting values, equally on each device and process.
    """

    def __init__(
        self, projections: Mapping[str, nn.Linear], rank: int, alpha: float, seed: int
    ) -> None:
        super().__init__(projections)
        self.rank, self.alpha, self.projections = rank, alpha, dict(projections)
        generator = torch.Generator().manual_seed(seed)
        by_weight: dict[int, LinearUpdate] = {}
        self._handles = []
        for projection in self.projections.values():
            update = by_weight.get(id(projection.weight))
            if update is None:
                update = LinearUpdate(projection, rank, alpha, generator)
                by_weight[id(projection.weight)] = update
            projection.add_module(ADAPTER, update)
            self._handles.append(projection.register_forward_hook(_add_update))

    def of(self, name: str) -> LinearUpdate:
        """The update of one projection."""
        return self.projections[name].get_submodule(ADAPTER)  # type: ignore[return-value]

    def remove(self, *, merge: bool) -> None:
        """Take the updates off the model; with *merge*, add them to its weights before."""
        super().remove(merge=merge)
        for handle in self._handles:
            handle.remove()


def _add_update(projection: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    addition = acting(projection)
    return output if addition is None else output + addition(inputs[0]).to(output.dtype)
