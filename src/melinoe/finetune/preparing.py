"""
Give a model the types and switches that training needs, and make it plain again afterwards.

Casting all of a bfloat16 checkpoint up would double its memory, and computing in bfloat16 is slower
on a CPU than in float32 (three times, for the shipped model). So large frozen weights keep their
type, and each product casts up the matrix it reads: an expert, or a piece of a linear layer. Norms,
biases and whatever else is small are cast up once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.finetune.parts import PROJECTIONS
from melinoe.finetune.stream import ExpertStream
from melinoe.malloc import keep_freed_memory, return_large_blocks
from melinoe.moe.dispatch import computed_by
from melinoe.moe.experts import ExpertsLayer, family, find_experts
from melinoe.moe.grouped import grouped_experts
from melinoe.moe.routing import find_routers

# Activations of one layer's experts from which on a run on the CPU recomputes its layers: 64 MiB.
RECOMPUTED_BYTES = 1 << 26
# Elements of a linear layer's weight that are cast up at a time: 32 MiB in float32.
PIECE = 1 << 23
# Weights of a model from which on freed memory goes back to the kernel: 1 GiB.
_LARGE_BYTES = 1 << 30


class ReadyModel:
    """A model, changed in place to what its training needs; it can be made plain again."""

    def __init__(
        self,
        model: Any,
        settings: FinetuneSettings,
        recomputes: bool = False,
        stream: ExpertStream | None = None,
    ) -> None:
        self._model, self._recomputes, self._stream = model, recomputes, stream
        self._types = {name: tensor.dtype for name, tensor in _tensors(model)}
        self._switches, self._weights = ExitStack(), ExitStack()
        weights_bytes = sum(tensor.nbytes for _, tensor in _tensors(model))
        if not torch.cuda.is_available():
            keep_freed_memory() if weights_bytes < _LARGE_BYTES else return_large_blocks()
        layers = find_experts(model) if stream is None else stream.layers
        if settings.compute_dtype != "bfloat16":
            self._weights.enter_context(widened(model, layers))
        # Low-rank updates compute their experts themselves.
        if settings.train == "router" and (stream or settings.compute_dtype != "bfloat16"):
            compute = grouped_experts if stream is None else stream.compute
            modules = [layer.module for layer in layers]
            self._weights.enter_context(computed_by(model, modules, compute))
        pending = [model.config]
        while pending:
            config = pending.pop()
            pending += [getattr(config, key) for key in config.sub_configs if hasattr(config, key)]
            # transformers would add its load-balancing loss, which works against locality.
            for key, off in (("output_router_logits", False), ("router_aux_loss_coef", 0.0)):
                if hasattr(config, key):
                    self._switches.callback(setattr, config, key, getattr(config, key))
                    setattr(config, key, off)
        if hasattr(model.config, "use_cache"):  # the Trainer switches it off, and would leave it so
            self._switches.callback(setattr, model.config, "use_cache", model.config.use_cache)

    def recompute(self, on: bool = True) -> None:
        """Recompute layers in the backward pass from now on, if that is asked for; or no longer."""
        if not self._recomputes:
            return
        word, model = "enable" if on else "disable", self._model
        switch = getattr(model, f"activation_checkpointing_{word}", None) or getattr(
            model, f"gradient_checkpointing_{word}"
        )
        # Not reentrant: what a layer records inside must stay in the graph.
        options: dict[str, Any] = {"use_reentrant": False}
        if self._stream is not None:
            options["context_fn"] = self._stream.checkpoint_contexts
        try:
            switch(*([options] if on else []))
        except ValueError:
            raise TrainingError(
                f"{family(model)} cannot recompute its activations; leave gradient_checkpointing "
                "out"
            ) from None

    def switch_back(self) -> None:
        """Put configs and switches back as they were."""
        self.recompute(False)
        self._switches.close()

    def make_plain(self) -> None:
        """Give the tensors back the types they came with."""
        self._weights.close()
        self._model.requires_grad_(True).eval()
        for name, tensor in _tensors(self._model):
            _cast(tensor, self._types.get(name, tensor.dtype))


def recomputes(
    model: Any,
    layer: ExpertsLayer,
    settings: FinetuneSettings,
    tokens: int,
    top_k: int,
    device: torch.device,
    streamed: bool = False,
) -> bool:
    """
    Decide whether layers are recomputed in the backward pass: as *settings* say, else by size. Of
    two layers a step then takes 1.4 times as long and half the memory. By default it is done where
    experts are *streamed*, and else on the CPU only, where memory that runs out ends the process.
    """
    if settings.gradient_checkpointing is not None:
        return settings.gradient_checkpointing
    shapes = {tensor.name: tensor.shape for tensor in layer.tensors}
    # Rows and outputs are as wide as the model; gate, up, activation and product as an expert.
    width = 2 * max(shapes["down_proj"]) + 4 * min(shapes["down_proj"])
    large = tokens * top_k * width * 4 >= RECOMPUTED_BYTES
    can = bool(getattr(model, "supports_gradient_checkpointing", False))
    return can and (streamed or (large and device.type == "cpu"))


def widened(model: Any, layers: Sequence[ExpertsLayer]) -> ExitStack:
    """
    Let a model compute in float32, but for its experts, until what is returned is closed. By hooks
    and forward methods. The experts of *layers* keep their types, as all large weights do:
    `grouped_experts` casts up each matrix that it reads.
    """
    undo = ExitStack()
    routers = {id(part) for one in find_routers(model) for part in one.module.modules()}
    large = {
        id(parameter)
        for layer in layers
        for name, parameter in layer.module.named_parameters(recurse=False)
        if name in PROJECTIONS
    }
    for module in model.modules():
        plain = type(module) is nn.Linear and id(module) not in routers
        if not (plain or isinstance(module, nn.Embedding)) or not _is_narrow(module.weight):
            continue
        large.add(id(module.weight))
        if plain:
            module.forward = partial(_wide_linear, module)
            undo.callback(vars(module).pop, "forward")
        else:
            hook = module.register_forward_hook(lambda _, args, out: out.float())
            undo.callback(hook.remove)
    for _, tensor in _tensors(model):
        if tensor.is_floating_point() and id(tensor) not in large:
            undo.callback(_cast, tensor, tensor.dtype)
            _cast(tensor, torch.float32)
    return undo


def _cast(tensor: Tensor, dtype: torch.dtype) -> None:
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


def _pieces(weight: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize < 4


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()
