"""
Hold a model near another: its routers near the base's, its hidden states near a teacher's.

Source: MELINOE, arXiv:2602.11192, for rank matching, there as a sum over pairs.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from melinoe.losses.select import mean, select


def rank_matching_loss(
    router_logits: Tensor,
    base_logits: Tensor,
    completion: Tensor,
    *,
    rho: float,
    denominator: Tensor | float | None = None,
    pairs_at_once: int = 1 << 19,
) -> Tensor:
    """
    Measure by how much the router breaks the base router's order of experts, up to a margin.

    The paper sums over pairs: multiply the weight of this mean by experts x (experts - 1) / 2.

    Args:
        router_logits: ``(batch, tokens, ..., experts)``, with gradient.
        base_logits: The base router's, same shape; never differentiated.
        completion, denominator: As in `cache_simulation_loss`.
        rho: Margin in probability that a pair should keep.
        pairs_at_once: Bounds memory, in bytes about three times as many.

    Returns:
        float32 of shape ``(...)``.

    Cost: experts x (log experts + 1 / rho) per token, and still exact: all pairs count but those
    that keep their margin, of which the first expert has a probability of rho or more, and no more
    than 1 / rho experts can. The loss is linear in p_f where its set of pairs is fixed, so only
    their counts are kept for the backward pass.
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
    return mean(per_token / max(1.0, experts * (experts - 1) / 2), denominator)


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
    Compute KL(p_b || p_f) in nats: what the base router chose must stay likely.

    Arguments and result as in `rank_matching_loss`. Never negative; 0 where the routers agree.
    """
    log_p = select(router_logits, completion).float().log_softmax(-1)
    log_b = select(base_logits, completion).detach().float().log_softmax(-1)
    return mean((log_b.exp() * (log_b - log_p)).sum(-1), denominator)


def match_loss(
    hidden: Mapping[int, Tensor],
    theirs: Mapping[int, Tensor],
    positions: Tensor,
    *,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    Average ``|h - t|^2 / |t|^2`` over tokens and over places in the model.

    Relative, because the length of hidden states differs by place and family; per token, because a
    few tokens (the first of a sequence) have states many times longer than all others.

    Args:
        hidden: Place to this model's hidden states ``(tokens, features)``, with gradient.
        theirs: The teacher's, on the same tokens and places; never differentiated.
        positions: int64, the tokens that count, as `completion_positions` gives them.
        denominator: Divides sums over tokens; default: the tokens that count.

    Returns:
        A float32 scalar; 0 where the models agree, 1 where ours says nothing.

    Source:
        Hints for hidden layers, Romero et al., arXiv:1412.6550; without a regressor, since both
        are one model with other updates.
    """
    if hidden.keys() != theirs.keys() or not hidden:
        raise ValueError(f"places differ: {sorted(hidden)} here, {sorted(theirs)} of the teacher")
    total = torch.zeros((), device=positions.device)
    for place, states in hidden.items():
        ours = states.index_select(0, positions).float()
        target = theirs[place].detach().index_select(0, positions).float()
        length = target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        total = total + mean((ours - target).square().sum(-1) / length, denominator)
    return total / len(hidden)
