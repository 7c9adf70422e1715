"""Means of every term over held-out examples, on one process or shared out over several."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from melinoe.config import FinetuneSettings
from melinoe.data import IGNORED, Collator, Encoded
from melinoe.errors import TrainingError
from melinoe.finetune.forward import forward_terms
from melinoe.finetune.terms.objective import Objective
from melinoe.moe.finite import broken_weight


@torch.no_grad()
def held_out_terms(
    model: Any,
    data: Sequence[Encoded],
    objective: Objective,
    collator: Collator,
    settings: FinetuneSettings,
    accelerator: Any = None,
) -> dict[str, float]:
    """
    Means of ``nll``, ``total`` and each locality term over the completion tokens of *data*.

    Args:
        model: In any mode, which it is left in.
        data: At least one example; each is a row of its own, packing or not.
        objective: Says what the terms are.
        collator: Pads the rows.
        settings: ``batch_size`` and ``compute_dtype``.
        accelerator: Of a run on several processes: each measures its share of the same batches
            that one process would, and all return the same means. Every process must call.
    """
    was_training = model.training
    model.eval()
    processes = 1 if accelerator is None else accelerator.num_processes
    index = 0 if accelerator is None else accelerator.process_index
    device = next(model.parameters()).device if accelerator is None else accelerator.device
    ordered = sorted(data, key=len)
    starts = range(0, len(ordered), settings.batch_size)
    sums: dict[str, float] = {}
    tokens = 0
    # Sharded weights are gathered by all processes together: each takes as many passes as any.
    for number in range(-(-len(starts) // processes)):
        mine = number * processes + index
        start = starts[mine] if mine < len(starts) else 0
        batch = collator(ordered[start : start + settings.batch_size])
        batch = {key: value.to(device) for key, value in batch.items()}
        narrow = settings.compute_dtype == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            terms, _ = forward_terms(model, batch, objective, training=False)
        count = int((batch["labels"] != IGNORED).sum()) if mine < len(starts) else 0
        for key, value in terms.detached().items():
            sums[key] = sums.get(key, 0.0) + float(value) * count
        tokens += count
    model.train(was_training)
    totals = torch.tensor([*sums.values(), tokens], dtype=torch.float64, device=device)
    if processes > 1:
        totals = accelerator.reduce(totals, reduction="sum")
    *values, tokens_of_all = totals.tolist()
    if not all(map(math.isfinite, values)):
        raise TrainingError(
            "the loss on held-out examples is not finite: "
            f"{broken_weight(model) or 'lower learning_rate or lambda_cache'}"
        )
    return {key: value / tokens_of_all for key, value in zip(sums, values, strict=True)}
