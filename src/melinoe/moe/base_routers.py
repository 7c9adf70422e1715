"""Frozen copies of a model's routers: the reference that a trained router is held to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from melinoe.moe.routing import Router, Routing, router_logits


class BaseRouters:
    """
    Copies of *routers* as they are now, in float32, to be asked what they say of other inputs.

    Cost: the routers' parameters once more; a router's forward pass per question.
    """

    def __init__(self, routers: list[Router]):
        self._copies = {
            one.index: copy.deepcopy(one.module).float().eval().requires_grad_(False)
            for one in routers
        }

    @torch.no_grad()
    def logits(self, routing: Routing) -> Tensor:
        """Compute the base router's logits on the router's inputs: ``(tokens, num_logits)``."""

        def wide(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.float() if floating else value

        args, kwargs = routing.inputs
        router, seen = self._copies[routing.router.index], list[Tensor]()
        router.to(routing.logits.device)
        handle = router.get_submodule(routing.router.source).register_forward_hook(
            lambda _, __, output: seen.append(router_logits(output))
        )
        try:
            router(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})
        finally:
            handle.remove()
        return seen[0]
