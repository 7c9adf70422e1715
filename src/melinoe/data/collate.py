"""
Batches: one example per row and padded, or several packed into one row.

Both kinds carry ``segment_ids``, which the losses read: int64 ``(batch, tokens)``, equal on the
tokens of one example, different for the examples of a row, -1 on padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from melinoe.data.encode import Encoded

IGNORED = -100  # the label that torch's and transformers' cross entropy leave out
PADDING = -1


@dataclass(frozen=True)
class Collator:
    """
    Pads a batch on the right, to its longest example.

    Gives ``input_ids``, ``attention_mask``, ``labels`` and ``segment_ids``, all int64
    ``(batch, tokens)``; labels are -100 on prompt and padding. *pad_token_id* may be any valid id:
    it is masked everywhere.
    """

    pad_token_id: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Collate at least one example."""
        made = _empty(len(batch), max(len(one) for one in batch), self.pad_token_id)
        attention_mask = torch.zeros_like(made["input_ids"])
        for row, one in enumerate(batch):
            _place(made, row, 0, 0, one)
            attention_mask[row, : len(one)] = 1
        return {**made, "attention_mask": attention_mask}


@dataclass(frozen=True)
class PackedCollator:
    """
    Packs the examples of each row one after the other; rows are padded to the longest.

    Gives ``input_ids``, ``labels``, ``segment_ids`` and ``position_ids``, all int64
    ``(batch, tokens)``. Positions begin at 0 with each example, and once more with the padding:
    transformers takes a row's sequences from there and keeps their attention apart. There is no
    attention mask, since transformers looks at the positions only where none is given.

    Attributes:
        pad_token_id: Any valid id; its labels and segments are masked.
        flat: One row for the whole batch and no padding, as flash attention wants it.

    Source:
        `transformers.masking_utils.find_packed_sequence_indices`.
    """

    pad_token_id: int
    flat: bool = False

    def __call__(self, batch: Sequence[Sequence[Encoded]]) -> dict[str, torch.Tensor]:
        """Collate at least one row of at least one example."""
        rows = [[one for row in batch for one in row]] if self.flat else batch
        longest = max(sum(len(one) for one in row) for row in rows)
        made = _empty(len(rows), longest, self.pad_token_id)
        position_ids = torch.zeros_like(made["input_ids"])
        for index, row in enumerate(rows):
            at = 0
            for segment, one in enumerate(row):
                _place(made, index, at, segment, one)
                position_ids[index, at : at + len(one)] = torch.arange(len(one))
                at += len(one)
            position_ids[index, at:] = torch.arange(longest - at)
        return {**made, "position_ids": position_ids}


def _empty(rows: int, tokens: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    shape = (rows, tokens)
    return {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORED),
        "segment_ids": torch.full(shape, PADDING),
    }


def _place(made: dict[str, torch.Tensor], row: int, start: int, segment: int, one: Encoded) -> None:
    here = slice(start, start + len(one))
    ids = torch.tensor(one.input_ids)
    made["input_ids"][row, here] = ids
    made["labels"][row, here] = torch.where(torch.tensor(one.completion_mask), ids, IGNORED)
    made["segment_ids"][row, here] = segment
