"""Record the hidden states of a forward pass, at places that every family has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from melinoe.moe.routing import Router


class HiddenRecorder:
    """
    Collects the inputs of each router and of the language-model head, with their graph.

    Between one router and the next lies one MoE block, so these are the model's hidden states after
    each block, whatever a family calls its layers. Used as a context manager around one forward
    pass; ``take()`` empties it. Where a part runs twice within the pass (recomputed activations),
    the first run counts.

    Args:
        routers: of *model*, from `find_routers`.
        model: gives the head, ``get_output_embeddings()``; without a head there is one place less.
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
        self._handles = [
            part.register_forward_pre_hook(self._see(place), with_kwargs=True)
            for place, part in enumerate(self._parts)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> dict[int, Tensor]:
        """Return hidden states ``(tokens, features)`` by place in the model's order."""
        seen, self._seen = self._seen, {}
        return seen

    def _see(self, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and torch.is_floating_point(value) and value.dim() > 1:
                    self._seen.setdefault(place, value.reshape(-1, value.shape[-1]))
                    return

        return hook
