"""
Ask for few experts within each sequence, and for all of them over the sequences of a batch.

    u_s     share of each expert in the choices of sequence s: sums to 1
    within  mean over s of  max(0, H(u_s) - log C): nothing pulls once a sequence uses as many
            experts as C equally used ones would be
    between log E - H(mean over s of u_s): the sequences together use all experts alike
    loss    (within + between) / log E

Without the second part a domain's sequences all come to use the same experts, which is pruning by
training. Entropies, not numbers of experts, so that the value depends on neither E nor K.
"""

import math

import torch
from torch import Tensor

from melinoe.losses.filter import choices_of
from melinoe.losses.select import completion_positions, select


def concentration_loss(
    router_logits: Tensor,
    top_k_index: Tensor,
    completion: Tensor,
    *,
    capacity: float,
    num_experts: int | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    Compute how far sequences are from few experts each and all experts together.

    Gradients pass a choice as if it were the router's probability.

    Args:
        router_logits: ``(batch, tokens, ..., experts)``, with gradient; any float type.
        top_k_index: int64 ``(batch, tokens, ..., top_k)``, what really ran.
        completion: The tokens that count: bool ``(batch, tokens)``, or `completion_positions`.
        capacity: Experts that a sequence may use for nothing.
        num_experts: Logits past this one are skip slots; default: all are experts.
        denominator: Completion tokens of the optimiser step, of which this batch's share counts;
            default: this batch's.

    Returns:
        float32 of shape ``(...)``; 0 where each sequence has its own *capacity* experts and all
        are used alike, 1 - log C / log E where every sequence uses all; 0 if no token counts.
    """
    num_experts = num_experts or router_logits.shape[-1]
    if completion.dtype == torch.bool:
        completion = completion_positions(completion)
    if not len(completion):  # still a function of the logits, for a gradient of 0
        return 0.0 * router_logits[:1, :1].float().sum((0, 1, -1))
    hard = select(choices_of(top_k_index, num_experts), completion)
    hard = hard / hard.sum(-1, keepdim=True).clamp(min=1)
    p = select(router_logits, completion).float().softmax(-1)[..., :num_experts]
    row = completion // router_logits.shape[1]  # each holds one sequence
    _, owner, counts = row.unique(return_inverse=True, return_counts=True)
    shape = (len(counts), *(1,) * (hard.dim() - 1))
    shares = hard.new_zeros(len(counts), *hard.shape[1:])
    shares = shares.index_add(0, owner, hard + (p - p.detach())) / counts.view(shape)
    # An expert that nobody used pulls as if it had been chosen half a time.
    least = 0.5 / (counts * top_k_index.shape[-1])
    within = (_entropy(shares, least.view(shape)) - math.log(capacity)).clamp(min=0).mean(0)
    between = math.log(num_experts) - _entropy(shares.mean(0), least.min() / len(counts))
    share = 1.0 if denominator is None else len(completion) / denominator
    return (within + between) / math.log(num_experts) * share


def _entropy(shares: Tensor, least: Tensor) -> Tensor:
    """In nats, over the last dimension; the logarithm is never taken of less than *least*."""
    return -(shares * torch.where(shares > least, shares, least).log()).sum(-1)
