"""Count how often completions choose each expert, without keeping who chose it when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.counters import COMPLETION
from melinoe.engine.calls import Batch


class UseMeter:
    """
    Counts the uses of completion tokens, by layer and expert; stands where a `Recorder` would.

    Counting stays on the device that the choices are on, and waits for nothing until `counts`.

    Args:
        num_experts: of each MoE layer.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._num_experts = tuple(num_experts)
        self._uses: dict[int, Tensor] = {}
        self._now: dict[int, Tensor] | None = None
        self._padding: Tensor | None = None

    def begin(self, phase: int, tokens: int, call: Batch | None) -> None:
        """A pass of *tokens* rows begins; those of a prompt are not counted."""
        self._now = {} if phase == COMPLETION else None
        fits = call is not None and tokens == call.batch * call.length
        self._padding = call.padding() if call is not None and fits else None

    def add(self, layer: int, top_k_index: Tensor, *_: Any, **__: Any) -> None:
        """The rows of the open pass chose ``top_k_index`` ``(tokens, top_k)`` in *layer*."""
        if self._now is not None:
            self._now[layer] = top_k_index.detach().to(torch.int64, copy=True)

    def end(self) -> None:
        """The open pass is complete."""
        for layer, ids in (self._now or {}).items():
            experts = self._num_experts[layer]
            # One place more, for what is no expert: skip slots and padding.
            ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
            if self._padding is not None:
                padding = self._padding.to(ids.device).reshape(-1, 1)
                ids = torch.where(padding, experts, ids)
            if layer not in self._uses:
                self._uses[layer] = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
            flat = ids.reshape(-1)
            self._uses[layer].scatter_add_(0, flat, torch.ones_like(flat))
        self._now = None

    def drop(self) -> None:
        """Forget the open pass."""
        self._now = None

    def counts(self) -> np.ndarray:
        """Uses so far, int64 ``(layers, most experts of a layer)``; waits for the device."""
        found = np.zeros((len(self._num_experts), max(self._num_experts)), np.int64)
        for layer, uses in self._uses.items():
            found[layer, : self._num_experts[layer]] = uses[:-1].cpu().numpy()
        return found
