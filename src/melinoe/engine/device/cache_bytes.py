"""Bytes of the cache that decoding keeps on the GPU, asked of the model's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StaticCache

from melinoe.engine.device.allocator import pieces
from melinoe.engine.device.cache_state import tensors
from melinoe.errors import BudgetError
from melinoe.moe import meta_pass
from melinoe.moe.experts import ExpertsLayer


def cache_bytes(model: Any, layers: Sequence[ExpertsLayer], batch: int, context: int) -> int:
    """
    Bytes that the cache of *batch* sequences of *context* tokens takes, as the allocator counts.

    The family's static cache is filled by a pass without values, so latent attention, windows,
    indexers and recurrent states are what they are. A family without one is asked for the cache
    that grows; then it is counted at its full length.

    Args:
        model: on the meta device; without its experts' use.
        layers: its MoE layers.
        batch: sequences at once.
        context: tokens of a sequence, prompt included, at most.

    Raises:
        BudgetError: the family's code looks at values, so that neither can be asked.
    """
    try:
        cache = static_cache(model, layers, batch, context)
        return sum(pieces(one.nbytes) for layer in cache.layers for one in tensors(layer))
    except RuntimeError:
        pass  # no static cache; the other may do
    try:
        seen = meta_pass.forward(model, layers, min(context, meta_pass.DIRECT))
        return batch * pieces(meta_pass.cache_bytes(model, layers, context, seen))
    except RuntimeError as error:
        raise untold(model, "the cache", error) from error


def untold(model: Any, what: str, error: Exception) -> BudgetError:
    """That *what* of the model takes nobody knows how much memory, because of *error*."""
    return BudgetError(
        f"how much memory {what} of {model.config.model_type} takes cannot be told beforehand "
        f"({str(error).splitlines()[0][:80]}); give slots or expert_memory instead of gpu_memory"
    )


def static_cache(
    model: Any, layers: Sequence[ExpertsLayer], batch: int, context: int
) -> StaticCache:
    """
    The family's static cache for *batch* sequences of *context* tokens, filled without values.

    Raises:
        RuntimeError: it has none, or its code looks at values.
    """
    with meta_pass.without_experts(model, layers):
        cache = StaticCache(config=model.config, max_cache_len=context)
        ids = torch.zeros(batch, min(context, 2), dtype=torch.long, device="meta")
        model(input_ids=ids, past_key_values=cache)
    cache.reset()
    return cache
