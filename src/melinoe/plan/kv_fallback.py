"""Bytes of keys and values by counting heads: for families that no pass without values can run."""

from __future__ import annotations

from typing import Any

import torch

_PLAIN = ("full_attention", "sliding_attention", "chunked_attention", "dummy")


def cache_bytes_by_heads(config: Any, context: int, dtype: torch.dtype) -> tuple[int | None, str]:
    """
    Bytes that one sequence of *context* tokens leaves, and how that is known.

    Counts ``2 x num_key_value_heads x head_dim`` a token and layer, a window's tokens where there
    is one. Latent and linear attention, indexers and compressed caches are not counted this way:
    then nothing is claimed.

    Args:
        config: The decoder's.
        context: Tokens.
        dtype: Type of keys and values.

    Returns:
        ``(bytes, source)``, or ``(None, why not)``.
    """
    try:
        return _counted(config, context, dtype)
    except Exception as error:  # a config whose layers differ refuses to be asked as a whole
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        return None, f"not known: the config does not say ({reason})"


def _counted(config: Any, context: int, dtype: torch.dtype) -> tuple[int | None, str]:
    # Not in every version of transformers that we run with; then nothing is claimed either.
    from transformers.cache_utils import get_layer_types_and_kwargs

    if not getattr(config, "use_cache", True):
        return 0, "the config keeps no cache"
    kinds, options = get_layer_types_and_kwargs(config)
    odd = sorted(set(kinds) - set(_PLAIN))
    if odd or getattr(config, "kv_lora_rank", None):
        return None, f"not known: it is no plain cache ({', '.join(odd) or 'latent attention'})"
    heads = getattr(config, "num_key_value_heads", None) or getattr(
        config, "num_attention_heads", None
    )
    size = getattr(config, "head_dim", None)
    if size is None and heads:
        size = config.hidden_size // config.num_attention_heads
    if not heads or not size:
        return None, "not known: the config does not say how many heads keep keys and values"
    per_token = 2 * heads * size * dtype.itemsize
    total = 0
    for kind, option in zip(kinds, options, strict=True):
        if kind != "dummy":
            window = option.get("sliding_window")
            total += per_token * (context if window is None else min(context, window - 1))
    return total, "heads counted in the config"
