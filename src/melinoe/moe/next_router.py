"""
Ask the next layer's router early: show it the inputs of this layer's router.

Hidden states change little from one layer to the next, so the next layer's router, given the inputs
of this layer's, often names the experts that the next layer will ask for. The router module itself
is run, whatever it makes of its inputs; nothing here repeats a family's way of choosing.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from melinoe.errors import UnsupportedModelError
from melinoe.moe.dispatch import NOT_COMPILED
from melinoe.moe.routing import Router, router_logits


class NextRouters:
    """
    The routers of a model, each to be asked about the inputs of the one before it.

    While it is open, a hook on each router keeps its latest inputs. The modules asked share the
    model's parameters but not its hooks. UnsupportedModelError where a router reads vectors of
    another width than the one before it.

    Source:
        Speculative loading: Eliseev and Mazur, arXiv:2312.17238, who apply the next layer's gate
        to the current hidden state; their code is Mixtral's, this is any family's.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = list(routers)
        for one, other in pairwise(self._routers):
            if one.weight.shape[1] != other.weight.shape[1]:
                raise UnsupportedModelError(
                    f"the router {other.name} reads vectors of {other.weight.shape[1]} numbers and "
                    f"{one.name} of {one.weight.shape[1]}, so it cannot be asked early"
                )
        self._logits: list[Tensor] = []
        self._bare = [_without_hooks(router.module) for router in self._routers]
        for router, bare in zip(self._routers, self._bare, strict=True):
            bare.get_submodule(router.source).register_forward_hook(
                lambda _, __, output: self._logits.append(router_logits(output))
            )
        self._inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._handles = [
            router.module.register_forward_pre_hook(self._see(router.index), with_kwargs=True)
            for router in self._routers[:-1]
        ]

    def _see(self, layer: int) -> Any:
        @torch.compiler.disable(reason=NOT_COMPILED)
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[layer] = (args, kwargs)

        return hook

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    @torch.no_grad()
    def guess(self, layer: int, target: int, rows: int, top_k: int) -> Tensor:
        """
        Ask the router of *target* about the inputs of *layer*'s router: integers ``(rows, top_k)``.

        They are its own choice where it returns one, so that correction biases and groups count,
        else its highest logits; ids outside the experts mean none. UnsupportedModelError where that
        cannot be read.
        """
        router = self._routers[target]

        def refusal(why: str) -> UnsupportedModelError:
            return UnsupportedModelError(f"the router {router.name} cannot be asked early: {why}")

        given = self._inputs.pop(layer, None)
        if given is None:
            raise refusal(f"{self._routers[layer].name} did not run before it")
        self._logits.clear()
        try:
            output = self._bare[target](*given[0], **given[1])
        except Exception as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise refusal(f"it does not take its inputs ({what})") from error
        for part in output if isinstance(output, tuple | list) else ():
            if isinstance(part, Tensor) and part.dtype in (torch.int64, torch.int32):
                ids = part.reshape(-1, part.shape[-1])
                if ids.shape[0] == rows:
                    return ids
        if not self._logits or self._logits[0].shape[0] != rows:
            raise refusal("it gives no logits for each token")
        count = min(router.top_k or top_k, router.num_experts)
        return self._logits[0][:, : router.num_experts].topk(count).indices


def _without_hooks(module: nn.Module) -> nn.Module:
    """Copy *module* without its hooks; parameters and buffers are shared."""
    bare = copy.copy(module)
    bare.__dict__ = dict(module.__dict__)
    for name in module.__dict__:
        if name.startswith(("_forward_", "_backward_")) and "hooks" in name:
            bare.__dict__[name] = OrderedDict()
    bare.__dict__["_modules"] = {
        name: None if child is None else _without_hooks(child)
        for name, child in module._modules.items()
    }
    return bare
