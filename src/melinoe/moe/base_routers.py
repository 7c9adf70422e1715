"""Frozen copies of a model's routers: the reference that a trained router is held to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from melinoe.moe.routing import Router, Routing, router_logits


def _widen(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if floating else value


class BaseRouters:
    """
    Frozen copies of routers as they are now, to be asked about other inputs or used in their place.

    They compute in float32, whatever the model computes in, except within an autocast.

    Args:
        routers: of the model, as they are now.
        states: by router name, another state for its copy: routers of an earlier run.

    Cost: the routers' parameters once more in float32; a router's forward pass per question.
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
        args, kwargs = routing.inputs
        args = tuple(map(_widen, args))
        kwargs = {key: _widen(value) for key, value in kwargs.items()}
        module = self._copy(routing.router, args)
        with _logits_of(module, routing.router.source) as seen:
            module(*args, **kwargs)
        return seen[0]

    @contextmanager
    def in_place(self) -> Iterator[dict[int, Tensor]]:
        """
        Let the copies answer for the routers in the body: a pass of the base model, no gradients.

        Yields:
            A dictionary that gets each layer's logits ``(tokens, num_logits)`` as the pass runs.
        """
        logits: dict[int, Tensor] = {}
        before: list[tuple[nn.Module, Any]] = []
        try:
            for router in self.routers:
                # In the module's own dictionary, where hooks on the module see no difference.
                before.append((router.module, router.module.__dict__.get("forward")))
                router.module.forward = self._answer(router, logits)  # type: ignore[method-assign]
            yield logits
        finally:
            for module, forward in before:
                del module.__dict__["forward"]
                if forward is not None:
                    module.forward = forward

    def _answer(self, router: Router, logits: dict[int, Tensor]) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            module = self._copy(router, args or tuple(kwargs.values()))
            with _logits_of(module, router.source) as seen:
                output = module(*args, **kwargs)
            logits.setdefault(router.index, seen[0])
            return output

        return forward

    def _copy(self, router: Router, inputs: tuple[Any, ...]) -> nn.Module:
        """Move the layer's copy to the device of its inputs."""
        module = self._copies[router.index]
        device = next((x.device for x in inputs if isinstance(x, Tensor)), None)
        return module if device is None else module.to(device)


@contextmanager
def _logits_of(module: nn.Module, source: str) -> Iterator[list[Tensor]]:
    """Collect the logits that *source* of *module* makes, ``(tokens, num_logits)`` each time."""
    seen: list[Tensor] = []

    def hook(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(router_logits(output))

    handle = module.get_submodule(source).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
