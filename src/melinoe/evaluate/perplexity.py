"""Perplexity, with an interval over sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from melinoe.data import IGNORED, Collator, Encoded
from melinoe.errors import DataError
from melinoe.moe.finite import not_finite
from melinoe.stats import Estimate, bootstrap, paired_difference

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Perplexity:
    """
    What a text cost a model.

    Attributes:
        nll: float64 ``(sequences,)``, summed negative log-likelihood in nats.
        tokens: float64 ``(sequences,)``, how many tokens that sums over.
    """

    nll: Floats
    tokens: Floats

    @property
    def estimate(self) -> Estimate:
        """Perplexity, exp of the mean loss per token, over sequences."""
        return bootstrap(self.nll, self.tokens, transform=np.exp)

    @property
    def mean_nll(self) -> Estimate:
        """Mean loss per token in nats, over sequences."""
        return bootstrap(self.nll, self.tokens)


def perplexity(
    model: nn.Module,
    encoded: Sequence[Encoded],
    batch_size: int = 8,
    completion_only: bool = True,
) -> Perplexity:
    """
    Measure how well *model* predicts *encoded*.

    Batches are made in the order given, padded on the right to their longest sequence; logits and
    their softmax are taken in float32 and summed in float64. One forward pass per batch, without
    gradients; the model's training mode is put back afterwards.

    Args:
        model: A causal language model, offloaded or not.
        encoded: Token ids and which of them are completion.
        batch_size: Sequences per forward pass. It changes speed, and results only in rounding.
        completion_only: Count completion tokens alone; else every token but a sequence's first.

    Raises:
        DataError: nothing to predict.
        ModelError: a loss that is not finite, and which tensor is to blame.
        ValueError: *batch_size* below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if not encoded:
        raise DataError("there is no text to evaluate on; give at least one example")
    collate = Collator(pad_token_id=0)  # masked everywhere, so any id will do
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nll, tokens = [], []
    try:
        with torch.inference_mode():
            for start in range(0, len(encoded), batch_size):
                batch = {
                    name: value.to(device)
                    for name, value in collate(encoded[start : start + batch_size]).items()
                }
                labels = batch["labels"]
                if not completion_only:
                    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
                logits = model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    use_cache=False,
                ).logits
                # (batch, vocabulary, tokens - 1): each position predicts the token after it.
                losses = nn.functional.cross_entropy(
                    logits[:, :-1].float().transpose(1, 2),
                    labels[:, 1:],
                    ignore_index=IGNORED,
                    reduction="none",
                )
                nll.append(losses.double().sum(1).cpu().numpy())
                if not np.isfinite(nll[-1]).all():
                    bad = start + int(np.flatnonzero(~np.isfinite(nll[-1]))[0])
                    raise not_finite(
                        model,
                        {k: batch[k] for k in ("input_ids", "attention_mask")},
                        f"the loss of example {bad}",
                    )
                tokens.append((labels[:, 1:] != IGNORED).sum(1).cpu().numpy())
    finally:
        model.train(was_training)
    result = Perplexity(np.concatenate(nll), np.concatenate(tokens).astype(np.float64))
    if result.tokens.sum() == 0:
        raise DataError("no token of the text is left to predict; give longer examples")
    return result


def perplexity_increase(ours: Perplexity, theirs: Perplexity) -> Estimate:
    """
    Estimate our perplexity over theirs, minus 1, on the same sequences: 0.02 is 2 % worse.

    Paired: each resample draws a sequence for both models.

    Raises:
        DataError: the two were not measured on the same tokens.
    """
    if not np.array_equal(ours.tokens, theirs.tokens):
        raise DataError(
            "the two perplexities are of different texts; evaluate both models on the same data"
        )
    return paired_difference(ours.nll, theirs.nll, ours.tokens, theirs.tokens, transform=np.expm1)
