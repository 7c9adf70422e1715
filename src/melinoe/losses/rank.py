"""Hold a router to the order in which the base model's router had its experts."""

import torch
from torch import Tensor

from melinoe.losses.select import mean, select

_PAIRS_AT_ONCE = 1 << 24


def rank_matching_loss(
    router_logits: Tensor,
    base_logits: Tensor,
    completion: Tensor,
    *,
    rho: float,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    Average ``max(0, rho - (p_i - p_j))`` over the pairs of experts with ``b_i > b_j``.

    The paper sums over pairs: multiply the weight of this mean by experts x (experts - 1) / 2.

    Args:
        router_logits: ``(batch, tokens, ..., experts)``, with gradient; ``p`` is their softmax.
        base_logits: The base router's on the same inputs, same shape; ``b`` is their softmax.
        completion, denominator: As in `cache_simulation_loss`.
        rho: Margin in probability that a pair should keep.

    Returns:
        float32 of shape ``(...)``.

    Cost: experts squared a token, of which nothing is kept: where its pairs are fixed the loss is
    linear in ``p``, so the backward pass needs their counts alone.

    Source: MELINOE, arXiv:2602.11192.
    """
    experts = router_logits.shape[-1]
    p = select(router_logits, completion).float().softmax(-1)
    with torch.no_grad():
        b = select(base_logits, completion).float().softmax(-1).reshape(-1, experts)
        q = p.detach().reshape(-1, experts)
        slope, count = torch.empty_like(q), q.new_empty(q.shape[0])
        step = max(1, _PAIRS_AT_ONCE // experts**2)
        for at in range(0, q.shape[0], step):
            i, j = (slice(at, at + step), slice(None), None), (slice(at, at + step), None)
            short = ((b[i] > b[j]) & (q[i] - q[j] < rho)).to(q)
            slope[at : at + step] = short.sum(1) - short.sum(2)
            count[at : at + step] = short.sum((1, 2))
    per_token = rho * count.view(p.shape[:-1]) + (p * slope.view(p.shape)).sum(-1)
    return mean(per_token / max(1.0, experts * (experts - 1) / 2), denominator)
