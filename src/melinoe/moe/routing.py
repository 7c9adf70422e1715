"""
Find the routers of a transformers model, and record their inputs, their logits and what then runs.

A router is the ``gate`` or ``router`` beside an experts module in its block. Families choose in
many ways (correction biases, groups, sigmoid scores, skip slots), so nothing here repeats a choice:
ids are taken from the inputs of the experts module, logits where the router's weight makes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from melinoe.errors import UnsupportedModelError
from melinoe.moe.experts import family, find_experts, is_experts_module

_NAMES = ("gate", "router")


@dataclass(frozen=True)
class Router:
    """The router of one MoE layer."""

    index: int  # of the MoE layer, as in `find_experts`
    name: str  # of the module, as in ``named_modules()``
    module: nn.Module = field(repr=False)
    # Dotted name, below *module*, of the submodule that makes the logits; empty: the module.
    source: str
    experts: nn.Module = field(repr=False)  # their weights may have been taken out
    num_experts: int  # skip slots not counted
    num_logits: int  # the experts, then skip slots if it has any
    top_k: int | None  # experts per token

    @property
    def weight(self) -> nn.Parameter:
        """The weight that makes the logits, ``(num_logits, hidden)``."""
        return self.module.get_submodule(self.source).weight  # type: ignore[return-value]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield full name and parameter of all that decides the logits or the choice."""
        for name, parameter in self.module.named_parameters():
            yield f"{self.name}.{name}", parameter


def find_routers(model: nn.Module) -> list[Router]:
    """
    Find the router of each MoE layer, in the order of `find_experts`; also of an offloaded model.
    UnsupportedModelError: no MoE layers, or a layer whose router has no trainable weight of one row
    per expert, so its choice could not be trained.
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
            # A layer may have as many hidden features as experts: its rows make the logits.
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
    """Take the logits from what a router returns: first, as a rule, ``(tokens, num_logits)``."""
    logits = output if isinstance(output, Tensor) else output[0]
    if not logits.is_floating_point():
        logits = max((one for one in output if one.is_floating_point()), key=lambda o: o.shape[-1])
    return logits.reshape(-1, logits.shape[-1])


class Routing(NamedTuple):
    """One layer's router in one forward pass; tokens are flat, in the batch's order."""

    router: Router
    logits: Tensor  # ``(tokens, num_logits)``, with gradient
    top_k_index: Tensor  # int64 ``(tokens, top_k)``, that ran; ids outside the experts: none
    inputs: tuple[tuple[Any, ...], dict[str, Any]]  # of the router, detached


class RoutingRecorder:
    """
    Collects, during a forward pass, every router's inputs and logits, and the choices that ran.
    ``take()`` returns the layers' `Routing` and empties it. Where a layer runs twice within the
    pass (recomputed activations), the first run counts.
    """

    def __init__(self, routers: list[Router]):
        self.routers = routers
        self._clear()

    def __enter__(self) -> Self:
        self._clear()
        self._handles = [one for router in self.routers for one in self._hook(router)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[Routing]:
        """Return one `Routing` per layer that ran, in layer order."""
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
        self._logits: dict[int, Tensor] = {}
        self._index: dict[int, Tensor] = {}
        self._inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def _hook(self, router: Router) -> Iterator[Any]:
        layer = router.index

        def inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer not in self._inputs:
                detached = {key: _detach(value) for key, value in kwargs.items()}
                self._inputs[layer] = (tuple(map(_detach, args)), detached)

        def logits(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if layer not in self._logits:
                self._logits[layer] = router_logits(output)

        def choice(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer not in self._index:
                index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                self._index[layer] = index.detach().reshape(-1, index.shape[-1])

        yield router.module.register_forward_pre_hook(inputs, with_kwargs=True)
        yield router.module.get_submodule(router.source).register_forward_hook(logits)
        yield router.experts.register_forward_pre_hook(choice, with_kwargs=True)


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def fingerprint(model: nn.Module) -> str:
    """
    Hash a model's routing: sha256 over all router weights and the experts' geometry. The 64
    hexadecimal digits are equal exactly if the routers hold equal numbers, in whatever type; a
    trace or predictor of one model then belongs to the other.
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
