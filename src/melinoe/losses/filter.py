"""
Remember what a router chose: one causal exponential filter, the imagined cache's memory.

Source: MELINOE, arXiv:2602.11192, whose recurrence this is in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1
_CHUNK = 128  # tokens whose pairwise weights are held at once


def segments_of(attention_mask: Tensor) -> Tensor:
    """Make the segment ids of a batch with one sequence per row: 0 on tokens, -1 on padding."""
    return attention_mask.to(torch.int64) - 1


@dataclass(frozen=True)
class CausalFilter:
    """
    The exponential filter s(t) of one batch's layout, applied to any layer's choices.

    Weights within a chunk of tokens and between chunks are both triangular matrices, so a sequence
    of any length is filtered by three matrix products and no loop.
    """

    inside: Tensor  # (batch, chunks, chunk, chunk): token from token, same segment, earlier
    tail: Tensor  # (batch, chunks, chunk): share of each token in what its chunk hands on
    between: Tensor  # (batch, chunks, chunks): chunk from earlier chunk, same segment
    head: Tensor  # (batch, chunks, chunk): share of what was handed on in each token
    chunk: int
    # The same without forgetting, where gamma makes float32 forget what was used long ago.
    ever: CausalFilter | None = None

    @classmethod
    def of(cls, segment_ids: Tensor, gamma: float, *, chunk: int = _CHUNK) -> CausalFilter:
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
        forgets = 0 < gamma < 1 and gamma**tokens < torch.finfo(torch.float32).tiny
        ever = cls.of(segment_ids, 1.0, chunk=chunk) if forgets else None
        return cls(inside, tail, between, head, chunk, ever)

    def __call__(self, choices: Tensor) -> Tensor:
        """
        Filter *choices*: s, float32, of their shape ``(batch, tokens, ..., experts)``.

        All that stands behind the tokens is one wide matrix, so layers share the products.
        """
        batch, tokens = choices.shape[:2]
        chunks = self.between.shape[-1]
        x = choices.float().reshape(batch, tokens, -1)
        if (padding := chunks * self.chunk - tokens) > 0:
            x = F.pad(x, (0, 0, 0, padding))
        x = x.view(batch, chunks, self.chunk, -1)
        s = self.inside @ x
        if chunks > 1:
            handed_on = (self.tail[..., None, :] @ x).squeeze(-2)  # (batch, chunks, features)
            carried = self.between @ handed_on
            s = torch.addcmul(s, self.head[..., None], carried[..., None, :])
        return s.reshape(batch, chunks * self.chunk, -1)[:, :tokens].view(choices.shape)


def choices_of(top_k_index: Tensor, num_experts: int) -> Tensor:
    """
    Mark what ran by zeros and ones: float32 ``(..., num_experts)`` from ids ``(..., top_k)``.

    Ids outside ``[0, num_experts)`` mean "no expert" (skip slots) and leave no mark.
    """
    valid = (top_k_index >= 0) & (top_k_index < num_experts)
    hard = torch.zeros(*top_k_index.shape[:-1], num_experts + 1, device=top_k_index.device)
    hard.scatter_(-1, torch.where(valid, top_k_index, num_experts), 1.0)
    return hard[..., :num_experts]
