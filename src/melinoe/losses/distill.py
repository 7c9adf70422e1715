"""What holds a model's words near the base model's: distillation over the vocabulary."""

from typing import Any

import torch
from torch import Tensor

from melinoe.losses.select import completion_positions


def distillation_loss(
    logits: Tensor,
    base_logits: Tensor,
    labels: Tensor,
    *,
    ignored: int = -100,
    denominator: Tensor | float | None = None,
    tokens_at_once: int = 256,
) -> Tensor:
    """
    KL of the base model's next-token distribution to this model's, in nats per predicted token.

    Args:
        logits: ``(batch, tokens, vocabulary)``, with gradient; any float type.
        base_logits: The base model's on the same tokens; never differentiated.
        labels: int64 ``(batch, tokens)``; where it is *ignored*, the token is not predicted. The
            distribution before a token predicts it, so the first column never counts.
        denominator: What the sum is divided by; default: the predicted tokens of this batch.
        tokens_at_once: Bounds memory: so many rows of the vocabulary in float32, three times.

    Returns:
        A float32 scalar, never below 0 but for rounding.

    Cost: the gradient is taken in the forward pass, so what is kept for the backward pass is one
    tensor of the predicted tokens' logits in their own type, and no softmax.
    """
    at = completion_positions(labels[:, 1:] != ignored)
    width = labels.shape[1] - 1
    rows = torch.div(at, width, rounding_mode="floor") * labels.shape[1] + at % width
    ours = logits.flatten(0, 1).index_select(0, rows)
    theirs = base_logits.flatten(0, 1).index_select(0, rows)
    total = _SummedDivergence.apply(ours, theirs, tokens_at_once)
    count = max(1, rows.numel()) if denominator is None else denominator
    return total / count


class _SummedDivergence(torch.autograd.Function):
    """Sum over rows of KL(softmax(base) || softmax(ours)); its gradient is their difference."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, base: Tensor, tokens_at_once: int) -> Tensor:
        gradient = torch.empty_like(ours)
        total = torch.zeros((), device=ours.device)
        for at in range(0, ours.shape[0], tokens_at_once):
            rows = slice(at, at + tokens_at_once)
            log_p, log_b = (x[rows].float().log_softmax(-1) for x in (ours, base))
            b = log_b.exp()
            total += (b * (log_b - log_p)).sum()
            gradient[rows] = (log_p.exp() - b).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None
