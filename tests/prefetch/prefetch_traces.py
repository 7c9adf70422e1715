"""Small traces with guesses, by hand."""

import numpy as np

from melinoe.cache.trace import TraceBuilder


def decoding(chosen, guessed, num_experts=4, top_k=1):
    """Passes of one row: per pass and layer the ids chosen, and those guessed for layer 1."""
    builder = TraceBuilder(2, num_experts, top_k)
    for layers, guess in zip(chosen, guessed, strict=True):
        early = np.full((1, 2, top_k), -1)
        early[0, 1] = guess
        builder.add_forward(np.array([layers]), 0, 1, guesses=early)
    return builder.trace()
