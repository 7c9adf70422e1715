"""Settings under which transformers' continuous batching runs on the fast engine without a host."""

from __future__ import annotations

from typing import Any

from transformers import ContinuousBatchingConfig

from melinoe.engine.device.decide import MOST_PAIRS
from melinoe.engine.device.handle import FastHandle
from melinoe.errors import BudgetError

# Tokens of a batch that transformers allows where nobody says otherwise.
_USUAL = 8192


def batching_config(handle: FastHandle, top_k: int, **options: Any) -> ContinuousBatchingConfig:
    """
    A `ContinuousBatchingConfig` whose decode batches always fit the slots.

    With fewer slots than experts, a batch of *n* sequences may need *n* x *top_k* experts of a
    layer, so it is limited to what fits. Then no decode step asks the host, and steps may be
    captured in CUDA graphs. Batches that also hold parts of prompts are streamed with the host;
    with fewer slots than experts these are not captured. They evict nobody: others are decoding.
    Where decode batches are padded to be captured, padding is counted like tokens.

    Args:
        handle: of the model that will generate.
        top_k: experts a token uses, ``num_experts_per_tok`` of most configurations.
        options: for `ContinuousBatchingConfig`; they win over what is chosen here.

    Returns:
        For ``model.generate_batch(..., continuous_batching_config=...)``.

    Raises:
        BudgetError: not even one sequence fits.
    """
    slots = min(handle.slots_by_layer)
    resident = all(
        count == layer.num_experts
        for count, layer in zip(handle.slots_by_layer, handle.layers, strict=True)
    )
    if not resident and slots < top_k:
        raise BudgetError(
            f"a token uses {top_k} experts of a layer that has {slots} slots; give {top_k} or more"
        )
    on_gpu = handle.device.type == "cuda"
    # What the device can count in one pass; what is captured must not be more.
    most = MOST_PAIRS // top_k
    tokens = options.get("max_batch_tokens") or min(_USUAL, most // 64 * 64)
    chosen: dict[str, Any] = {
        "use_cuda_graph": (on_gpu and resident and tokens <= most, on_gpu),
        "max_batch_tokens": tokens,
    }
    if not resident:
        # Padded to more than fits, decode batches would be planned by the host.
        chosen |= {"max_requests_per_batch": slots // top_k, "q_padding_interval_size": 1}
    return ContinuousBatchingConfig(**(chosen | options))
