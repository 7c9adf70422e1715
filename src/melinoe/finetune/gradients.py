"""Which term pulls at the routers, and how hard: the norm of each term's own weighted gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from melinoe.finetune.terms.objective import Terms


class TermGradients:
    """Sums the terms' gradients over the batches of one step. Cost: a backward pass per term."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, terms: Terms, parameters: Sequence[Tensor]) -> None:
        """Add one batch, before its own backward pass; terms without weight are left out."""
        for name, term in terms.parts().items():
            weight = terms.weights[name]
            if not weight or not term.requires_grad:
                continue
            gradients = torch.autograd.grad(
                weight * term, parameters, retain_graph=True, allow_unused=True
            )
            so_far = self._sums.get(name) or [torch.zeros_like(p) for p in parameters]
            self._sums[name] = [
                one if more is None else one + more
                for one, more in zip(so_far, gradients, strict=True)
            ]

    def norms(self, accelerator: Any) -> dict[str, float]:
        """``grad_norm_`` and the term's name to the norm of its sum over all processes."""
        found = {}
        for name, gradients in self._sums.items():
            flat = torch.cat([gradient.flatten().float() for gradient in gradients])
            if accelerator.num_processes > 1:
                flat = accelerator.reduce(flat, reduction="sum")
            found[f"grad_norm_{name}"] = float(flat.norm())
        return found
