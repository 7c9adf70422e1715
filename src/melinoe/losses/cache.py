"""
Count how many of a token's experts an imagined cache lacks.

    clipped    c = min(1, C s / |s|): the clip bounds the loss to [0, K].
    literal    c = C s / |s|, as in the paper. It rewards the same K experts for ever rather than at
               most C of them, and has no lower bound but K - C.
    resident   c = 1 for the C experts with the highest s of those used before, else 0; the default
               of a run, closest to what a cache does when it serves. With gamma in (0, 1/2) it
               counts the misses of an LRU cache, up to ties among experts of one token and among
               those unused for so long that float32 cannot tell when (95 tokens at gamma .4); with
               a larger gamma nearly those of a decayed LFU cache that remembers what it let go.

All three pull on the router alike: along p, by what the cache lacks. No gradient passes through
the cache to earlier tokens.

Source: MELINOE, arXiv:2602.11192, for the literal form. The other two are ours.
"""

from typing import Literal

import torch
from torch import Tensor

from melinoe.losses.filter import choices_of, filtered
from melinoe.losses.select import mean, select

Form = Literal["clipped", "literal", "resident"]


def cache_simulation_loss(
    router_logits: Tensor,
    top_k_index: Tensor,
    completion: Tensor,
    *,
    gamma: float,
    capacity: float,
    num_experts: int | None = None,
    form: Form = "clipped",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    Average how many of a completion token's experts a cache of *capacity* experts would lack.

    Args:
        router_logits: ``(batch, tokens, ..., experts)``, with gradient; any float type.
        top_k_index: int64 ``(batch, tokens, ..., top_k)``, what really ran.
        completion: The tokens that count: bool ``(batch, tokens)``, or `completion_positions`.
        gamma: Forgetting per token of the cache's memory, in [0, 1].
        capacity: Experts that the cache holds.
        num_experts: Logits past this one are skip slots; default: all are experts.
        form: See this module.
        denominator: Divides the sum; default: this batch's completion tokens. A training step
            that spans several batches gives the step's number of tokens.

    Returns:
        float32 of shape ``(...)``; 0 with a gradient of 0 if no token counts.

    Cost: memory of five tensors of the logits' size in float32.
    """
    num_experts = num_experts or router_logits.shape[-1]
    hard = choices_of(top_k_index, num_experts)
    s = select(filtered(hard, gamma), completion)
    p = select(router_logits, completion).float().softmax(-1)[..., :num_experts]
    chosen = select(hard, completion)
    # Where gamma makes float32 forget what was used long ago, s does not tell it from never.
    used = select(hard.cumsum(1) - hard, completion) > 0
    cost = missing_share(s, capacity, form, used)
    value, pull = (chosen * cost).sum(-1), (p * cost).sum(-1)
    return mean(value + (pull - pull.detach()), denominator)


def missing_share(s: Tensor, capacity: float, form: Form, used: Tensor) -> Tensor:
    """Compute 1 - c, each expert's share that no cache holds, from s and whether it was *used*."""
    if form == "resident":
        # The longest unused are equals, and still before those never used.
        s = torch.where(used, s.clamp(min=torch.finfo(s.dtype).tiny), 0.0)
        # Stable, so that of equals the lower id is resident, whatever the device.
        order = s.sort(dim=-1, descending=True, stable=True).indices
        place = torch.arange(s.shape[-1], device=s.device).expand_as(s)
        rank = torch.empty_like(order).scatter_(-1, order, place)
        return ((rank >= capacity) | (s <= 0)).to(s.dtype)
    cache = capacity * s / s.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    return 1 - cache if form == "literal" else (1 - cache).clamp(min=0)
