"""
Compute in float32 with weights that stay in a narrower type.

Training freezes nearly all of a model. Casting it up as a whole doubles the memory of a bfloat16
checkpoint; computing in bfloat16 on a CPU is slower than in float32 (three times, for the shipped
model). So the large frozen weights keep their type, and each product casts up the matrix it reads:
an expert, or a piece of a linear layer. Norms, biases and whatever else is small are cast up once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from melinoe.finetune.parts.low_rank import PROJECTIONS
from melinoe.moe.dispatch import bind, bound, unbind, use_melinoe
from melinoe.moe.experts import find_experts
from melinoe.moe.grouped import grouped_experts
from melinoe.moe.routing import find_routers

# Elements of a linear layer's weight that are cast up at a time: 32 MiB in float32.
PIECE = 1 << 23


class Widened:
    """
    A model that computes in float32, from when this is made until `undo`.

    Args:
        model: Changed in place: hooks, forward methods, and the types of its small tensors. Its
            experts run through Melinoe's function; another function may be bound in its place.
    """

    def __init__(self, model: Any) -> None:
        layers = find_experts(model)
        self._experts = [layer.module for layer in layers]
        self._linears, self._hooks = [], []
        routers = {id(part) for one in find_routers(model) for part in one.module.modules()}
        large = {
            id(module.get_parameter(name))
            for module in self._experts
            for name, _ in module.named_parameters(recurse=False)
            if name in PROJECTIONS
        }
        for module in model.modules():
            if type(module) is nn.Linear and id(module) not in routers and _narrow(module.weight):
                large.add(id(module.weight))
                module.forward = partial(_wide_linear, module)  # type: ignore[method-assign]
                self._linears.append(module)
            elif isinstance(module, nn.Embedding) and _narrow(module.weight):
                large.add(id(module.weight))
                self._hooks.append(module.register_forward_hook(_widen_output))
        self._types: list[tuple[Tensor, torch.dtype]] = []
        for tensor in _tensors(model):
            if tensor.is_floating_point() and id(tensor) not in large:
                self._types.append((tensor, tensor.dtype))
                tensor.data = tensor.data.float()
        for module in self._experts:
            if bound(module) is None:
                bind(module, partial(grouped_experts, module))
        self._restore = use_melinoe(model)

    def make_way(self) -> None:
        """Leave the experts to whoever binds a function of their own."""
        for module in self._experts:
            unbind(module)

    def undo(self) -> None:
        """Let the model compute in its own types again."""
        for module in self._linears:
            del module.__dict__["forward"]
        for hook in self._hooks:
            hook.remove()
        self.make_way()
        self._restore()
        for tensor, dtype in self._types:
            tensor.data = tensor.data.to(dtype)


class _Linear(torch.autograd.Function):
    """A linear layer whose weight is cast to the inputs' type, some of its rows at a time."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        out = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
        for some in _pieces(weight):
            out[..., some] = linear(inputs, weight[some].to(inputs.dtype))
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        rows = gradient.reshape(-1, weight.shape[0])
        out = gradient.new_zeros(rows.shape[0], weight.shape[1])
        for some in _pieces(weight):
            out.addmm_(rows[:, some], weight[some].to(gradient.dtype))
        return out.view(*gradient.shape[:-1], weight.shape[1]), None, None


def _wide_linear(module: nn.Linear, inputs: Tensor) -> Tensor:
    if inputs.dtype == module.weight.dtype:
        return linear(inputs, module.weight, module.bias)
    return _Linear.apply(inputs, module.weight, module.bias)  # type: ignore[no-any-return]


def _widen_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


def _pieces(weight: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize < 4


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
