"""
Several examples in one row, so that hardly any token is padding; none sees another's.

Attention is kept apart by transformers itself, from positions that begin anew with each example
(see `melinoe.data.PackedCollator`). Some families make their masks without the positions and are
given them ready-made; and some cannot be helped: convolutions, state-space and linear attention
layers carry a state over the border. So a model is asked before it is trained: the gradient of one
example's logits must not reach another example of its row.
"""

import logging
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from melinoe.data import Encoded, PackedCollator
from melinoe.errors import UnsupportedModelError
from melinoe.finetune.forward import logits_of, model_outputs
from melinoe.moe.experts import family

log = logging.getLogger(__name__)


def pack(lengths: Sequence[int], row_tokens: int, random_numbers: random.Random) -> list[list[int]]:
    """
    Put examples into as few rows as best-fit decreasing finds: positions, row by row.

    Examples of equal length take their turn at random, and the rows come in random order.

    Args:
        lengths: Tokens of each example, none above *row_tokens*.
        row_tokens: Most tokens of a row.
        random_numbers: Decides what is not decided by the lengths.

    Cost: n log n.
    """
    waiting = list(range(len(lengths)))
    random_numbers.shuffle(waiting)
    waiting.sort(key=lambda index: -lengths[index])
    rows: list[list[int]] = []
    rooms: list[int] = []  # the different amounts of room that rows have left, ascending
    rows_with: dict[int, list[int]] = {}
    for index in waiting:
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            row, room = len(rows), row_tokens
            rows.append([])
        else:
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        rows[row].append(index)
        room -= lengths[index]
        if room not in rows_with:
            insort(rooms, room)
            rows_with[room] = []
        rows_with[room].append(row)
    random_numbers.shuffle(rows)
    return rows


@dataclass(frozen=True)
class Packing:
    """
    How a model's examples are kept apart in one row.

    Attributes:
        collator: Padded rows, or the whole batch in one row as flash attention wants it.
        config: Where the model has to be given its attention masks, since it makes them without
            looking at positions: its configuration; else ``None``.
        dtype: Of the model's hidden states.
    """

    collator: PackedCollator
    config: Any = None
    dtype: torch.dtype = torch.float32

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of the collator, on the model's device, as the model must be given it."""
        if self.config is None:
            return batch
        ids = batch["input_ids"]
        shape_only = torch.empty((*ids.shape, 0), dtype=self.dtype, device=ids.device)
        masks = create_masks_for_generate(
            self.config, shape_only, None, None, position_ids=batch["position_ids"]
        )
        return {**batch, "attention_mask": masks}


def find_packing(model: Any, pad_token_id: int) -> Packing:
    """
    The first way in which *model* keeps the examples of a row apart.

    Raises:
        UnsupportedModelError: there is none; the sentence names the family.

    Cost: a forward and a backward pass over 18 tokens, three times at most.
    """
    rows, flat = PackedCollator(pad_token_id), PackedCollator(pad_token_id, flat=True)
    for packing in (Packing(rows), Packing(rows, model.config, model.dtype), Packing(flat)):
        try:
            if not leaks(model, packing):
                return packing
        except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
            log.info("%s does not take %s: %s", family(model), packing, error)
    raise UnsupportedModelError(
        f"{family(model)} lets an example see the one packed before it (it has layers that carry a "
        "state from token to token, or attention that ignores positions); train without packing"
    )


def leaks(model: Any, packing: Packing) -> bool:
    """
    Whether a packed example is reached by another of its row, or by the padding.

    The model's weights and the random numbers are left as they are.
    """
    embeddings = model.get_input_embeddings()
    seen: list[torch.Tensor] = []

    def watch(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    made = [Encoded(list(range(1, 1 + n)), [False] + [True] * (n - 1)) for n in (4, 5, 3, 4)]
    device = embeddings.weight.device
    batch = packing.collator([made[:2], made[2:]])
    inputs = packing.inputs({key: value.to(device) for key, value in batch.items()})
    segments = inputs["segment_ids"]
    handle = embeddings.register_forward_hook(watch)
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            logits = logits_of(model, model_outputs(model, inputs))
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
            weighed = logits.float() * weights.to(device)
            for segment in segments.unique().tolist():
                own = segments == segment
                (gradient,) = torch.autograd.grad(weighed[own].sum(), seen[0], retain_graph=True)
                if gradient[~own].any() or not gradient[own].any():
                    return True
    finally:
        handle.remove()
    return False
