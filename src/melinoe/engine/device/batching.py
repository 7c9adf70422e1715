"""Choose settings for transformers' continuous batching whose decode steps never ask the host."""

from __future__ import annotations

from typing import Any

from transformers import ContinuousBatchingConfig

from melinoe.engine.device.decide import MOST_PAIRS
from melinoe.engine.handle import Handle
from melinoe.errors import BudgetError

# transformers' default for the tokens of a batch.
_USUAL = 8192


def batching_config(handle: Handle, top_k: int, **options: Any) -> ContinuousBatchingConfig:
    """
    Make a `ContinuousBatchingConfig` whose decode batches always fit the slots.

    A batch of *n* sequences may need *n* x *top_k* experts of a layer, so with fewer slots than
    experts its size is limited. Then no decode step asks the host, and steps may be captured in
    CUDA graphs. Batches that also hold parts of prompts are streamed by the host, evict no expert
    (others are decoding), and are captured only if every expert has a slot. Where decode batches
    are padded to be captured, padding is counted like tokens.

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
    # The device counts no more in one pass, so no more may be captured.
    most = MOST_PAIRS // top_k
    tokens = options.get("max_batch_tokens") or min(_USUAL, most // 64 * 64)
    chosen: dict[str, Any] = {
        "use_cuda_graph": (on_gpu and resident and tokens <= most, on_gpu),
        "max_batch_tokens": tokens,
    }
    if not resident:
        # Decode batches padded to more than fits would be decided by the host.
        chosen |= {"max_requests_per_batch": slots // top_k, "q_padding_interval_size": 1}
    return ContinuousBatchingConfig(**(chosen | options))
