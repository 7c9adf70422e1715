"""The next-token loss, made of some tokens' logits at a time, and again for the gradient."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import nll_loss, pad
from torch.utils.checkpoint import checkpoint

# Logits at a time: 32 MiB in float32, and about four times that while they are worked off.
LOGITS_AT_ONCE = 1 << 23


def next_token_loss(
    states: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor] | None = None,
    vocabulary: int | None = None,
    *,
    ignored: int = -100,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    Cross-entropy of each next token.

    Without a head equal to transformers' ``ForCausalLMLoss`` bit for bit; with one, within the
    order of float32's additions, and the logits of all tokens are never there at once.

    Args:
        states: ``(batch, tokens, features)``, with gradient: of a *head*, else the logits.
        labels: int64 ``(batch, tokens)``; where it is *ignored*, the token is not predicted. The
            logits before a token predict it, so the first column never counts.
        head: Makes logits ``(some, vocabulary)`` of ``(some, features)``; its own weights get no
            gradient. Called for tokens that are predicted alone.
        vocabulary: Width of the logits; needed with *head*.
        ignored: See *labels*.
        denominator: Divides the sum; default: the number of predicted tokens, at least 1.

    Returns:
        A float32 scalar, in nats.
    """
    targets = pad(labels, (0, 1), value=ignored)[:, 1:].reshape(-1).to(states.device)
    rows = states.flatten(0, 1)
    if head is not None:
        counted = (targets != ignored).nonzero().squeeze(-1)
        rows, targets = rows.index_select(0, counted), targets[counted]
    place = targets.clamp(min=0)[:, None]

    def log_probabilities(rows: Tensor, place: Tensor) -> Tensor:
        logits = rows if head is None else head(rows)
        return logits.float().log_softmax(-1).gather(1, place)

    step = max(1, LOGITS_AT_ONCE // (vocabulary or rows.shape[-1]))
    parts = [
        checkpoint(log_probabilities, *pair, use_reentrant=False, preserve_rng_state=False)
        for pair in zip(rows.split(step), place.split(step), strict=True)
    ]
    # The library's own sum, whose order of addition no other has.
    only = targets.clone()
    only[targets != ignored] = 0
    total = nll_loss(torch.cat(parts), only, ignore_index=ignored, reduction="sum")
    if denominator is None:
        denominator = (targets != ignored).sum().clamp(min=1)
    return total / (
        denominator.to(total.device) if isinstance(denominator, Tensor) else denominator
    )
