"""What the tokens of one layer's call chose, as a request to its cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.requests import mean_scores


def request_of(top_k_index: Tensor, num_experts: int) -> tuple[list[int], list[int], bool]:
    """
    Distinct ids ascending, how often each is used, and whether every choice is one.

    Args:
        top_k_index: ``(tokens, top_k)``; ids outside ``[0, num_experts)`` are no expert.
        num_experts: of the layer.
    """
    if top_k_index.shape[0] == 1:
        chosen = sorted(top_k_index.tolist()[0])
        distinct = len(set(chosen)) == len(chosen)
        if distinct and chosen[0] >= 0 and chosen[-1] < num_experts:
            return chosen, [1] * len(chosen), True
    ids = top_k_index.reshape(-1).cpu().numpy()
    known = ids[(ids >= 0) & (ids < num_experts)]
    counts = np.bincount(known, minlength=num_experts)
    experts = counts.nonzero()[0]
    return experts.tolist(), counts[experts].tolist(), known.size == ids.size


def scores_of(
    experts: list[int], top_k_index: Tensor, top_k_weights: Tensor, num_experts: int
) -> list[float]:
    """How much the router wanted each of *experts*, the number that a trace would give."""
    ids = top_k_index.reshape(-1).cpu().numpy()
    weights = top_k_weights.reshape(-1).to(torch.float16).cpu().numpy()
    known = (ids >= 0) & (ids < num_experts)
    rows = top_k_index.shape[0]
    return mean_scores(ids[known], weights[known], rows, num_experts)[experts].tolist()
