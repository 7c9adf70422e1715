"""
Perplexity as a model has it while it decodes: one token at a time, the cache at work.

Where experts depend on what is resident (cache-aware choice), a pass over a whole text would not
show what that costs; reading the text token by token does. With the exact choice both agree up to
rounding, only slower: one forward pass per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from melinoe.cache.counters import COMPLETION
from melinoe.data import Encoded
from melinoe.engine.handle import Handle
from melinoe.errors import DataError
from melinoe.evaluate.perplexity import Perplexity
from melinoe.moe.finite import not_finite


@dataclass(frozen=True)
class Decoded:
    """
    What reading a text token by token cost.

    Attributes:
        perplexity: Over completion tokens.
        loads: int64 ``(sequences,)``, transfers on demand while decoding.
        tokens: int64 ``(sequences,)``, tokens decoded: forward passes after the prompt's.
    """

    perplexity: Perplexity
    loads: NDArray[np.int64]
    tokens: NDArray[np.int64]


def decoded_perplexity(
    model: Any,
    handle: Handle | None,
    encoded: Sequence[Encoded],
    *,
    cold: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Decoded:
    """
    Read each text as decoding would: the prompt in one pass, then every token in one of its own.

    Args:
        model: A causal language model, offloaded or not.
        handle: Of *model*; ``None`` for a plain one, whose loads are 0.
        encoded: At least one, each with a token before its completion.
        cold: Empty the cache before each text.
        progress: Told in words after each tenth of the texts.

    Raises:
        DataError: nothing to predict.
        ModelError: a loss that is not finite, and which tensor is to blame.
    """
    if not encoded:
        raise DataError("there is no text to evaluate on; give at least one example")
    device = model.get_input_embeddings().weight.device
    nll, counted, loads, decoded = [], [], [], []
    step = max(1, len(encoded) // 10)
    was_training = model.training
    model.eval()
    try:
        for number, one in enumerate(encoded, start=1):
            if handle is not None and cold:
                handle.reset_cache()
            before = handle.counters if handle is not None else None
            losses = _losses(model, one, device)
            if not np.isfinite(losses).all():
                ids = torch.tensor([one.input_ids], device=device)
                raise not_finite(model, {"input_ids": ids}, f"the loss of text {number}")
            mask = np.asarray(one.completion_mask[len(one) - len(losses) :], dtype=bool)
            nll.append(float(losses[mask].sum()))
            counted.append(float(mask.sum()))
            decoded.append(max(len(losses) - 1, 0))  # the prompt's pass predicts the first
            spent = handle.counters.minus(before) if handle is not None and before else None
            loads.append(int(spent.loads[COMPLETION].sum()) if spent is not None else 0)
            if progress is not None and (number % step == 0 or number == len(encoded)):
                progress(f"read {number} of {len(encoded)} texts token by token")
    finally:
        model.train(was_training)
    found = Perplexity(np.array(nll), np.array(counted))
    if found.tokens.sum() == 0:
        raise DataError("no token of the text is left to predict; give longer examples")
    return Decoded(found, np.array(loads), np.array(decoded))


@torch.inference_mode()
def _losses(model: Any, one: Encoded, device: torch.device) -> NDArray[np.float64]:
    """Loss of every token from the first of the completion on, in nats."""
    first = max(1, one.completion_mask.index(True)) if True in one.completion_mask else len(one)
    ids = torch.tensor([one.input_ids], device=device)
    losses: list[float] = []
    given, past = ids[:, :first], None
    for place in range(first, len(one)):
        output = model(input_ids=given, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = output.past_key_values
        target = ids[:, place]
        loss = nn.functional.cross_entropy(output.logits[:, -1].double(), target)
        losses.append(float(loss))
        given = target[:, None]
    return np.array(losses)
