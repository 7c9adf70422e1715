"""
The terms of the training loss: functions of logits and choices, and nothing else.

For one MoE layer and token t, K = top_k, C = cache capacity in experts, E experts:

    p(t)       probabilities of the router in training
    r(t)       the choice that really ran, as E zeros and ones; gradients pass it as if it were p
    s(t)       sum over earlier tokens j of the sequence of  gamma^(t-1-j) r(j)
    c(t)       what an imagined cache of C experts holds before token t; made of s(t)

    next token         mean_t -log q(t)                    `next_token_loss`
    cache simulation   mean_t < r(t), 1 - c(t) >           `cache_simulation_loss`, in three forms
    rank matching      mean_t mean_ij [b_i > b_j] max(0, rho - (p_i - p_j)), b the base
                       router's probabilities    `rank_matching_loss`
    concentration      few experts within a sequence, all
                       over the batch                      `concentration_loss`

The mean runs over completion tokens; the prompt only fills the imagined cache, and padding does not
even that. The first token of a sequence meets an empty cache: c = 0, its loss is K.

Shapes. A function of routers takes tensors of ``(batch, tokens, ..., experts)`` and returns one
value for each of the dimensions in the middle: nothing there gives a scalar, ``layers`` gives one
value per layer. All layers in one call cost far fewer kernels than one call per layer.

Source: MELINOE, arXiv:2602.11192, with c in closed form; each file says what differs.
"""

from melinoe.losses.cache import cache_simulation_loss, missing_share
from melinoe.losses.concentration import concentration_loss
from melinoe.losses.filter import choices_of, filtered
from melinoe.losses.next_token import next_token_loss
from melinoe.losses.rank import rank_matching_loss
from melinoe.losses.select import completion_positions

__all__ = [
    "cache_simulation_loss",
    "choices_of",
    "completion_positions",
    "concentration_loss",
    "filtered",
    "missing_share",
    "next_token_loss",
    "rank_matching_loss",
]
