"""
What makes a router cacheable: functions of its logits and choices, and nothing else.

For one MoE layer and token t, K = top_k, C = cache capacity in experts, E experts:

    p_f, p_b   probabilities of the router in training and of the base router
    r(t)       the choice that really ran, as E zeros and ones; gradients pass it as if it were p_f
    s(t)       sum over earlier tokens j of the same sequence of  gamma^(t-1-j) r(j)
    c(t)       C s(t) / |s(t)|, the imagined cache: how much of expert e is resident before token t

    cache simulation   mean_t < r(t), max(0, 1 - c(t)) >         clipped, the default
                       mean_t < r(t), 1 - c(t) >                 literal
    rank matching      mean_t of relu(rho - (p_f,i - p_f,j)), summed or averaged over the pairs
                       of experts with p_b,i > p_b,j
    KL anchor          mean_t KL(p_b || p_f)

The mean runs over completion tokens; the prompt only fills the imagined cache, and padding does not
even that. The first token of a sequence meets an empty cache: c = 0, its loss is K.

Since the entries of c sum to C and may pass 1, the literal form rewards the same K experts for
ever rather than at most C of them; clipping removes that reward and bounds the loss to [0, K].

Source: MELINOE, arXiv:2602.11192, with c in closed form. The clip, the mean over pairs and the
detached cache are ours.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1
_CHUNK = 128  # tokens whose pairwise weights are held at once


def segments_of(attention_mask: Tensor) -> Tensor:
    """
    Segment ids of a batch with one sequence per row.

    Args:
        attention_mask: ``(batch, tokens)``, 1 on real tokens and 0 on padding.

    Returns:
        int64 ``(batch, tokens)``: 0 on real tokens, -1 on padding.
    """
    return attention_mask.to(torch.int64) - 1


@dataclass(frozen=True)
class CausalFilter:
    """
    The exponential filter s(t) of one batch's layout, applied to any layer's choices.

    Weights within a chunk of tokens and between chunks are both triangular matrices, so a sequence
    of any length is filtered by three matrix products and no loop. All powers of gamma have
    exponents >= 0: nothing grows and nothing is divided by a small number.
    """

    inside: Tensor  # (batch, chunks, chunk, chunk): token from token, same segment, earlier
    tail: Tensor  # (batch, chunks, chunk): share of each token in what its chunk hands on
    between: Tensor  # (batch, chunks, chunks): chunk from earlier chunk, same segment
    head: Tensor  # (batch, chunks, chunk): share of what was handed on in each token
    chunk: int

    @classmethod
    def of(cls, segment_ids: Tensor, gamma: float, *, chunk: int = _CHUNK) -> "CausalFilter":
        """
        Prepare the filter.

        Args:
            segment_ids: int ``(batch, tokens)``; tokens of one sequence share an id and stand
                together, sequences packed into one row differ in it, padding is -1: its own
                segment, of which no token counts.
            gamma: Forgetting per token, in [0, 1].
            chunk: Tokens per chunk; decides memory and time, not the result.

        Cost: float32 memory of batch x tokens x chunk, once for all layers.
        """
        batch, tokens = segment_ids.shape
        chunk = min(chunk, tokens)
        chunks = -(-tokens // chunk)
        ids = F.pad(segment_ids, (0, chunks * chunk - tokens), value=PADDING)
        ids = ids.view(batch, chunks, chunk)
        device = segment_ids.device

        def powers(exponent: Tensor) -> Tensor:
            # In float64, because gamma rounded to float32 is off by much after thousands of tokens.
            return torch.pow(gamma, exponent.clamp(min=0).double()).float()

        at = torch.arange(chunk, device=device)
        gap = at[:, None] - at[None, :] - 1
        same = ids[..., :, None] == ids[..., None, :]
        inside = powers(gap) * (gap >= 0) * same
        last, first = ids[..., -1], torch.cat([ids[:, :1, -1], ids[:, :-1, -1]], dim=1)
        tail = powers(chunk - 1 - at) * (ids == last[..., None])
        head = powers(at) * (ids == first[..., None])
        order = torch.arange(chunks, device=device)
        hop = order[:, None] - order[None, :] - 1
        # What chunk i hands on reaches chunk k if the segment that ends i also ends k - 1.
        between = powers(hop * chunk) * (hop >= 0) * (first[:, :, None] == last[:, None, :])
        return cls(inside, tail, between, head, chunk)

    def __call__(self, choices: Tensor) -> Tensor:
        """s: float32 ``(batch, tokens, experts)`` from choices of the same shape."""
        batch, tokens, experts = choices.shape
        chunks = self.between.shape[-1]
        x = F.pad(choices.float(), (0, 0, 0, chunks * self.chunk - tokens)).view(
            batch, chunks, self.chunk, experts
        )
        s = self.inside @ x
        if chunks > 1:
            handed_on = (self.tail[..., None, :] @ x).squeeze(-2)  # (batch, chunks, experts)
            carried = self.between @ handed_on
            s = s + self.head[..., None] * carried[..., None, :]
        return s.reshape(batch, chunks * self.chunk, experts)[:, :tokens]


def choices_of(top_k_index: Tensor, num_experts: int) -> Tensor:
    """
    Zeros and ones of what ran: float32 ``(..., num_experts)`` from ids ``(..., top_k)``.

    Ids outside ``[0, num_experts)`` mean "no expert" (skip slots) and leave no mark.
    """
    valid = (top_k_index >= 0) & (top_k_index < num_experts)
    hard = torch.zeros(*top_k_index.shape[:-1], num_experts + 1, device=top_k_index.device)
    hard.scatter_(-1, torch.where(valid, top_k_index, num_experts), 1.0)
    return hard[..., :num_experts]


def cache_simulation_loss(
    router_logits: Tensor,
    top_k_index: Tensor,
    completion_mask: Tensor,
    causal_filter: CausalFilter,
    *,
    capacity: float,
    num_experts: int | None = None,
    form: Literal["clipped", "literal"] = "clipped",
    cache_gradient: bool = False,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    How many of a completion token's experts an imagined cache of *capacity* experts lacks.

    Args:
        router_logits: ``(batch, tokens, experts)``, with gradient; any float type.
        top_k_index: int64 ``(batch, tokens, top_k)``, what really ran.
        completion_mask: bool ``(batch, tokens)``, the tokens that count.
        causal_filter: Of this batch's segments, shared by all layers.
        capacity: Experts that the cache holds.
        num_experts: Logits past this one are skip slots; default: all are experts.
        form: ``clipped`` is in [0, top_k]; ``literal`` has no lower bound but top_k - capacity.
        cache_gradient: Whether gradients also reach earlier tokens through the cache.
        denominator: What the sum is divided by; default: this batch's completion tokens. A
            training step that spans several batches gives the step's number of tokens.

    Returns:
        A float32 scalar; 0 with a gradient of 0 if no token counts.
    """
    num_experts = num_experts or router_logits.shape[-1]
    hard = choices_of(top_k_index, num_experts)
    p = router_logits.float().softmax(-1)[..., :num_experts]
    # Straight through: the value of the choice, the gradient of the probability.
    r = hard + (p - p.detach())
    s = causal_filter(r if cache_gradient else hard)
    cache = capacity * s / s.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    missing = 1 - cache
    if form == "clipped":
        missing = missing.clamp(min=0)
    return _mean((r * missing).sum(-1), completion_mask, denominator)


def rank_matching_loss(
    router_logits: Tensor,
    base_logits: Tensor,
    completion_mask: Tensor,
    *,
    rho: float,
    reduce: Literal["mean", "sum"] = "mean",
    denominator: Tensor | float | None = None,
    pairs_at_once: int = 1 << 24,
) -> Tensor:
    """
    By how much the router breaks the base router's order of experts, up to a margin.

    Args:
        router_logits: ``(batch, tokens, experts)``, with gradient.
        base_logits: The base router's, same shape; never differentiated.
        completion_mask: bool ``(batch, tokens)``.
        rho: Margin in probability that a pair should keep.
        reduce: ``mean`` divides the sum over ordered pairs by experts (experts - 1) / 2.
        denominator: As in `cache_simulation_loss`.
        pairs_at_once: Bounds memory; in bytes about three times as many.

    Cost: experts^2 comparisons per token. The loss is linear in p_f where its set of active pairs
    is fixed, so only their counts are kept: no experts^2 tensor outlives a chunk or is saved for
    the backward pass.
    """
    experts = router_logits.shape[-1]
    p = router_logits.float().softmax(-1)[completion_mask]
    with torch.no_grad():
        base = base_logits.float().softmax(-1)[completion_mask]
        step = max(1, pairs_at_once // (experts * experts))
        slopes, counts = [], []
        for q, b in zip(p.detach().split(step), base.split(step), strict=True):
            active = (b[:, :, None] > b[:, None, :]) & (q[:, :, None] - q[:, None, :] < rho)
            # sum_ij active (rho - q_i + q_j) = rho n + sum_i q_i (times i is lower - higher)
            higher, lower = active.sum(2), active.sum(1)
            slopes.append((lower - higher).float())
            counts.append(higher.sum(1))
        slope, count = torch.cat(slopes), torch.cat(counts).float()
    per_token = rho * count + (p * slope).sum(-1)
    if reduce == "mean":
        per_token = per_token / max(1.0, experts * (experts - 1) / 2)
    return _divide(per_token.sum(), per_token.numel(), denominator)


def kl_anchor_loss(
    router_logits: Tensor,
    base_logits: Tensor,
    completion_mask: Tensor,
    *,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    KL(p_b || p_f) in nats: what the base router chose must stay likely.

    Arguments as in `rank_matching_loss`. Never negative; 0 where the routers agree.
    """
    log_p = router_logits.float().log_softmax(-1)
    log_b = base_logits.detach().float().log_softmax(-1)
    divergence = (log_b.exp() * (log_b - log_p)).sum(-1)
    return _mean(divergence, completion_mask, denominator)


def _mean(per_token: Tensor, mask: Tensor, denominator: Tensor | float | None) -> Tensor:
    kept = per_token[mask]
    return _divide(kept.sum(), kept.numel(), denominator)


def _divide(total: Tensor, count: int, denominator: Tensor | float | None) -> Tensor:
    return total / (max(1, count) if denominator is None else denominator)
