"""One batch through the model, and what it says about every term: training and measuring alike."""

from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from melinoe.data import IGNORED
from melinoe.errors import UnsupportedModelError
from melinoe.finetune.terms.objective import Objective, Terms

_NOT_FOR_THE_MODEL = ("labels", "segment_ids")


def forward_terms(
    model: nn.Module,
    batch: dict[str, Any],
    objective: Objective,
    denominator: Tensor | float | None = None,
    *,
    training: bool,
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
        denominator: Completion tokens of the whole optimiser step, over all of its batches and
            processes; default: of this batch.
        training: Whether it is a step of training, or a measurement.

    Raises:
        UnsupportedModelError: the model gives no logits, or its routers ran without its experts.
    """
    labels = batch["labels"]
    # Never 0: a process may get a batch in which nothing is to be learned.
    count = (labels != IGNORED).sum().clamp(min=1) if denominator is None else denominator

    def forward() -> tuple[Tensor, Any]:
        outputs = model_outputs(model, batch)
        logits = logits_of(model, outputs)
        if logits.shape[:-1] != labels.shape:
            raise UnsupportedModelError(
                f"{type(model).__name__} gives logits for other positions than its input's, so it "
                "has no next-token loss to train on; use a family that predicts the next token"
            )
        nll = ForCausalLMLoss(
            logits,
            labels,
            vocab_size=logits.shape[-1],
            num_items_in_batch=count,  # type: ignore[arg-type]
        )
        return nll, outputs

    return objective.measure(model, batch, forward, count, training=training)


def model_outputs(model: nn.Module, batch: dict[str, Any]) -> Any:
    """Run the model on what it takes of a batch; without a key-value cache, which hides packing."""
    inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}
    return model(**inputs, use_cache=False)


def logits_of(model: nn.Module, outputs: Any) -> Tensor:
    """
    The next-token logits ``(batch, tokens, vocabulary)``.

    Raises:
        UnsupportedModelError: the model has none.
    """
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives hidden states but no logits, so it has no next-token "
            "loss to train on; load the class of its family that has a language-model head"
        )
    return logits
