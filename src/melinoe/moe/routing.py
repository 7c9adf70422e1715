"""
Find the routers of a transformers model, and record what they said and what then ran.

A router is the ``gate`` or ``router`` that stands beside an experts module in its block. Families
choose in many ways (correction biases, groups, sigmoid scores, skip slots), so nothing here ever
repeats a choice: ids are taken at the door of the experts module, logits where the router's weight
makes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from melinoe.errors import UnsupportedModelError
from melinoe.moe.experts import family, find_experts, is_experts_module

_NAMES = ("gate", "router")


@dataclass(frozen=True)
class Router:
    """
    The router of one MoE layer.

    Attributes:
        index: Number of the MoE layer, as in `find_experts`.
        name: Of the router module, as in ``named_modules()``.
        module: The router module.
        source: Dotted name, below *module*, of the submodule that makes the logits; empty where
            the module itself does, as the first of its outputs.
        experts: The experts module it chooses for; its weights may have been taken out.
        num_experts: Experts of the layer, skip slots not counted.
        num_logits: Width of its logits: the experts, then skip slots if it has any.
        top_k: Experts per token.
    """

    index: int
    name: str
    module: nn.Module = field(repr=False)
    source: str
    experts: nn.Module = field(repr=False)
    num_experts: int
    num_logits: int
    top_k: int | None

    @property
    def weight(self) -> nn.Parameter:
        """The weight that makes the logits, ``(num_logits, hidden)``."""
        return self.module.get_submodule(self.source).weight  # type: ignore[return-value]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Full name and parameter, for all that decides the logits or the choice."""
        for name, parameter in self.module.named_parameters():
            yield f"{self.name}.{name}", parameter


def find_routers(model: nn.Module) -> list[Router]:
    """
    The router of each MoE layer, in the order of `find_experts`; also of an offloaded model.

    Raises:
        UnsupportedModelError: no MoE layers; a layer without a router, or whose router has no
            trainable weight of one row per expert, so its choice could not be trained.
    """
    found = [(name, module) for name, module in model.named_modules() if is_experts_module(module)]
    if not found:
        find_experts(model)  # knows why there are none
    return [_router_of(model, index, *pair) for index, pair in enumerate(found)]


def _router_of(model: nn.Module, index: int, experts_name: str, experts: nn.Module) -> Router:
    block_name = experts_name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    num_experts = int(experts.num_experts)  # type: ignore[arg-type]
    for name in _NAMES:
        module = getattr(block, name, None)
        if not isinstance(module, nn.Module):
            continue
        for source, part in module.named_modules():
            weight = getattr(part, "weight", None)
            # A layer may have as many hidden features as experts: rows are what makes logits.
            if (
                isinstance(weight, nn.Parameter)
                and weight.dim() == 2
                and 0 <= weight.shape[0] - num_experts <= 1
                and weight.is_floating_point()
            ):
                full = f"{block_name}.{name}" if block_name else name
                top_k = getattr(module, "top_k", None) or getattr(block, "top_k", None)
                width = weight.shape[0]
                return Router(index, full, module, source, experts, num_experts, width, top_k)
    raise UnsupportedModelError(
        f"no trainable router stands beside {experts_name} of {family(model)}, so where its tokens "
        "go cannot be trained; use a family whose routers have a weight of one row per expert"
    )


def router_logits(output: Any) -> Tensor:
    """
    The logits among what a router returns, ``(tokens, num_logits)``.

    They come first, as a rule; a few families of transformers 5.17 put what was chosen there.
    """
    logits = output if isinstance(output, Tensor) else output[0]
    if not logits.is_floating_point():
        logits = max((one for one in output if one.is_floating_point()), key=lambda o: o.shape[-1])
    return logits.reshape(-1, logits.shape[-1])


@dataclass
class Routing:
    """
    What one layer's router did in one forward pass; tokens are flat, in the batch's order.

    Attributes:
        logits: ``(tokens, num_logits)``, with gradient.
        top_k_index: int64 ``(tokens, top_k)``, what ran; ids outside the experts mean none.
        inputs: Positional and keyword inputs of the router, detached: for a reference router.
    """

    router: Router
    logits: Tensor
    top_k_index: Tensor
    inputs: tuple[tuple[Any, ...], dict[str, Any]]


class RoutingRecorder:
    """
    Collects, during a forward pass, what every router said and what ran.

    Used as a context manager around one forward pass; ``take()`` gives the layers' `Routing` and
    empties the recorder. Hooks only look; the pass is the same with and without them. Where a
    layer runs twice within the pass (recomputed activations in a backward pass), the first counts.
    """

    def __init__(self, routers: list[Router]):
        self.routers = routers
        self._logits: dict[int, Tensor] = {}
        self._index: dict[int, Tensor] = {}
        self._inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> RoutingRecorder:
        self._clear()
        for router in self.routers:
            layer = router.index
            add = self._handles.append
            part = router.module.get_submodule(router.source)
            add(router.module.register_forward_pre_hook(self._see_inputs(layer), with_kwargs=True))
            add(part.register_forward_hook(self._see_logits(layer)))
            add(router.experts.register_forward_pre_hook(self._see_choice(layer), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> list[Routing]:
        """
        What the pass recorded, one `Routing` per layer that ran, in layer order.

        Raises:
            UnsupportedModelError: a layer gave ids but no logits, or the other way round.
        """
        if self._logits.keys() != self._index.keys():
            odd = sorted(self._logits.keys() ^ self._index.keys())
            raise UnsupportedModelError(
                f"routers and experts of MoE layers {odd} did not run together, so their choices "
                "cannot be trained; use a family whose router is called beside its experts"
            )
        taken = [
            Routing(router, self._logits[i], self._index[i], self._inputs[i])
            for router in self.routers
            if (i := router.index) in self._logits
        ]
        self._clear()
        return taken

    def _clear(self) -> None:
        self._logits, self._index, self._inputs = {}, {}, {}

    def _see_inputs(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer not in self._inputs:
                detached = {key: _detach(value) for key, value in kwargs.items()}
                self._inputs[layer] = (tuple(map(_detach, args)), detached)

        return hook

    def _see_logits(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if layer not in self._logits:
                self._logits[layer] = router_logits(output)

        return hook

    def _see_choice(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer not in self._index:
                index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                self._index[layer] = index.detach().reshape(-1, index.shape[-1])

        return hook


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def fingerprint(model: nn.Module) -> str:
    """
    Name a model's routing: sha256 over all router weights and the experts' geometry.

    Two models have equal fingerprints exactly if their routers hold equal numbers; a trace or
    predictor of one then belongs to the other. Loading bfloat16 weights as float32 changes
    nothing. The experts' weights are not read.

    Returns:
        64 hexadecimal digits.

    Raises:
        UnsupportedModelError: as `find_routers`.
    """
    digest = hashlib.sha256()
    for router in find_routers(model):
        digest.update(f"{router.index} {router.num_experts} {router.top_k}\n".encode())
        state = {**dict(router.module.named_parameters()), **dict(router.module.named_buffers())}
        for name in sorted(state):
            tensor = state[name].detach().cpu().double().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
