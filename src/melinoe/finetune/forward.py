"""One batch through the model, and what it says about every term: training and measuring alike."""

from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from melinoe.data import IGNORED
from melinoe.errors import UnsupportedModelError
from melinoe.finetune.objective import Objective, Terms
from melinoe.moe.routing import RoutingRecorder

_NOT_FOR_THE_MODEL = ("labels", "segment_ids")


def forward_terms(
    model: nn.Module,
    batch: dict[str, Tensor],
    objective: Objective,
    recorder: RoutingRecorder,
    denominator: Tensor | float | None = None,
) -> tuple[Terms, Any]:
    """
    Terms of one batch, and the model's outputs.

    The next-token loss is computed here from the logits, as transformers computes it, and not by
    the model: some families divide by their own count of tokens, shift labels in their own way, or
    add a load-balancing loss.

    Args:
        model: Returns logits; may be wrapped for distributed training.
        batch: From a collator of `melinoe.data`, on the model's device.
        objective: Weighs the terms.
        recorder: Of the routers of *model*.
        denominator: Completion tokens of the whole optimiser step, over all of its batches and
            processes; default: of this batch.

    Raises:
        UnsupportedModelError: the model gives no logits, or its routers ran without its experts.
    """
    labels = batch["labels"]
    if denominator is None:
        denominator = (labels != IGNORED).sum().clamp(min=1)
    with recorder:
        outputs = model(**{k: v for k, v in batch.items() if k not in _NOT_FOR_THE_MODEL})
        routings = recorder.take()
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives hidden states but no logits, so it has no next-token "
            "loss to train on; load the class of its family that has a language-model head"
        )
    nll = ForCausalLMLoss(
        logits,
        labels,
        vocab_size=logits.shape[-1],
        num_items_in_batch=denominator,  # type: ignore[arg-type]
    )
    return objective(nll, routings, labels, batch["segment_ids"], denominator), outputs
