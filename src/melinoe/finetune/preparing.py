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
from melinoe.finetune.parts import PROJECTIONS, TrainedParts
from melinoe.finetune.stream import ExpertStream
from melinoe.malloc import keep_freed_memory, return_large_blocks
from melinoe.moe.dispatch import bind, bound, unbind, use_melinoe
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
    """
    A model, changed in place to what its training needs; it can be made plain again.

    *stream* computes the experts, where their weights are in a store.
    """

    def __init__(
        self,
        model: Any,
        settings: FinetuneSettings,
        recomputes: bool = False,
        stream: ExpertStream | None = None,
    ) -> None:
        self._model, self._recomputes, self._stream = model, recomputes, stream
        self._types = {name: tensor.dtype for name, tensor in _tensors(model)}
        weights_bytes = sum(tensor.nbytes for _, tensor in _tensors(model))
        if not torch.cuda.is_available():
            keep_freed_memory() if weights_bytes < _LARGE_BYTES else return_large_blocks()
        self._attached = ExitStack()
        if stream is not None and settings.train == "router":
            self._attached.enter_context(stream.attached(model))
        self._widened = None
        if settings.compute_dtype != "bfloat16":
            self._widened = Widened(model, find_experts(model) if stream is None else stream.layers)
        if self._widened is not None and settings.train != "router":
            self._widened.make_way()  # for the function that adds the updates
        self._configs: list[tuple[Any, str, Any]] = []  # and what they said
        pending = [model.config]
        while pending:
            config = pending.pop()
            pending += [getattr(config, key) for key in config.sub_configs if hasattr(config, key)]
            # transformers would add its load-balancing loss, which works against locality.
            off = {"output_router_logits": False, "router_aux_loss_coef": 0.0}
            for key in (one for one in off if hasattr(config, one)):
                self._configs.append((config, key, getattr(config, key)))
                setattr(config, key, off[key])
        if hasattr(model.config, "use_cache"):  # the Trainer switches it off, and would leave it so
            self._configs.append((model.config, "use_cache", model.config.use_cache))

    def recompute(self, on: bool = True) -> None:
        """Recompute layers in the backward pass from now on, if that is asked for; or no longer."""
        if not self._recomputes:
            return
        word, model = "enable" if on else "disable", self._model
        switch = getattr(model, f"activation_checkpointing_{word}", None) or getattr(
            model, f"gradient_checkpointing_{word}"
        )
        try:
            # Not reentrant: what a layer records inside must stay in the graph.
            options: dict[str, Any] = {"use_reentrant": False}
            if self._stream is not None:
                options["context_fn"] = self._stream.checkpoint_contexts
            switch(*([options] if on else []))
        except ValueError:
            raise TrainingError(
                f"{family(model)} cannot recompute its activations; leave gradient_checkpointing "
                "out"
            ) from None

    def switch_back(self) -> None:
        """Put configs and switches back as they were."""
        self.recompute(False)
        for config, key, value in self._configs:
            setattr(config, key, value)

    def make_plain(self, parts: TrainedParts) -> None:
        """Merge the updates into the model; give its tensors back the types they came with."""
        parts.merge()
        if self._widened is not None:
            self._widened.undo()
        self._attached.close()
        self._model.requires_grad_(True).eval()
        for name, tensor in _tensors(self._model):
            tensor.data = tensor.data.to(self._types.get(name, tensor.dtype))


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
    Decide whether layers are recomputed in the backward pass: as *settings* say, else by size.

    Recomputing gives the same numbers and costs about a forward pass. By default it is done where
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


class Widened:
    """
    A model that computes in float32, from when this is made until `undo`.

    Args:
        model: Changed in place: hooks, forward methods, and the types of its small tensors. Its
            experts run through Melinoe's function; another function may be bound in its place.
        layers: Its MoE layers.
    """

    def __init__(self, model: Any, layers: Sequence[ExpertsLayer]) -> None:
        self._experts = [layer.module for layer in layers]
        self._linears, self._hooks = [], []
        routers = {id(part) for one in find_routers(model) for part in one.module.modules()}
        large = {
            id(parameter)
            for module in self._experts
            for name, parameter in module.named_parameters(recurse=False)
            if name in PROJECTIONS
        }
        for module in model.modules():
            plain = type(module) is nn.Linear and id(module) not in routers
            if not (plain or isinstance(module, nn.Embedding)) or not _is_narrow(module.weight):
                continue
            large.add(id(module.weight))
            if plain:
                module.forward = partial(_wide_linear, module)
                self._linears.append(module)
            else:
                self._hooks.append(module.register_forward_hook(lambda _, args, out: out.float()))
        self._types: list[tuple[Tensor, torch.dtype]] = []
        for _, tensor in _tensors(model):
            if tensor.is_floating_point() and id(tensor) not in large:
                self._types.append((tensor, tensor.dtype))
                tensor.data = tensor.data.float()
        self._bound = [module for module in self._experts if bound(module) is None]
        for module in self._bound:
            bind(module, partial(grouped_experts, module))
        self._restore = use_melinoe(model)

    def make_way(self) -> None:
        """Unbind the experts, for whoever binds a function of their own."""
        for module in self._bound:
            unbind(module)
        self._bound = []

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
