"""A second pass over the same tokens, by the base model or by another run's."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from melinoe.moe.base_routers import BaseRouters
from melinoe.moe.hidden import HiddenRecorder

# What a batch holds for the losses, and a model does not take.
_NOT_INPUTS = ("labels", "segment_ids", "num_items_in_batch")


class Switchable(Protocol):
    """Updates on a model that can be left out of its passes for a while."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within it, the updates in training do not act: none do, or a teacher's."""


@dataclass(frozen=True)
class BaseOutputs:
    """
    What the base model, or a teacher, said about a batch.

    Attributes:
        logits: Next-token logits ``(batch, tokens, vocabulary)``.
        router_logits: Layer index to ``(tokens, num_logits)``, tokens flat in the batch's order.
        hidden: Place to hidden states, as `HiddenRecorder` has them; empty if nobody asked.
    """

    logits: Tensor
    router_logits: dict[int, Tensor]
    hidden: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def base_pass(
    model: Any,
    inputs: dict[str, Any],
    routers: BaseRouters,
    updates: Switchable | None,
    hidden: HiddenRecorder | None = None,
) -> BaseOutputs:
    """
    Run the base model on a batch, in the place of the model in training.

    Base weights of routers answer for the trained ones, and the experts' updates are off; all else
    never changes. Both are back as they were when this returns. Dropout, if the model has any, is
    as the model's mode says.

    Args:
        model: In training, wrapped for several devices or not.
        inputs: Of a forward pass; labels and segments are left out.
        routers: Copies of the routers before training, or of a teacher's.
        updates: Of the experts; ``None`` if only routers are trained.
        hidden: Records the pass, if its hidden states are wanted.

    Cost: one forward pass, and its next-token logits.
    """
    taken = {key: value for key, value in inputs.items() if key not in _NOT_INPUTS}
    off = updates.disabled() if updates is not None else nullcontext()
    with off, routers.in_place() as router_logits, hidden or nullcontext():
        logits = model(**taken, use_cache=False).logits
    return BaseOutputs(logits, router_logits, hidden.take() if hidden is not None else {})
