"""Frozen copies of a model's routers: the reference that a trained router is held to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from melinoe.moe.routing import Router, Routing, router_logits


class BaseRouters:
    """
    Frozen copies of routers as they are now, to be asked about other inputs or used in their place.

    They compute in float32, except within an autocast; *states* are other states for them, by name.
    """

    def __init__(
        self, routers: list[Router], states: Mapping[str, Mapping[str, Tensor]] | None = None
    ):
        self.routers = routers
        self._copies = {}
        for router in routers:
            frozen = copy.deepcopy(router.module).float().eval().requires_grad_(False)
            if states is not None and router.name in states:
                frozen.load_state_dict(states[router.name])
            self._copies[router.index] = frozen

    @torch.no_grad()
    def logits(self, routing: Routing) -> Tensor:
        """Compute the base router's logits on the router's inputs: ``(tokens, num_logits)``."""

        def wide(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.float() if floating else value

        args, kwargs = routing.inputs
        kwargs = {key: wide(value) for key, value in kwargs.items()}
        return self._ask(routing.router, tuple(map(wide, args)), kwargs)[1]

    @contextmanager
    def in_place(self) -> Iterator[dict[int, Tensor]]:
        """Let the copies answer for the routers in the body; yields the logits of each layer."""
        logits: dict[int, Tensor] = {}
        before: list[tuple[nn.Module, Any]] = []

        def answer(router: Router) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output, seen = self._ask(router, args, kwargs)
                logits.setdefault(router.index, seen)
                return output

            return forward

        try:
            for router in self.routers:
                # In the module's own dictionary, where hooks on the module see no difference.
                before.append((router.module, router.module.__dict__.get("forward")))
                router.module.forward = answer(router)  # type: ignore[method-assign]
            yield logits
        finally:
            for module, forward in before:
                del module.__dict__["forward"]
                if forward is not None:
                    module.forward = forward

    def _ask(self, router: Router, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the copy of *router* on the inputs' device; its output, and the logits it made."""
        module, seen = self._copies[router.index], []
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if device is not None:
            module.to(device)
        handle = module.get_submodule(router.source).register_forward_hook(
            lambda _, __, output: seen.append(router_logits(output))
        )
        try:
            return module(*args, **kwargs), seen[0]
        finally:
            handle.remove()
