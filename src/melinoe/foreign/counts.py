"""
Statistics as a table, CSV or Parquet: how often each expert was chosen, without the order.

    layer, or layer_id     number of the layer; gaps, which dense layers leave, are closed
    expert, or expert_id   which expert of that layer
    count                  optional: how often it was chosen; absent, each row is one choice

Experts that no row names were never chosen. SGLang 0.4.4 wrote this form itself
(``layer_id,expert_id,count``), and logs of one choice per row (``layer,expert``) are it too.
"""

import os

import numpy as np

from melinoe.errors import TraceError
from melinoe.foreign.columns import Columns, whole

_NAMES = {"layer": "layer", "layer_id": "layer", "expert": "expert", "expert_id": "expert"}


def is_counts(columns: Columns) -> bool:
    """Whether a table is of this form rather than a trace's."""
    return {"layer", "expert"} <= {_NAMES.get(name) for name in columns}


def read_counts(path: str | os.PathLike, columns: Columns, num_experts: int) -> np.ndarray:
    """
    Add the rows up.

    Args:
        path: For sentences.
        columns: Of the table.
        num_experts: Experts of each layer; a table does not say how many were never chosen.

    Returns:
        Counts, float64 (layers, num_experts); only layers that a row names.

    Raises:
        TraceError: the table is not of the form above; the sentence says what is wrong.
    """

    def refuse(fault: str) -> TraceError:
        return TraceError(
            f"the table {path} is no statistics: {fault}; see docs/traces.md for the form"
        )

    known = {_NAMES.get(name, name): values for name, values in columns.items()}
    if len(known) != len(columns) or known.keys() - {"layer", "expert", "count"}:
        odd = sorted(set(columns) - {"layer", "layer_id", "expert", "expert_id", "count"})
        raise refuse(f"it has more columns than those ({', '.join(odd) or 'one twice'})")
    try:
        layer, expert = whole(known["layer"]), whole(known["expert"])
        count = whole(known["count"]) if "count" in known else np.ones_like(layer)
    except (TypeError, ValueError, OverflowError) as error:
        raise refuse(f"a value is no whole number ({error})") from error
    if not len(layer):
        raise refuse("it has no rows")
    if min(layer.min(), expert.min(), count.min()) < 0:
        raise refuse("a number is negative or missing")
    if expert.max() >= num_experts:
        raise refuse(f"it names expert {expert.max()} of {num_experts}")
    layers, place = np.unique(layer, return_inverse=True)
    counts = np.zeros((len(layers), num_experts))
    np.add.at(counts, (place, expert), count)
    return counts
