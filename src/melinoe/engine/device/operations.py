"""
The engine's part of a layer as operations that ``torch.compile`` takes as they are.

The compiler sees tensors and a number; behind the number is the layer. An operation changes the
slots' memory, which the compiler is not told: it would make copies of it to be safe. It need not
know, because whatever reads the slots needs what the operation returns.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Any) -> int:
    """A number for *layer*, a `FastExperts`; it is forgotten with the layer."""
    number = next(_numbers)
    _layers[number] = layer
    return number


@torch.library.custom_op(
    "melinoe::plan",
    mutates_args=(),
    schema="(Tensor index, Tensor weights, int layer) -> (Tensor, Tensor)",
)
def plan(index: Tensor, weights: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """
    Bring the chosen experts into slots; as `FastExperts.plan`.

    Args:
        index: ``(tokens, top_k)``.
        weights: ``(tokens, top_k)``.
        layer: from `register`.

    Returns:
        Slots, int64, and weights, both shaped as *index*.
    """
    return _layers[layer].plan(index, weights)


@plan.register_fake
def _plan(index: Tensor, weights: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    slots = torch.empty(index.shape, dtype=torch.int64, device=index.device)
    return slots, torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)


@torch.library.custom_op(
    "melinoe::experts",
    mutates_args=(),
    schema="(Tensor hidden, Tensor index, Tensor weights, int layer) -> Tensor",
)
def experts(hidden: Tensor, index: Tensor, weights: Tensor, layer: int) -> Tensor:
    """
    Compute the experts of a layer, all of it; as calling a `FastExperts`.

    Args:
        hidden: ``(tokens, hidden)``.
        index, weights, layer: as in `plan`.
    """
    return _layers[layer](hidden, index, weights)


@experts.register_fake
def _experts(hidden: Tensor, index: Tensor, weights: Tensor, layer: int) -> Tensor:
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
