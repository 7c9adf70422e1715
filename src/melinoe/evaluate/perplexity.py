"""Measure perplexity, in one pass over a text or token by token as decoding does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from melinoe.cache.counters import COMPLETION
from melinoe.data import IGNORED, Collator, Encoded
from melinoe.engine.handle import Handle
from melinoe.errors import DataError
from melinoe.moe.finite import not_finite
from melinoe.stats import Estimate, bootstrap, paired_difference

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Perplexity:
    """The loss of a model on a text: nats, float64 ``(sequences,)``, summed over *tokens* each."""

    nll: Floats
    tokens: Floats

    def __post_init__(self) -> None:
        if self.tokens.sum() == 0:
            raise DataError("no token of the text is left to predict; give longer examples")

    @property
    def estimate(self) -> Estimate:
        """Perplexity, exp of the mean loss per token, over sequences."""
        return bootstrap(self.nll, self.tokens, transform=np.exp)


# Logits of a pass, and four times as many as are held in float32 at a time.
_MOST_LOGITS = 1 << 25


@contextmanager
def _evaluating(model: nn.Module, encoded: Sequence[Encoded]) -> Iterator[None]:
    """Refuse no text; else evaluate without gradients, and put the training mode back."""
    if not encoded:
        raise DataError("there is no text to evaluate on; give at least one example")
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def perplexity(model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 8) -> Perplexity:
    """
    Measure how well *model*, offloaded or not, predicts the completions of *encoded*.

    Logits and their softmax are taken in float32, of some tokens at a time, and summed in float64;
    *batch_size* changes results only in rounding, and is less where logits would be large.
    DataError: nothing to predict. ModelError: a loss that is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    collate = Collator(pad_token_id=0)  # masked everywhere, so any id will do
    device = next(model.parameters()).device
    nll, tokens = [], []
    config: Any = getattr(model, "config", None)
    words = 1 if config is None else config.get_text_config().vocab_size
    start = end = 0
    with _evaluating(model, encoded):
        while (start := end) < len(encoded):
            longest = max(map(len, encoded[start : start + batch_size]))
            end = start + max(1, min(batch_size, _MOST_LOGITS // (longest * words)))
            collated = collate(encoded[start:end])
            labels = collated["labels"].to(device)
            batch = {key: collated[key].to(device) for key in ("input_ids", "attention_mask")}
            # (batch, tokens - 1, vocabulary): each position predicts the token after it.
            logits = model(**batch, use_cache=False).logits[:, :-1]
            options: Any = {"ignore_index": IGNORED, "reduction": "none"}
            rows = max(1, _MOST_LOGITS // (4 * words))
            losses = torch.cat(
                [
                    cross_entropy(part.float().transpose(1, 2), wanted, **options)
                    for part, wanted in zip(
                        logits.split(rows, 1), labels[:, 1:].split(rows, 1), strict=True
                    )
                ],
                dim=1,
            )
            del logits
            nll.append(losses.double().sum(1).cpu().numpy())
            if not np.isfinite(nll[-1]).all():
                bad = start + int(np.flatnonzero(~np.isfinite(nll[-1]))[0])
                raise not_finite(model, batch, f"the loss of example {bad}")
            tokens.append((labels[:, 1:] != IGNORED).sum(1).cpu().numpy())
    return Perplexity(np.concatenate(nll), np.concatenate(tokens).astype(np.float64))


def perplexity_increase(ours: Perplexity, theirs: Perplexity) -> Estimate:
    """Estimate our perplexity over theirs, minus 1: 0.02 is 2 % worse; paired by sequence."""
    if not np.array_equal(ours.tokens, theirs.tokens):
        raise DataError(
            "the two perplexities are of different texts; evaluate both models on the same data"
        )
    return paired_difference(ours.nll, theirs.nll, ours.tokens, theirs.tokens, transform=np.expm1)


@dataclass(frozen=True)
class Decoded:
    """Perplexity of texts read token by token, and what that cost; int64 ``(sequences,)``."""

    perplexity: Perplexity
    loads: NDArray[np.int64]
    tokens: NDArray[np.int64]


def decoded_perplexity(
    model: Any,
    handle: Handle | None,
    encoded: Sequence[Encoded],
    *,
    progress: Callable[[str], None] | None = None,
) -> Decoded:
    """
    Read each text as decoding would: the prompt in one pass, then every token in one of its own.

    Where experts depend on what is resident (cache-aware choice), one pass over a whole text would
    not show what that costs. With the exact choice both agree up to rounding. Each text starts from
    an empty cache; a plain model, whose *handle* is ``None``, loads nothing. Raises as
    `perplexity`.
    """
    device = model.get_input_embeddings().weight.device
    nll, counted, loads, decoded = [], [], [], []
    step = max(1, len(encoded) // 10)
    with _evaluating(model, encoded):
        for number, one in enumerate(encoded, start=1):
            if handle is not None:
                handle.reset_cache()
            before = handle.counters if handle is not None else None
            ids = torch.tensor([one.input_ids], device=device)
            losses = _losses(model, one, ids)
            if not np.isfinite(losses).all():
                raise not_finite(model, {"input_ids": ids}, f"the loss of text {number}")
            mask = np.asarray(one.completion_mask[len(one) - len(losses) :], dtype=bool)
            nll.append(float(losses[mask].sum()))
            counted.append(float(mask.sum()))
            decoded.append(max(len(losses) - 1, 0))  # the prompt's pass predicts the first
            spent = handle.counters.minus(before) if handle is not None and before else None
            loads.append(int(spent.loads[COMPLETION].sum()) if spent is not None else 0)
            if progress is not None and (number % step == 0 or number == len(encoded)):
                progress(f"read {number} of {len(encoded)} texts token by token")
    found = Perplexity(np.array(nll), np.array(counted))
    return Decoded(found, np.array(loads), np.array(decoded))


def _losses(model: Any, one: Encoded, ids: torch.Tensor) -> Floats:
    """Loss of every token from the first of the completion on, in nats."""
    first = max(1, one.completion_mask.index(True)) if True in one.completion_mask else len(one)
    losses: list[float] = []
    given, past = ids[:, :first], None
    for place in range(first, len(one)):
        output = model(input_ids=given, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = output.past_key_values
        target = ids[:, place]
        losses.append(float(cross_entropy(output.logits[:, -1].double(), target)))
        given = target[:, None]
    return np.array(losses)
