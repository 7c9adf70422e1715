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
    Pads a batch on the right, to its longest example; labels are -100 on prompt and padding.

    Gives ``input_ids``, ``attention_mask``, ``labels`` and ``segment_ids``, int64 ``(batch,
    tokens)``.
    """

    pad_token_id: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Collate at least one example."""
        made = _placed([[one] for one in batch], self.pad_token_id)
        return made | {"attention_mask": (made["segment_ids"] != PADDING).long()}


@dataclass(frozen=True)
class PackedCollator:
    """
    Packs the examples of each row one after the other; rows are padded to the longest.

    Gives ``input_ids``, ``labels``, ``segment_ids`` and ``position_ids``, int64 ``(batch,
    tokens)``. Positions begin at 0 with each example and with the padding: there
    `transformers.masking_utils.find_packed_sequence_indices` begins a sequence and keeps attention
    apart, if no attention mask is given.
    """

    pad_token_id: int  # any valid id; its labels and segments are masked
    flat: bool = False  # one row for the whole batch and no padding, as flash attention wants it

    def __call__(self, batch: Sequence[Sequence[Encoded]]) -> dict[str, torch.Tensor]:
        """Collate at least one row of at least one example."""
        rows = [[one for row in batch for one in row]] if self.flat else batch
        made = _placed(rows, self.pad_token_id)
        positions = torch.zeros_like(made["input_ids"])
        for at, row in enumerate(rows):
            sizes = [len(one) for one in row]
            sizes.append(positions.shape[1] - sum(sizes))
            positions[at] = torch.cat([torch.arange(size) for size in sizes])
        return made | {"position_ids": positions}


def _placed(rows: Sequence[Sequence[Encoded]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Ids, labels and segments of the examples of each row, one after the other."""
    shape = (len(rows), max(sum(map(len, row)) for row in rows))
    made = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORED),
        "segment_ids": torch.full(shape, PADDING),
    }
    for number, row in enumerate(rows):
        start = 0
        for segment, one in enumerate(row):
            here = slice(start, start := start + len(one))
            ids = torch.tensor(one.input_ids)
            made["input_ids"][number, here] = ids
            made["labels"][number, here] = torch.where(
                torch.tensor(one.completion_mask), ids, IGNORED
            )
            made["segment_ids"][number, here] = segment
    return made
