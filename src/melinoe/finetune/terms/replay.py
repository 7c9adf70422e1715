"""Anchor text beside the data: generic text whose quality the fine-tuning should keep."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from melinoe.data import Collator, Encoded


class Replay:
    """
    Batches of anchor text, decided by a seed and the position in the run alone.

    Every text comes once before any comes again, in a new order each time. A batch is asked for by
    its number, so a run that was interrupted goes on with what would have come.

    Args:
        data: Encoded texts; every token but the first counts, prompt or not.
        batch_size: Texts per batch.
        pad_token_id: Any id; padding is masked.
        seed: Decides the order.

    Raises:
        ValueError: no text.
    """

    def __init__(self, data: Sequence[Encoded], batch_size: int, pad_token_id: int, seed: int):
        if not data:
            raise ValueError("there is no anchor text")
        self.data = [Encoded(one.input_ids, [False, *[True] * (len(one) - 1)]) for one in data]
        self.batch_size, self.seed = batch_size, seed
        self._collate = Collator(pad_token_id)

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """The batch of that number, from 0, as the collator gives it."""
        first = number * self.batch_size
        return self._collate([self._text(first + i) for i in range(self.batch_size)])

    def _text(self, position: int) -> Encoded:
        again, index = divmod(position, len(self.data))
        order = list(range(len(self.data)))
        random.Random(f"{self.seed} {again}").shuffle(order)
        return self.data[order[index]]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of a batch on *device*."""
    return {key: value.to(device) for key, value in batch.items()}
