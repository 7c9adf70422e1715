"""
Remember what a router chose: one causal exponential filter, the imagined cache's memory.

Source: MELINOE, arXiv:2602.11192, whose recurrence this is in closed form.
"""

import torch
from torch import Tensor

_CHUNK = 128  # tokens whose pairwise weights are held at once


def filtered(choices: Tensor, gamma: float, *, chunk: int = _CHUNK) -> Tensor:
    """
    Compute s(t), the sum over earlier tokens j of ``gamma^(t-1-j) choices(j)``.

    Within a chunk of tokens the weights are a triangular matrix; from chunk to chunk one state is
    handed on. All that stands behind the tokens is one wide matrix, so layers share the products.

    Args:
        choices: ``(batch, tokens, ..., experts)``, one sequence a row; padding stands on the right.
        gamma: Forgetting per token, in [0, 1].
        chunk: Tokens per chunk; decides memory and time, not the result.

    Returns:
        float32, of the shape of *choices*.
    """
    x = choices.float().flatten(2)

    def powers(exponent: Tensor) -> Tensor:
        # In float64, because gamma rounded to float32 is off by much after thousands of tokens.
        return torch.pow(gamma, exponent.clamp(min=0).double())

    at = torch.arange(min(chunk, x.shape[1]), device=x.device)
    gap = at[:, None] - at - 1
    inside, parts = (powers(gap) * (gap >= 0)).float(), []
    state = x.new_zeros(x.shape[0], 1, x.shape[2], dtype=torch.float64)
    for part in x.split(chunk, dim=1):
        size = part.shape[1]
        carried = (powers(at[:size])[:, None] * state).float()
        parts.append(inside[:size, :size] @ part + carried)
        handed_on = powers(size - 1 - at[:size]).float()[None] @ part
        state = gamma**size * state + handed_on.double()
    return torch.cat(parts, dim=1).view(choices.shape)


def choices_of(top_k_index: Tensor, num_experts: int) -> Tensor:
    """Mark what ran by zeros and ones; ids outside ``[0, num_experts)`` leave no mark."""
    valid = (top_k_index >= 0) & (top_k_index < num_experts)
    hard = torch.zeros(*top_k_index.shape[:-1], num_experts + 1, device=top_k_index.device)
    hard.scatter_(-1, torch.where(valid, top_k_index, num_experts), 1.0)
    return hard[..., :num_experts]
