"""A trace to a record of kind ``usage``: which experts each sequence used, layer by layer."""

from typing import Any

import numpy as np

from melinoe.cache.trace import COMPLETION_ROW, Trace
from melinoe.errors import DataError


def usage_record(trace: Trace, model: str, sequences: int = 24, layers: int = 4) -> dict[str, Any]:
    """
    Return the record of kind ``usage``, of completion tokens alone.

    ``counts`` holds, for each shown layer, one row per sequence with the number of its choices
    that fell on each expert; ``shown_layers`` says which layers those are.

    Args:
        trace: As `melinoe.generate.trace_prompts` makes it.
        model: Label of the model.
        sequences: Show so many sequences at most, the first.
        layers: Show so many layers at most, evenly from the first to the last.

    Raises:
        DataError: the trace has no completion tokens.
    """
    rows = np.flatnonzero(trace.kind == COMPLETION_ROW)
    if rows.size == 0:
        raise DataError("the trace has no completion tokens; generate at least two per prompt")
    shown = np.unique(np.linspace(0, trace.num_layers - 1, layers).round().astype(int))
    present = np.unique(trace.sequence[rows])[:sequences]
    counts = np.zeros((len(shown), len(present), trace.num_experts + 1), dtype=np.int64)
    for place, sequence in enumerate(present):
        chosen = trace.experts[rows[trace.sequence[rows] == sequence]][:, shown]
        for layer in range(len(shown)):
            # -1, which means no expert, falls into the extra place.
            np.add.at(counts[layer, place], chosen[:, layer].ravel(), 1)
    return {
        "kind": "usage",
        "model": model,
        "num_experts": trace.num_experts,
        "layers": trace.num_layers,
        "shown_layers": shown.tolist(),
        "counts": counts[..., :-1].tolist(),
    }
