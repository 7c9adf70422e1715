"""What a captured step reads: buffers of our own, filled anew before each replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def signature(value: Any) -> tuple | None:
    """What stays the same between two steps of a kind; None for what we do not know."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, value.device)
    if value is None or isinstance(value, bool | int | float | str):
        return ("value", value)
    if isinstance(value, dict) and all(v is None or isinstance(v, Tensor) for v in value.values()):
        return tuple((name, signature(value[name])) for name in sorted(value))
    return None


def buffer(value: Any) -> Any:
    """Memory of our own for what changes from step to step."""
    if isinstance(value, dict):
        return {name: buffer(one) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False), torch.no_grad():
        return value.clone(memory_format=torch.contiguous_format)


def fill(buffers: Any, inputs: Mapping[str, Any]) -> None:
    """Copy the tensors of *inputs* into *buffers*, made of inputs of the same kind."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            buffers[name].copy_(value)
        elif isinstance(value, dict):
            fill(buffers[name], value)
