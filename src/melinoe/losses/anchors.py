"""
What holds a router near the base router: rank matching, or a KL divergence.

Source: MELINOE, arXiv:2602.11192, for rank matching as a sum; the mean over pairs is ours.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from melinoe.losses.select import mean, select


def rank_matching_loss(
    router_logits: Tensor,
    base_logits: Tensor,
    completion: Tensor,
    *,
    rho: float,
    reduce: Literal["mean", "sum"] = "mean",
    denominator: Tensor | float | None = None,
    pairs_at_once: int = 1 << 19,
) -> Tensor:
    """
    By how much the router breaks the base router's order of experts, up to a margin.

    Args:
        router_logits: ``(batch, tokens, ..., experts)``, with gradient.
        base_logits: The base router's, same shape; never differentiated.
        completion: As in `cache_simulation_loss`.
        rho: Margin in probability that a pair should keep.
        reduce: ``mean`` divides the sum over ordered pairs by experts (experts - 1) / 2.
        denominator: As in `cache_simulation_loss`.
        pairs_at_once: Bounds memory, in bytes about three times as many, and speed: few enough
            stay in a processor's cache, many enough fill a GPU.

    Returns:
        float32 of shape ``(...)``.

    Cost: experts x (log experts + 1 / rho) per token instead of experts^2, and still exact: a pair
    keeps its margin only if its first expert has a probability of rho or more, and no more than
    1 / rho experts can. So all pairs count but those few. The loss is linear in p_f where its set
    of pairs is fixed, so only their counts are kept for the backward pass.
    """
    experts = router_logits.shape[-1]
    p = select(router_logits, completion).float().softmax(-1)
    with torch.no_grad():
        base = select(base_logits, completion).float().softmax(-1)
        q, b = p.detach().reshape(-1, experts), base.reshape(-1, experts)
        if q.is_cuda:
            pairs_at_once = max(pairs_at_once, 1 << 26)
        # Rounding may let one more expert than 1 / rho reach rho.
        above = experts if rho * experts <= 1 else min(experts, math.floor(1 / rho) + 1)
        step = max(1, pairs_at_once // (experts * above))
        slope, count = torch.empty_like(q), q.new_empty(q.shape[0])
        for at in range(0, q.shape[0], step):
            rows = slice(at, at + step)
            slope[rows], count[rows] = _active_pairs(q[rows], b[rows], rho, above)
        slope, count = slope.view(p.shape), count.view(p.shape[:-1])
    # sum_ij active (rho - p_i + p_j) = rho n + sum_i p_i (times i is lower - times it is higher)
    per_token = rho * count + (p * slope).sum(-1)
    if reduce == "mean":
        per_token = per_token / max(1.0, experts * (experts - 1) / 2)
    return mean(per_token, denominator)


def _active_pairs(q: Tensor, b: Tensor, rho: float, above: int) -> tuple[Tensor, Tensor]:
    """
    Of pairs (i, j) with b_i > b_j and q_i - q_j < rho: lower minus higher per expert, and number.

    First all pairs with b_i > b_j, from each expert's place in b; then those that keep their
    margin, whose i is among the *above* highest of q, are taken away again.
    """
    experts = q.shape[-1]
    order = b.sort(dim=-1)
    place = torch.arange(experts, device=q.device).expand(b.shape)
    rises = order.values[:, 1:] > order.values[:, :-1]
    # Equals form no pair: each counts from the first and to the last of its equals.
    first, last = place.clone(), place.clone()
    first[:, 1:].masked_fill_(~rises, 0)
    last[:, :-1].masked_fill_(~rises, experts)
    first = first.cummax(-1).values
    last = last.flip(-1).cummin(-1).values.flip(-1)
    slope = torch.empty_like(q).scatter_(-1, order.indices, (experts - 1 - last - first).to(q))
    count = first.sum(-1).to(q)

    highest, index = q.topk(above, dim=-1)
    keeps = (highest[:, :, None] - q[:, None, :] >= rho) & (
        b.gather(-1, index)[:, :, None] > b[:, None, :]
    )
    higher = keeps.sum(2, dtype=q.dtype)
    slope -= keeps.sum(1, dtype=q.dtype)
    slope.scatter_add_(-1, index, higher)
    return slope, count - higher.sum(-1)


def kl_anchor_loss(
    router_logits: Tensor,
    base_logits: Tensor,
    completion: Tensor,
    *,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    KL(p_b || p_f) in nats: what the base router chose must stay likely.

    Arguments and result as in `rank_matching_loss`. Never negative; 0 where the routers agree.
    """
    log_p = select(router_logits, completion).float().log_softmax(-1)
    log_b = select(base_logits, completion).detach().float().log_softmax(-1)
    return mean((log_b.exp() * (log_b - log_p)).sum(-1), denominator)
