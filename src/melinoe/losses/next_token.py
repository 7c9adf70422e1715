"""The next-token loss, of which the backward pass needs one tensor of logits instead of three."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

_AT_ONCE = 1 << 22  # logits that are turned into float32 log-probabilities at a time: 16 MiB


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignored: int = -100,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    Cross-entropy of each next token, equal to transformers' ``ForCausalLMLoss`` bit for bit.

    Args:
        logits: ``(batch, tokens, vocabulary)``, with gradient; any float type.
        labels: int64 ``(batch, tokens)``; where it is *ignored*, the token is not predicted. The
            logits before a token predict it, so the first column never counts.
        ignored: See *labels*.
        denominator: Divides the sum; default: the number of predicted tokens, at least 1.

    Returns:
        A float32 scalar, in nats.
    """
    targets = torch.nn.functional.pad(labels, (0, 1), value=ignored)[:, 1:].reshape(-1)
    total: Tensor = _SummedLoss.apply(logits.flatten(0, 1), targets.to(logits.device), ignored)
    if denominator is None:
        denominator = (targets != ignored).sum().clamp(min=1)
    return total / (
        denominator.to(total.device) if isinstance(denominator, Tensor) else denominator
    )


class _SummedLoss(torch.autograd.Function):
    """Sum over rows; log-probabilities are made some rows at a time, and again for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.ignored = ignored
        place = targets.clamp(min=0)[:, None]
        chosen = torch.empty(place.shape, device=logits.device)
        for rows in _parts(logits):
            chosen[rows] = logits[rows].float().log_softmax(-1).gather(1, place[rows])
        # The library's own sum, whose order of addition no other has.
        only = targets.clone()
        only[targets != ignored] = 0
        return nll_loss(chosen, only, ignore_index=ignored, reduction="sum")

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        logits, targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        counts, place = (targets != ctx.ignored)[:, None], targets.clamp(min=0)[:, None]
        pull = torch.where(counts, -upstream[0], 0.0)
        for rows in _parts(logits):
            log_p = logits[rows].float().log_softmax(-1)
            own = torch.zeros_like(log_p).scatter_(1, place[rows], pull[rows])
            gradient[rows] = torch._log_softmax_backward_data(own, log_p, -1, log_p.dtype)
        return gradient, None, None


def _parts(logits: Tensor) -> Iterator[slice]:
    step = max(1, _AT_ONCE // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)
