"""What makes a layer's experts refuse to run: gradients, and a model that was moved or cast."""

from __future__ import annotations

import torch
from torch import Tensor

from melinoe.errors import AttachError


class Guard:
    """
    Looks at each call of one layer's experts, whichever engine computes them.

    Args:
        device: where the slots are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._witness: tuple[Tensor, torch.dtype] | None = None

    def watch(self, parameter: Tensor) -> None:
        """Refuse to run once *parameter*, an empty one left in the module, is moved or cast."""
        self._witness = (parameter, parameter.dtype)

    def check(self, hidden_states: Tensor, top_k_weights: Tensor) -> None:
        """
        Let the call pass, or not.

        Raises:
            AttachError: gradients are wanted, or the model was moved or cast since `attach`.
        """
        if hidden_states.requires_grad or top_k_weights.requires_grad:
            raise AttachError(
                "offloaded experts have no gradient; run the model under torch.no_grad(), or "
                "detach() the runtime to train"
            )
        if self._witness is None:
            return
        parameter, dtype = self._witness
        if parameter.dtype is not dtype or parameter.device != self._device:
            raise AttachError(
                f"the model was moved or cast (to {parameter.device}, {parameter.dtype}) after the "
                "runtime was attached; detach() first, then move it and attach again"
            )
