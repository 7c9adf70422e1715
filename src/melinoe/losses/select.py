"""Select the tokens that count, and average over them."""

import torch
from torch import Tensor


def completion_positions(completion_mask: Tensor) -> Tensor:
    """Return the flat positions of the tokens that count; once made, for all losses."""
    return completion_mask.flatten().nonzero().squeeze(-1)


def select(values: Tensor, completion: Tensor) -> Tensor:
    """Take the values of the tokens that count, ``(count, ...)`` from ``(batch, tokens, ...)``."""
    if completion.dtype == torch.bool:
        completion = completion_positions(completion)
    return values.flatten(0, 1).index_select(0, completion)


def mean(per_token: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Sum over the first dimension, divided by *denominator*; default: its length, at least 1."""
    count = max(1, per_token.shape[0]) if denominator is None else denominator
    return per_token.sum(0) / count
