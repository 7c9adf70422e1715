"""Record the hidden states of a forward pass, at places that every family has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from melinoe.moe.routing import Router


class HiddenRecorder:
    """
    Collects what each router and the language-model head were shown, with its graph.

    Between one router and the next lies one MoE block, so these are the model's hidden states after
    each of them, whatever a family calls its layers; what the head sees comes after the last. Used
    as a context manager around one forward pass; ``take()`` empties it. Where a part runs twice
    within the pass (recomputed activations), the first counts.

    Args:
        routers: Of *model*, from `find_routers`.
        model: Gives the head, ``get_output_embeddings()``; one without a head has a place less.
    """

    def __init__(self, routers: list[Router], model: Any) -> None:
        self._parts: list[nn.Module] = [router.module for router in routers]
        head = model.get_output_embeddings()
        if head is not None:
            self._parts.append(head)
        self._seen: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> HiddenRecorder:
        self._seen = {}
        for place, part in enumerate(self._parts):
            hook = self._see(place)
            self._handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> dict[int, Tensor]:
        """Place in the model's order, those that ran, to ``(tokens, features)``."""
        seen, self._seen = self._seen, {}
        return seen

    def _see(self, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if place in self._seen:
                return
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and torch.is_floating_point(value) and value.dim() > 1:
                    self._seen[place] = value.reshape(-1, value.shape[-1])
                    return

        return hook
