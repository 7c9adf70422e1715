"""The examples of a run as rows, in the order in which they are seen."""

from collections.abc import Sequence

from melinoe.config import FinetuneSettings
from melinoe.data import Encoded
from melinoe.errors import DataError
from melinoe.finetune.order import training_rows


def rows_of(
    data: Sequence[Encoded], settings: FinetuneSettings, processes: int = 1
) -> tuple[int, list[list[Encoded]]]:
    """
    Optimiser steps, and the examples of each row in the order of training; see `training_rows`.

    With several *processes* each takes as many batches: rows in which nothing is to be learned fill
    the last. The terms are those of one process, which needs no such rows: they count for nothing.
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
