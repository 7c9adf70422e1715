"""Count which experts a prompt's own tokens choose, while it is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.trace import PROMPT_ROW
from melinoe.engine.calls import Batch, rows_of
from melinoe.errors import AttachError


class PromptUses:
    """
    (token, choice) pairs of one prompt, by layer and expert; padding counts nowhere.

    The counts are kept where the choices are, so that a device is not waited for before the end.

    Args:
        num_experts: of each layer.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._num_experts = tuple(num_experts)
        self._counts: dict[int, Tensor] = {}
        self._own: np.ndarray | None = None

    def begin(self, phase: int, tokens: int, call: Batch | None) -> None:
        """
        A pass of a prompt begins.

        Raises:
            AttachError: it reads several prompts.
        """
        if call is not None and call.batch > 1:
            raise AttachError(
                f"a prefetch for a prompt serves one sequence at a time and {call.batch} came "
                "together; generate from one prompt after the other, or prefetch by next-router"
            )
        _, kinds = rows_of(call, phase, tokens)
        self._own = None if (kinds == PROMPT_ROW).all() else kinds == PROMPT_ROW

    def add(self, layer: int, top_k_index: Tensor) -> None:
        """The rows of the pass chose ``top_k_index`` ``(tokens, top_k)`` in *layer*."""
        experts = self._num_experts[layer]
        chosen = top_k_index.detach().long()
        if self._own is not None and len(self._own) == chosen.shape[0]:
            chosen = chosen[torch.from_numpy(self._own).to(chosen.device)]
        chosen = chosen.reshape(-1)
        # The last cell takes choices of no expert.
        chosen = torch.where((chosen >= 0) & (chosen < experts), chosen, experts)
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(experts + 1, dtype=torch.int64, device=chosen.device)
        self._counts[layer].scatter_add_(0, chosen, torch.ones_like(chosen))

    def counts(self) -> np.ndarray:
        """int64 (layers, the most experts of a layer)."""
        found = np.zeros((len(self._num_experts), max(self._num_experts)), np.int64)
        for layer, counts in self._counts.items():
            found[layer, : self._num_experts[layer]] = counts[:-1].cpu().numpy()
        return found
