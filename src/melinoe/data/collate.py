"""Batches: one example per row, padded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from melinoe.data.encode import Encoded

IGNORED = -100  # the label that torch's and transformers' cross entropy leave out


@dataclass(frozen=True)
class Collator:
    """
    Pads a batch on the right, to its longest example.

    Gives ``input_ids``, ``attention_mask`` and ``labels``, all int64 ``(batch, tokens)``; labels
    are -100 on prompt and padding. *pad_token_id* may be any valid id: it is masked everywhere.
    """

    pad_token_id: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """Collate at least one example."""
        ids = [torch.tensor(one.input_ids) for one in batch]
        learned = [torch.tensor(one.completion_mask) for one in batch]
        labels = [torch.where(mask, row, IGNORED) for row, mask in zip(ids, learned, strict=True)]

        def padded(rows: list[Tensor], value: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value)

        return {
            "input_ids": padded(ids, self.pad_token_id),
            "labels": padded(labels, IGNORED),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        }
