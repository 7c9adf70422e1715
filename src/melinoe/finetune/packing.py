"""
Several examples in one row, so that hardly any token is padding; none sees another's.

Attention is kept apart by transformers itself, from positions that begin anew with each example
(see `melinoe.data.PackedCollator`). Not every family lets it: convolutions, state-space and linear
attention layers carry a state over the border. So a model is asked before it is trained: the
gradient of one example's logits must not reach another example of its row.
"""

import inspect
import logging
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch

from melinoe.data import Encoded, PackedCollator
from melinoe.errors import UnsupportedModelError
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


def packed_collator(model: Any, pad_token_id: int) -> PackedCollator:
    """
    The collator whose examples *model* keeps apart: padded rows, or all in one for flash attention.

    Raises:
        UnsupportedModelError: it keeps neither apart; the sentence names the family.

    Cost: a forward and a backward pass over 16 tokens, twice at most.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters):
        for flat in (False, True):
            collator = PackedCollator(pad_token_id, flat=flat)
            if not leaks(model, collator):
                return collator
    raise UnsupportedModelError(
        f"{family(model)} lets an example see the one packed before it (it has layers that carry a "
        "state from token to token, or attention that ignores positions); train without packing"
    )


def leaks(model: Any, collator: PackedCollator) -> bool:
    """
    Whether a packed example reaches another of its row, or the padding reaches any.

    The model's weights, mode and the random numbers are left as they are.
    """
    embeddings = model.get_input_embeddings()
    seen: list[torch.Tensor] = []

    def watch(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    made = [Encoded(list(range(1, 1 + n)), [False] + [True] * (n - 1)) for n in (4, 5, 3, 4)]
    batch = collator([made[:2], made[2:]])
    device = embeddings.weight.device
    ids, segments = batch["input_ids"].to(device), batch["segment_ids"].to(device)
    handle = embeddings.register_forward_hook(watch)
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            logits = model(input_ids=ids, position_ids=batch["position_ids"].to(device)).logits
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
