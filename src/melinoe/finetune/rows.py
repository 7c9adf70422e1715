"""Arrange examples in the order of training; the seed alone decides, for a control too."""

import math
import random
from collections.abc import Sequence

from melinoe.config import FinetuneSettings
from melinoe.data import Encoded

_BATCHES_SORTED_TOGETHER = 16


def rows_of(
    data: Sequence[Encoded], settings: FinetuneSettings, processes: int = 1
) -> tuple[int, list[Encoded]]:
    """
    Return the number of optimiser steps, and the examples in the order of training.

    One step takes batch size x accumulation x *processes* examples that follow each other, so the
    processes share out what one would see. Each takes as many batches: rows in which nothing is to
    be learned fill the last, and count for nothing.
    """
    per_step = settings.batch_size * settings.gradient_accumulation * processes
    steps, seen = number_of_steps(len(data), per_step, steps=settings.steps, epochs=settings.epochs)
    order = training_order([len(one) for one in data], per_step, seen, settings.seed)
    rows = [data[place] for place in order]
    if processes > 1:
        empty = Encoded(rows[0].input_ids, [False] * len(rows[0]))
        rows += [empty] * (-len(rows) % (settings.batch_size * processes))
    return steps, rows


def number_of_steps(
    num_examples: int, batch: int, *, steps: int | None, epochs: float
) -> tuple[int, int]:
    """Return steps and examples seen; an incomplete last batch counts as a step."""
    seen = steps * batch if steps is not None else max(1, round(epochs * num_examples))
    return math.ceil(seen / batch), seen


def training_order(lengths: Sequence[int], batch: int, seen: int, seed: int) -> list[int]:
    """
    Order the positions of *seen* examples: each once before any comes again. Within a window of 16
    batches examples are sorted by length, which saves padding (6 % of the positions are left, of
    GSM8K by eights), and the batches then shuffled.
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
