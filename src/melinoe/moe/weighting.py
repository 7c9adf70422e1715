"""
How a router turns logits into weights, found by watching it rather than by knowing its family.

A cache-aware choice replaces an expert that the router chose by another; the newcomer then needs
the weight that the router would have given it. Families differ (softmax or sigmoid, over all
experts or over the chosen, scaled or not), yet nearly all follow

    weight_k = scale * f(z)_k                      for some, and
    weight_k = scale * f(z)_k / sum_chosen f(z)    for others,

with z the logits and f one of a few functions. Which one holds is read off the first tokens that
pass by: logits, choices and weights are all there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from melinoe.errors import UnsupportedModelError

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt-softplus": lambda z: F.softplus(z).sqrt(),
    "softplus": F.softplus,
}


@dataclass(frozen=True)
class Weighting:
    """
    The rule of one router.

    Attributes:
        function: Name of f.
        normalised: Whether the chosen ones' values are divided by their sum.
        scale: Factor on all.
    """

    function: str
    normalised: bool
    scale: float

    def weights(self, logits: Tensor, index: Tensor) -> Tensor:
        """
        Weights of any choice.

        Args:
            logits: ``(tokens, num_logits)``.
            index: int64 ``(tokens, top_k)``, ids within the logits.

        Returns:
            float32 ``(tokens, top_k)``.
        """
        values = _FUNCTIONS[self.function](logits.float()).gather(-1, index)
        if self.normalised:
            values = values / values.sum(-1, keepdim=True).clamp(min=1e-20)
        return self.scale * values

    def gives(self, logits: Tensor, index: Tensor, weights: Tensor) -> bool:
        """Whether the rule gives these weights, up to the rounding of their type."""
        return self.error(logits, index, weights) <= _tolerance(weights)

    def error(self, logits: Tensor, index: Tensor, weights: Tensor) -> float:
        """Largest distance between the rule and *weights*, as a share of the latter."""
        observed = weights.float()
        error = (observed - self.weights(logits, index)).abs()
        return float((error / observed.abs().clamp(min=1e-3)).max())


def _tolerance(weights: Tensor) -> float:
    """Rounding of the weights' own type, and of a router that computes in it."""
    return 2e-4 if weights.dtype == torch.float32 else 3e-2


def _plain(scale: float, tolerance: float) -> float:
    """The number of fewest digits near *scale*: configs say 2.5 or 1, whatever tokens are seen."""
    for digits in range(1, 5):
        short = float(f"{scale:.{digits}g}")
        if abs(short - scale) <= tolerance * abs(scale):
            return short
    return scale


def find_weighting(logits: Tensor, index: Tensor, weights: Tensor) -> Weighting:
    """
    The rule that gave *weights*.

    Args:
        logits: ``(tokens, num_logits)`` of the router.
        index: int64 ``(tokens, top_k)``, what it chose, all of them experts.
        weights: ``(tokens, top_k)``, what it gave them.

    Raises:
        UnsupportedModelError: no known rule gives these weights.

    Of several rules that would do, the one that comes nearest is taken: near zero logits they
    resemble each other.
    """
    best: tuple[float, Weighting] | None = None
    total = weights.float().sum()
    for name in _FUNCTIONS:
        for normalised in (False, True):
            sums = Weighting(name, normalised, 1.0).weights(logits, index).sum()
            scale = _plain(float(total / sums.clamp(min=1e-20)), _tolerance(weights) / 20)
            rule = Weighting(name, normalised, scale)
            error = rule.error(logits, index, weights)
            if error <= _tolerance(weights) and (best is None or error < best[0]):
                best = error, rule
    if best is not None:
        return best[1]
    raise UnsupportedModelError(
        "this model's routers weigh experts by a rule that is not known here, so its choices "
        'cannot be changed; serve it with choice="exact"'
    )
