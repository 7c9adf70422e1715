"""A trace small enough to work every figure of it out by hand."""

import numpy as np
from trace_builder import TraceBuilder

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW


def small_trace():
    """One layer, 4 experts, top-1: sequence 0 chooses 0 | 0 1 0, sequence 1 chooses 2 | 2 2 2."""
    builder = TraceBuilder(1, 4, 1)
    for sequence, (prompt, completion) in enumerate([(0, [0, 1, 0]), (2, [2, 2, 2])]):
        builder.add_forward(np.full((1, 1, 1), prompt), sequence, PROMPT_ROW)
        for expert in completion:
            builder.add_forward(np.full((1, 1, 1), expert), sequence, COMPLETION_ROW)
    return builder.trace()
