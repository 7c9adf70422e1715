"""What captured steps of one kind agree in: their inputs, their cache, and PyTorch's modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from melinoe.engine.device.cache_state import CacheKind, Kinds, moved
from melinoe.engine.device.graph_inputs import signature

# Tensors that the next step would overwrite while the caller keeps them.
_KEPT = ("output_attentions", "output_hidden_states")


class StepKinds:
    """
    Tells steps apart.

    Args:
        device: of the model.
        warn: told, in words, why steps cannot be captured.
    """

    def __init__(self, device: torch.device, warn: Callable[[str], None]) -> None:
        self._device, self._warn = device, warn
        self._kinds = Kinds()
        self._moving: set[str] = set()

    def of(self, inputs: Mapping[str, Any]) -> tuple | None:
        """The kind of a step with these inputs; None if it cannot be captured."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        kept = [name for name in _KEPT if inputs.get(name)]
        if kept:
            self._warn(f"{kept[0]} is asked for, and would be overwritten by the next step")
            return None
        kind = self._device.type
        key: list[Any] = [torch.is_inference_mode_enabled(), torch.is_grad_enabled()]
        key += [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)]
        for name in sorted(inputs):
            value = inputs[name]
            part = self._of_cache(value) if isinstance(value, StaticCache) else signature(value)
            if part is None:
                self._warn(f"nothing is known of its input {name}, a {type(value).__name__}")
                return None
            if part is _MOVES:
                return None
            key.append((name, part))
        return tuple(key)

    def caches(self, inputs: Mapping[str, Any]) -> list[CacheKind]:
        """The kinds of the static caches among *inputs*."""
        return [self._kinds.of(one) for one in inputs.values() if isinstance(one, StaticCache)]

    def is_steady(self, before: list[CacheKind], after: list[CacheKind]) -> bool:
        """Whether a step left its caches where they were; if not, they are not captured again."""
        odd = set().union(*map(moved, before, after))
        if odd:
            self._moving |= odd
            self._warn(f"a step leaves other memory in {', '.join(sorted(odd))} of its cache")
        return not odd

    def _of_cache(self, cache: StaticCache) -> Any:
        if getattr(cache, "offloading", False):
            self._warn("its cache is offloaded, and moves in every step")
            return _MOVES
        if self._moving and any(type(one).__name__ in self._moving for one in cache.layers):
            return _MOVES
        return self._kinds.of(cache)


_MOVES = object()
