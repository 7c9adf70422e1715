"""Traces whose prompts tell their experts, and the model that they are said to be of."""

from functools import partial

import numpy as np
import torch
from small_olmoe import tiny_model as small_olmoe
from trace_builder import TraceBuilder

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW
from melinoe.predictor import FitSettings

LAYERS, EXPERTS, TOP_K, VOCABULARY = 2, 16, 2, 32
QUICK = FitSettings(epochs=60, patience=20)


tiny_model = partial(small_olmoe, num_experts=EXPERTS, initializer_range=0.02, eos_token_id=1)


def planted(sequences=60, seed=0, model_fingerprint="m"):
    """Prompts that start with token 2 + t use experts 4t..4t+3; their own rows are noise."""
    rng = np.random.default_rng(seed)
    builder = TraceBuilder(LAYERS, EXPERTS, TOP_K)
    prompts = []
    for sequence in range(sequences):
        topic = sequence % 4
        prompts.append([2 + topic, 2 + topic, *rng.integers(8, VOCABULARY, 4).tolist()])
        noise = rng.integers(0, EXPERTS, (6, LAYERS, TOP_K))
        builder.add_forward(noise, sequence, PROMPT_ROW)
        for _ in range(12):
            chosen = np.stack([rng.permutation(4)[:TOP_K] for _ in range(LAYERS)]) + 4 * topic
            builder.add_forward(chosen[None], sequence, COMPLETION_ROW)
    return builder.trace(model="planted", fingerprint=model_fingerprint), prompts


def embeddings(seed=0):
    return torch.randn(VOCABULARY, 16, generator=torch.Generator().manual_seed(seed))
