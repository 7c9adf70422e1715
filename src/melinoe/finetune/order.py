"""
Which example is seen when: decided by the seed alone, so that a run and its control agree.

Examples of like length share a batch, which saves padding; which batches, and their order, are
random. Packed, the examples of a row fill it up, and the rows are in random order.
"""

import math
import random
from collections.abc import Sequence

from melinoe.config import FinetuneSettings
from melinoe.finetune.packing import pack

_BATCHES_SORTED_TOGETHER = 16


def training_rows(
    lengths: Sequence[int], settings: FinetuneSettings, processes: int = 1
) -> tuple[int, list[list[int]]]:
    """
    Optimiser steps, and the positions of the examples of each row in the order of training.

    A row holds one example, or several where ``settings.packing`` asks for it. One step takes
    batch size x accumulation x *processes* rows that follow each other, so the processes only share
    out what one process would see in the same step.
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
    """``(steps, examples seen)``; an incomplete last batch counts as a step."""
    seen = steps * batch if steps is not None else max(1, round(epochs * num_examples))
    return math.ceil(seen / batch), seen


def training_order(lengths: Sequence[int], batch: int, seen: int, seed: int) -> list[int]:
    """
    Positions of the examples in the order of training.

    Every example comes once before any comes again. Within a window of 16 batches examples are
    sorted by length and the batches then shuffled.

    Args:
        lengths: Tokens of each example; at least one.
        batch: Examples per optimiser step.
        seen: Length of the order.
        seed: Decides it.
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
