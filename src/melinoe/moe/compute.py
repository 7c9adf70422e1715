"""
Compute experts from slots with transformers' own functions; ours is only the renumbering.

If all experts of a request are in slots at once, it is one call of transformers' function, on a
`StandIn` for the module. Otherwise the (token, choice) pairs are computed part by part, unweighted,
and then weighted and summed by the same operations, in the same order, as transformers' last lines
(`Pairs`), so that both ways agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_FLAGS = {
    "has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True,
    "has_post_expert_norm": False,
}  # fmt: skip
Forward = Callable[..., Tensor]


class StandIn:
    """Looks like an experts module whose experts are the slots; *module* has everything else."""

    def __init__(self, module: nn.Module, slots: Mapping[str, Tensor], num_slots: int) -> None:
        flags = {name: getattr(module, name, default) for name, default in _FLAGS.items()}
        self._module, self.num_experts = module, num_slots
        self._is_expert_parallel = False
        self._apply_gate = module._apply_gate
        vars(self).update(flags | dict(slots))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Pairs:
    """
    The outputs of a request that is computed in parts, or that has choices of no expert. A pair
    that is never computed contributes nothing, as in transformers' eager loop, which skips ids
    outside ``[0, num_experts)``. *outputs* are ``(tokens * top_k, hidden)``, unweighted.
    """

    def __init__(self, hidden_states: Tensor, top_k: int, dtype: torch.dtype) -> None:
        self._hidden_states, self._top_k = hidden_states, top_k
        tokens, hidden = hidden_states.shape
        self.outputs = hidden_states.new_zeros((tokens * top_k, hidden), dtype=dtype)

    def add(
        self, forward: Forward, stand_in: StandIn, slot_of_pair: Tensor, due: Tensor | None = None
    ) -> None:
        """
        Compute the pairs that have a slot now: *slot_of_pair*, int64 ``(tokens * top_k,)``, is
        below 0 for pairs that are not *due*, which is ascending, or found, and then the host waits.
        """
        if due is None:
            due = (slot_of_pair >= 0).nonzero().squeeze(-1)
        if due.numel() == 0:
            return
        # One choice per row and weight 1: the product and the sum of one term change no bit.
        hidden = self.rows(self.tokens_of(due))
        weights = hidden.new_ones((due.numel(), 1))
        self.put(due, forward(stand_in, hidden, slot_of_pair[due].unsqueeze(-1), weights))

    def tokens_of(self, due: Any) -> Any:
        """Map pairs to their tokens."""
        return due // self._top_k

    def rows(self, tokens: Tensor) -> Tensor:
        """Gather the hidden states of *tokens* in the experts' dtype, ``(len(tokens), hidden)``."""
        return self._hidden_states[tokens].to(self.outputs.dtype)

    def put(self, due: Tensor, outputs: Tensor) -> None:
        """Store the *outputs* ``(len(due), hidden)`` of the pairs *due*."""
        self.outputs[due] = outputs

    def total(self, top_k_weights: Tensor) -> Tensor:
        """Weight the pairs by *top_k_weights* ``(tokens, top_k)`` and sum: ``(tokens, hidden)``."""
        tokens, hidden = self._hidden_states.shape
        weighted = self.outputs * top_k_weights.reshape(-1).unsqueeze(-1)
        summed = weighted.view(tokens, self._top_k, hidden).sum(dim=1)
        return summed.to(self._hidden_states.dtype)
