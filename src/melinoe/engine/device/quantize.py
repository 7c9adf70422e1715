"""
Group-wise 8- and 4-bit codes of weights, and the weights they stand for.

Each 64 neighbours in memory share a scale and a minimum, both float16, and a weight is
``code * scale + minimum``. The product is exact in float32 (at most 19 bits), so a fused and an
unfused multiply-add round alike and every machine decodes the same number.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from melinoe.errors import AttachError

GROUP = 64
BITS = {"int8": 8, "int4": 4}


class Codes(NamedTuple):
    """
    Quantised weights.

    Attributes:
        codes: uint8 ``(groups, 64)``, below ``2 ** bits``.
        scale: float16 ``(groups,)``, not negative.
        minimum: float16 ``(groups,)``, what code 0 stands for.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor


def quantisable(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of *shape* is stored in codes: a matrix of whole groups; biases are not."""
    numel = int(np.prod(shape)) if shape else 0
    return len(shape) >= 2 and numel % GROUP == 0


def quantise(weights: Tensor, bits: int, symmetric: bool = False) -> Codes:
    """
    Quantise *weights*, whose number is a multiple of 64, in memory order.

    The scale is rounded up and the minimum down, so that the codes cover the whole group: every
    weight is off by half a scale at most, before the result is rounded to its own type.

    Args:
        weights: any floating type and shape.
        bits: 8 or 4.
        symmetric: place the codes symmetrically about zero instead of on the group's own range.

    Raises:
        AttachError: a weight that is no finite float16 number.
    """
    values = weights.detach().reshape(-1, GROUP).to(torch.float64).numpy()
    low, high = values.min(axis=1), values.max(axis=1)
    if not (np.abs(values).max(initial=0.0) < 60000):
        raise AttachError(
            "a weight is not finite or outside float16's range, so it has no code; serve this "
            "model without compression"
        )
    if symmetric:
        half = 2 ** (bits - 1)
        scale = _up(np.maximum(-low, high) / (half - 1))
        minimum = (-half * scale.astype(np.float64)).astype(np.float16)  # exact: a power of two
    else:
        minimum = _down(low)
        scale = _up((high - minimum.astype(np.float64)) / (2**bits - 1))
    step = scale.astype(np.float64)[:, None]
    offset = values - minimum.astype(np.float64)[:, None]
    codes = np.rint(np.divide(offset, step, out=np.zeros_like(offset), where=step > 0))
    codes = np.clip(codes, 0, 2**bits - 1).astype(np.uint8)
    return Codes(*(torch.from_numpy(array) for array in (codes, scale, minimum)))


def dequantise(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The weights that *codes* stand for, flat, as the copy kernel writes them."""
    values = codes.codes.float() * codes.scale.float()[:, None] + codes.minimum.float()[:, None]
    return values.reshape(-1).to(dtype)


def _up(values: np.ndarray) -> np.ndarray:
    """The nearest float16 that is not below."""
    near = values.astype(np.float16)
    return np.where(near < values, np.nextafter(near, np.float16(np.inf)), near)


def _down(values: np.ndarray) -> np.ndarray:
    """The nearest float16 that is not above."""
    near = values.astype(np.float16)
    return np.where(near > values, np.nextafter(near, np.float16(-np.inf)), near)
