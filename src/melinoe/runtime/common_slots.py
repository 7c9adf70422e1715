"""The slots of one cache that all layers share, for policies that decide for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from melinoe.cache.policy import Policy
from melinoe.cache.shared import share
from melinoe.errors import AttachError
from melinoe.moe.experts import ExpertsLayer


class CommonSlots:
    """
    One set of slots for the experts of all layers, which must be alike.

    Args:
        layers: MoE layers of the model.
        num_slots: in all.
        policy: of the whole cache.
        device: where the slots are.

    Attributes:
        num_slots: in all.
        residencies: the cache as each layer sees it.
        tensors: per parameter name ``(num_slots, *shape of one expert)``.
        in_flight: ``layer * num_experts + expert`` to the ticket of its prefetch.

    Raises:
        AttachError: layers of different experts.
    """

    def __init__(
        self,
        layers: Sequence[ExpertsLayer],
        num_slots: int,
        policy: Policy,
        device: torch.device,
    ) -> None:
        first = layers[0]
        shapes = [[(t.name, t.shape, t.dtype) for t in layer.tensors] for layer in layers]
        if any(s != shapes[0] for s in shapes) or any(
            layer.num_experts != first.num_experts for layer in layers
        ):
            raise AttachError(
                f"policy {policy.name!r} keeps the experts of all layers in the same slots, and "
                "this model's layers have experts of different sizes; choose lru, lfu or lfru"
            )
        self.num_slots = num_slots
        self.residencies = share(len(layers), first.num_experts, num_slots, policy)
        with torch.inference_mode(False):
            self.tensors = {
                t.name: torch.empty((num_slots, *t.shape), dtype=t.dtype, device=device)
                for t in first.tensors
            }
        self.in_flight: dict[int, Any] = {}
