"""
Compute all experts of a layer for training, with a term added to the product of each projection.

transformers' own ``grouped_mm`` function has no room for a low-rank term beside a projection's
weight. Without an addition both agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_mm

Addition = Callable[[str, Tensor, Tensor], Tensor]
"""From a parameter's name, rows ``(pairs, in)`` sorted by expert, and offsets ``(experts,)``."""

_ALIGNMENT_BYTES = 16
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_experts(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    addition: Addition | None = None,
) -> Tensor:
    """
    Compute an experts module, as ``transformers.integrations.moe.grouped_mm_experts_forward`` does.
    Never waits for the device; takes memory of the order of ``tokens x top_k`` rows. *addition*
    gives the term of a projection. Returns ``(tokens, hidden)`` in the dtype of *hidden_states*.
    """
    choice = sort_choices(top_k_index, top_k_weights, module.num_experts)
    stacks = dict(module.named_parameters(recurse=False))
    rows = hidden_states[choice.tokens]
    outputs = expert_rows(module, stacks, rows, choice.experts, choice.offsets, addition)
    return weighted_sum(outputs * choice.weights.unsqueeze(-1), choice, hidden_states)


class Choices(NamedTuple):
    """The pairs of a pass, sorted by expert; one without has a neighbour's, and weight 0."""

    order: Tensor  # int64 (pairs,): numbers of the pairs, token by token, in sorted order
    experts: Tensor  # int64 (pairs,), ascending
    tokens: Tensor  # int64 (pairs,)
    weights: Tensor  # (pairs,)
    offsets: Tensor  # int32 (num_experts,): pairs up to and with each expert
    top_k: int


def sort_choices(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Choices:
    """Sort the pairs by expert; see `grouped_experts`. Never waits for the device."""
    ids, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    none = (ids < 0) | (ids >= num_experts)
    ids, weights = ids.clamp(0, num_experts - 1), weights.masked_fill(none, 0)
    experts, order = torch.sort(ids)
    # No bincount: it synchronises. On the CPU, histc wants floating point.
    counted = experts.float() if ids.device.type == "cpu" else experts.int()
    counts = torch.histc(counted, bins=num_experts, min=0, max=num_experts - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    top_k = top_k_index.shape[-1]
    return Choices(order, experts, order // top_k, weights[order], offsets, top_k)


def expert_rows(
    module: Any,
    stacks: Mapping[str, Tensor],
    rows: Tensor,
    experts: Tensor,
    offsets: Tensor,
    addition: Addition | None = None,
) -> Tensor:
    """Compute *rows* ``(pairs, hidden)``, sorted by expert, by *stacks*, unweighted."""
    # Within an autocast rows are wider than they are computed with.
    wide = not torch.is_autocast_enabled(rows.device.type)

    def project(name: str, rows: Tensor) -> Tensor:
        weight = stacks[name]
        if not getattr(module, "is_transposed", False):
            weight = weight.transpose(-2, -1)
        if not wide:
            rows = rows.to(weight.dtype)
        product = grouped_product(rows, weight, offsets)
        if addition is not None:
            product.add_(addition(name, rows, offsets))
        if getattr(module, "has_bias", False):
            product.add_(stacks[f"{name}_bias"][experts])
        return product

    gated = getattr(module, "has_gate", True)
    inner = project("gate_up_proj" if gated else "up_proj", rows)
    outputs = project("down_proj", module._apply_gate(inner) if gated else module.act_fn(inner))
    if getattr(module, "has_post_expert_norm", False):
        outputs = module.post_expert_norm(outputs)
    return outputs


def weighted_sum(weighted: Tensor, choice: Choices, hidden_states: Tensor) -> Tensor:
    """Sum the weighted rows of each token: ``(tokens, hidden)``, of *hidden_states*' type."""
    back = torch.empty_like(choice.order)
    back[choice.order] = torch.arange(len(back), device=back.device)
    tokens, hidden = hidden_states.shape
    return weighted[back].view(tokens, choice.top_k, hidden).sum(dim=1).to(hidden_states.dtype)


def grouped_product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """
    Multiply each row by the matrix of its group; with gradient, zero for a group of no rows.

    *rows* are sorted by group, and wider than *weight*, ``(groups, in, out)``, only if that is
    frozen: each matrix is cast up as it is read. *offsets*, int32 ``(groups,)``: rows up to and
    with each group.
    """
    if rows.dtype != weight.dtype:
        if torch.is_grad_enabled() and weight.requires_grad:
            raise ValueError("a weight of another type than its rows must be frozen")
        return _Widened.apply(rows, weight, offsets)  # type: ignore[no-any-return]
    if weight.dtype in _KERNEL_DTYPES and is_aligned(weight):
        return _grouped_mm(rows, weight, offsets)
    # torch's kernel takes neither float64 nor rows that start between two 16-byte words.
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, offsets)


class _Widened(torch.autograd.Function):
    """Grouped products whose matrices are cast to the rows' type, one group at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(weight, offsets)
        return _each_group(rows, weight, offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, offsets = ctx.saved_tensors
        return _each_group(gradients[0], weight.mT, offsets), None, None


def _each_group(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of each group by its matrix. Waits for the device."""
    out, start = rows.new_empty(rows.shape[0], weight.shape[-1]), 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(rows[start:end], weight[group].to(rows.dtype), out=out[start:end])
        start = end
    return out


def is_aligned(weight: Tensor) -> bool:
    """Tell whether rows and columns of each matrix are whole 16-byte words."""
    return all(size * weight.itemsize % _ALIGNMENT_BYTES == 0 for size in weight.shape[-2:])


def aligned_size(size: int, dtype: torch.dtype) -> int:
    """Round *size* up to whole 16-byte words."""
    step = max(1, _ALIGNMENT_BYTES // dtype.itemsize)
    return -(-size // step) * step
