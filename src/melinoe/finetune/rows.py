"""
Arrange examples in rows, in the order of training; the seed alone decides, for a control too.

Packed examples never see each other: transformers keeps attention apart by positions that begin
anew with each example. Some families make their masks without the positions and are given ready
ones; convolutions, state-space and linear attention layers carry a state over the border. So a
model is tried before it is trained.
"""

import logging
import math
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from melinoe.config import FinetuneSettings
from melinoe.data import Encoded, PackedCollator
from melinoe.errors import DataError, UnsupportedModelError
from melinoe.finetune.objective import logits_of, model_outputs
from melinoe.moe.experts import family

log = logging.getLogger(__name__)

_BATCHES_SORTED_TOGETHER = 16


def rows_of(
    data: Sequence[Encoded], settings: FinetuneSettings, processes: int = 1
) -> tuple[int, list[list[Encoded]]]:
    """
    Return the number of optimiser steps, and the examples of each row in the order of training.

    With several *processes* each takes as many batches: rows in which nothing is to be learned fill
    the last, and count for nothing.
    """
    steps, places = training_rows([len(one) for one in data], settings, processes)
    rows = [[data[place] for place in row] for row in places]
    if processes > 1:
        empty = [Encoded(one.input_ids, [False] * len(one)) for one in rows[0]]
        rows += [empty] * (-len(rows) % (settings.batch_size * processes))
    return steps, rows


def check_data(settings: FinetuneSettings, data: Sequence[Encoded]) -> None:
    """
    Refuse data that no run could learn from.

    Raises:
        DataError: nothing to learn, or an example that does not fit a packed row.
    """
    if not any(any(one.completion_mask) for one in data):
        raise DataError(
            "no example has a token to learn, all are prompt; give completions, or a larger "
            "max_length if they were cut off"
        )
    longest = max(len(one) for one in data)
    if settings.packing and longest > settings.max_length:
        raise DataError(
            f"an example of {longest} tokens does not fit a packed row of {settings.max_length}; "
            "raise max_length, or cut the examples"
        )


def training_rows(
    lengths: Sequence[int], settings: FinetuneSettings, processes: int = 1
) -> tuple[int, list[list[int]]]:
    """
    Return the number of optimiser steps, and the positions of each row's examples, in order.

    A row holds one example, or packed several. One step takes batch size x accumulation x
    *processes* rows that follow each other, so the processes share out what one would see.
    """
    per_step = settings.batch_size * settings.gradient_accumulation * processes
    if not settings.packing:
        steps, seen = number_of_steps(
            len(lengths), per_step, steps=settings.steps, epochs=settings.epochs
        )
        return steps, [[i] for i in training_order(lengths, per_step, seen, settings.seed)]
    random_numbers = random.Random(settings.seed)
    rows = pack(lengths, settings.max_length, random_numbers)
    steps, seen = number_of_steps(len(rows), per_step, steps=settings.steps, epochs=settings.epochs)
    while len(rows) < seen:  # each epoch packs anew, so that rows are mixed differently
        rows += pack(lengths, settings.max_length, random_numbers)
    return steps, rows[:seen]


def number_of_steps(
    num_examples: int, batch: int, *, steps: int | None, epochs: float
) -> tuple[int, int]:
    """Return steps and examples seen; an incomplete last batch counts as a step."""
    seen = steps * batch if steps is not None else max(1, round(epochs * num_examples))
    return math.ceil(seen / batch), seen


def training_order(lengths: Sequence[int], batch: int, seen: int, seed: int) -> list[int]:
    """
    Order the positions of *seen* examples: each once before any comes again.

    Within a window of 16 batches examples are sorted by length, which saves padding, and the
    batches then shuffled.
    """
    random_numbers = random.Random(seed)
    arranged: list[int] = []
    while len(arranged) < seen:
        epoch = list(range(len(lengths)))
        random_numbers.shuffle(epoch)
        # What the epoch before left of a batch is filled up first, or later batches would straddle.
        head = min(-len(arranged) % batch, len(epoch))
        arranged += epoch[:head]
        for start in range(head, len(epoch), batch * _BATCHES_SORTED_TOGETHER):
            part = epoch[start : start + batch * _BATCHES_SORTED_TOGETHER]
            part.sort(key=lambda index: (lengths[index], index))
            batches = [part[at : at + batch] for at in range(0, len(part), batch)]
            last = [batches.pop()] if len(batches[-1]) < batch else []
            random_numbers.shuffle(batches)
            arranged += [index for one in batches + last for index in one]
    return arranged[:seen]


def pack(lengths: Sequence[int], row_tokens: int, random_numbers: random.Random) -> list[list[int]]:
    """
    Put examples into as few rows as best-fit decreasing finds: positions, row by row.

    Examples of equal length take their turn at random, and the rows come in random order.

    Args:
        lengths: Tokens of each example, none above *row_tokens*.
        row_tokens: Most tokens of a row.
        random_numbers: Decides what is not decided by the lengths.
    """
    waiting = list(range(len(lengths)))
    random_numbers.shuffle(waiting)
    waiting.sort(key=lambda index: -lengths[index])
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # tokens that each row has left, and the row, ascending
    for index in waiting:
        at = bisect_left(rooms, (lengths[index],))
        if at == len(rooms):
            rows.append([])
        room, row = (row_tokens, len(rows) - 1) if at == len(rooms) else rooms.pop(at)
        rows[row].append(index)
        insort(rooms, (room - lengths[index], row))
    random_numbers.shuffle(rows)
    return rows


@dataclass(frozen=True)
class Packing:
    """
    Way to keep a model's examples apart in one row.

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
        """Make the model's inputs of a batch that is on its device."""
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
    Find a way in which *model* keeps the examples of a row apart.

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
    Try whether a packed example is reached by another of its row, or by the padding.

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
