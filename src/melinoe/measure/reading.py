"""
Record which experts a model chooses while it reads given text, as if it had written that text.

Traces of a model's own completions mix two things: how it routes, and what it writes; one that
repeats itself needs few experts. Reading the same text, two models differ in routing alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.data import Encoded
from melinoe.engine.handle import Handle
from melinoe.errors import DataError
from melinoe.measure.traces import completion_counts
from melinoe.stats import bootstrap


def reading_trace(model: Any, handle: Handle, encoded: Sequence[Encoded]) -> Trace:
    """
    Record which experts every token of *encoded* chose, laid out as generation would have it.

    A token's routing depends on the tokens before it alone, so one forward pass per example
    gives what decoding that text would give, up to rounding: the prompt in one pass, then each
    completion token in its own. One sequence per example, in order.
    """
    if not encoded:
        raise DataError("there is no text to read; give at least one example")
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    try:
        with handle.record() as recorder, torch.inference_mode():
            for one in encoded:
                ids = torch.tensor([one.input_ids], device=device)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        trace = recorder.trace("read, not written")
    finally:
        model.train(was_training)
    is_completion = np.concatenate([np.asarray(one.completion_mask) for one in encoded])
    starts = np.zeros(len(is_completion), dtype=bool)
    starts[np.cumsum([0, *(len(one) for one in encoded[:-1])])] = True
    # A pass begins with each example, each completion token, and the prompt's turn after one.
    follows = np.concatenate([[False], is_completion[:-1]])
    forward = np.cumsum(starts | is_completion | follows) - 1
    return replace(
        trace,
        forward=forward.astype(np.int32),
        sequence=(np.cumsum(starts) - 1).astype(np.int32),
        kind=np.where(is_completion, COMPLETION_ROW, PROMPT_ROW).astype(np.uint8),
    )


def reading_record(trace: Trace, model: str, slots: int, policy: str) -> dict[str, Any]:
    """
    Return the record of kind ``reading``: transfers per token of texts that were read, simulated.

    Every text starts from an empty cache; what its prompt loads is not counted.
    """
    counts = completion_counts(trace, slots, policy)
    prompts = [
        int(((trace.sequence == one) & (trace.kind == PROMPT_ROW)).sum())
        for one in np.unique(trace.sequence)
    ]
    return {
        "kind": "reading",
        "model": model,
        "slots": slots,
        "policy": policy,
        "num_experts": trace.num_experts,
        "transfers_per_token": bootstrap(counts["loads"], counts["tokens"]).to_dict(),
        "per_prompt": {"prompt_tokens": prompts, **{n: counts[n] for n in ("loads", "tokens")}},
    }
