"""Traces for tests."""

import numpy as np
from trace_builder import TraceBuilder

from melinoe.cache.trace import Trace


def trace_of(*forwards, num_experts, top_k, sequence=0, kind=1):
    """One layer; each forward pass is a list of rows, each row a list of ids."""
    builder = TraceBuilder(1, num_experts, top_k)
    for rows in forwards:
        builder.add_forward(np.array(rows)[:, None, :], sequence, kind)
    return builder.trace()


def random_trace(
    seed,
    sequences=3,
    layers=2,
    num_experts=8,
    top_k=2,
    prompt=5,
    completion=12,
    batch=1,
) -> Trace:
    """Skewed random choices: prompts computed at once, then token by token, in batches."""
    rng = np.random.default_rng(seed)
    builder = TraceBuilder(layers, num_experts, top_k)

    for first in range(0, sequences, batch):
        ids = np.arange(first, min(first + batch, sequences))
        taste = rng.normal(0, 1.5, (len(ids), layers, num_experts))

        def choose(rows, owner, taste=taste):
            noisy = taste[owner] + rng.gumbel(size=(rows, layers, num_experts))
            return np.argsort(-noisy, axis=-1)[..., :top_k]

        owner = np.repeat(np.arange(len(ids)), prompt)
        kind = np.zeros(len(owner), dtype=int)
        if batch > 1:
            kind[0] = 2  # left padding
        builder.add_forward(choose(len(owner), owner), ids[owner], kind)
        for _ in range(completion):
            owner = np.arange(len(ids))
            experts = choose(len(ids), owner)
            experts[rng.random(experts.shape) < 0.05] = -1
            builder.add_forward(experts, ids, 1)
    return builder.trace("random", f"seed {seed}", {"numpy": np.__version__}, "for tests")
