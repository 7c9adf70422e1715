"""
Locality terms that rows of the experiment try in place of the product's cache simulation.

    first layer left out   the cache simulation of all layers but the first
    fixed set              the imagined cache holds, for every text and for good, the experts that
                           the base uses most
    fixed set of the kind  likewise, those that it uses most on texts of the same kind
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melinoe.data import Encoded
from melinoe.finetune import objective, training
from melinoe.finetune.objective import Objective, Terms
from melinoe.losses import cache_simulation_loss, choices_of

FIRST_LEFT_OUT, FIXED, FIXED_BY_KIND = "first layer left out", "fixed set", "fixed set of the kind"
_BEGINNING = 24  # tokens that tell a text from others


@contextmanager
def in_place_of_cache_loss(
    name: str | None, uses: Mapping[str, np.ndarray], texts: Mapping[str, Sequence[Encoded]]
) -> Iterator[None]:
    """
    Train with the term *name* while this is open; ``None``: with the product's own.

    Args:
        name: One of this module's.
        uses: Kind to the base's choices of each expert, (layers, experts).
        texts: Kind to what is trained on.
    """
    if name is None:
        yield
        return
    kinds = list(uses)
    kind_of = {
        tuple(one.input_ids[:_BEGINNING]): kinds.index(kind)
        for kind in kinds
        for one in texts[kind]
    }
    rows: list[int] = []  # the kind of each row of the batch at work

    class Watching(Objective):
        def measure(self, model: Any, batch: dict[str, Any], *args: Any, **options: Any) -> Terms:
            rows[:] = [kind_of[tuple(one[:_BEGINNING])] for one in batch["input_ids"].tolist()]
            return super().measure(model, batch, *args, **options)

    by_kind = torch.tensor(np.stack([uses[kind] for kind in kinds]), dtype=torch.float32)

    def left_out(*args: Any, **options: Any) -> Tensor:
        loss = cache_simulation_loss(*args, **options)
        return loss * (torch.arange(len(loss)) > 0)

    def fixed(
        logits: Tensor, chosen: Tensor, completion: Tensor, *, capacity: int,
        num_experts: int, denominator: Any, **options: Any,
    ) -> Tensor:  # fmt: skip
        each = by_kind if name == FIXED_BY_KIND else by_kind.sum(0, keepdim=True)
        held = torch.zeros_like(each).scatter_(-1, each.topk(capacity).indices, 1.0)
        held = held[rows] if name == FIXED_BY_KIND else held  # (rows or 1, layers, experts)
        p = logits.float().softmax(-1)[..., :num_experts]
        r = choices_of(chosen, num_experts) + p - p.detach()
        missing = (r * (1 - held[:, None])).sum(-1).flatten(0, 1)
        return missing[completion].sum(0) / denominator

    kept = objective.cache_simulation_loss, training.Objective
    objective.cache_simulation_loss = left_out if name == FIRST_LEFT_OUT else fixed
    training.Objective = Watching  # type: ignore[misc]
    try:
        yield
    finally:
        objective.cache_simulation_loss, training.Objective = kept  # type: ignore[misc]
