"""
int4: neighbours of a row share a scale and a shift, and a weight is ``(level - shift) * scale``.

The 16 levels lie closer together near zero, where weights are dense. Scale and shift take a byte
each, so that groups of 32 cost 4.5 bits a weight, and are fitted to each group's squared error.
Levels and shifts are whole numbers of 8 bits and scales have 4, so each product is exact in float32
and a weight has the same bits wherever it is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melinoe.errors import AttachError
from melinoe.experts.format import Arithmetic, PackedFormat, Shapes, groups_of
from melinoe.experts.integer import pack_pairs
from melinoe.experts.packed_dot import LEVELS, SCALE_EXPONENT, compile_kept

# The range of a group, and how much of it is tried; rounds of rounding and least squares for each.
_SHARES = np.array([1.0, 0.92, 0.84, 0.76])
_ROUNDS = 2
_LARGEST = 25000.0


@dataclass(frozen=True)
class Int4(PackedFormat):
    """
    Codes of 4 bits for `LEVELS`.

    Parts of a matrix ``(rows, columns)``:

    - ``codes``: uint8 ``(rows, columns / 2)``, the even column in the lower half of its byte.
    - ``scales``: int8 ``(rows, columns / group)``, whose bits are the exponent, less
      `SCALE_EXPONENT`, and the upper three bits of the mantissa of a float32.
    - ``zeros``: int8, shaped as the scales: the shift.

    Args:
        group: Neighbours that share a scale. Where it does not divide a row, the largest number
            that divides both is taken.

    Source:
        Non-linear levels: NF4, arXiv:2305.14314, and llama.cpp's IQ4_NL; alternating rounding and
        least squares: llama.cpp's Q4_K.
    """

    group: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """``int4``, with the group where it is not 32."""
        return "int4" + ("" if self.group == 32 else f"-g{self.group}")

    def arithmetic(self, columns: int) -> Arithmetic:
        """How products read a matrix."""
        return Arithmetic("levels", groups_of(columns, self.group), "zero")

    def matrix_parts(self, rows: int, columns: int) -> Shapes:
        """Give the parts of a matrix; see the class."""
        shape = (rows, columns // groups_of(columns, self.group))
        return {
            "codes": ((rows, columns // 2), torch.uint8),
            "scales": (shape, torch.int8),
            "zeros": (shape, torch.int8),
        }

    def encode_matrix(self, weights: Tensor) -> dict[str, Tensor]:
        """Choose each group's scale and shift of the least squared error that is found."""
        rows, columns = weights.shape
        groups = weights.view(rows, -1, groups_of(columns, self.group)).numpy()
        if not np.abs(groups).max() < _LARGEST:
            raise AttachError(
                f"a weight is not finite or above {_LARGEST:g}, so {self.name} cannot hold it; "
                "serve this model without a format"
            )
        codes = np.empty(groups.shape, np.uint8)
        scales, zeros = (np.empty(groups.shape[:2], np.int8) for _ in range(2))
        threads = min(torch.get_num_threads(), rows)
        cuts = np.linspace(0, rows, threads + 1, dtype=int)

        def fit(begin: int, end: int) -> None:
            own = slice(begin, end)
            _fit(groups[own], _CODES, _LEVELS, codes[own], scales[own], zeros[own])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fit, cuts[:-1], cuts[1:]))
        return {
            "codes": pack_pairs(torch.from_numpy(codes.reshape(rows, columns))),
            "scales": torch.from_numpy(scales),
            "zeros": torch.from_numpy(zeros),
        }

    def decode_matrix(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Compute ``(level - shift) * scale``, exactly."""
        codes, scales = parts["codes"], parts["scales"].view(torch.uint8).int()
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)
        levels = levels[torch.stack([codes & 15, codes >> 4], dim=-1).int()]
        shifted = levels.reshape(rows, scales.shape[1], -1) - parts["zeros"].float()[..., None]
        scale = ((scales << 20) + (SCALE_EXPONENT << 23)).view(torch.float32)
        return (shifted * scale[..., None]).reshape(rows, columns)


# The code nearest to half a level each, from -128: middles of levels are whole or halves.
_HALVES = np.arange(-256, 256) / 2
_CODES = (_HALVES[:, None] >= (np.array(LEVELS)[1:] + np.array(LEVELS)[:-1]) / 2).sum(1, np.uint8)
_LEVELS = np.array(LEVELS, np.int32)[_CODES]


@compile_kept
def _place(target):  # type: ignore[no-untyped-def]
    """Find a number of levels in the tables."""
    return min(max(int(np.floor(2 * target)), -256), 255) + 256


@compile_kept
def _fit(values, nearest, levels, codes, scales, zeros):  # type: ignore[no-untyped-def]
    """Write codes, scales and shifts of float32 groups *values* ``(rows, groups, group)``."""
    size = values.shape[2]
    for row in range(values.shape[0]):
        for number in range(values.shape[1]):
            x = values[row, number]
            low, high, sum_x, square = np.float32(0), np.float32(0), 0.0, 0.0
            for place in range(size):
                low, high = min(low, x[place]), max(high, x[place])
                sum_x += np.float64(x[place])
                square += x[place] * np.float64(x[place])
            best: Any = np.int32(0)
            least, shift = np.inf, np.int32(0)
            for share in _SHARES:
                step, start = (high - low) * share / 240, (high + low) / 2
                for _ in range(_ROUNDS):
                    # The nearest scale of 8 bits, and the shift in whole levels.
                    bits = np.float32(step).view(np.int32) + (1 << 19)
                    code: Any = min(max((bits >> 20) - (SCALE_EXPONENT << 3), 0), 255)
                    scale = np.int32((code << 20) + (SCALE_EXPONENT << 23)).view(np.float32)
                    zero = np.int32(min(max(np.rint(-start / scale), -128), 127))
                    inverse, shifted = np.float32(1) / scale, np.float32(zero)
                    total, squares, product = np.int32(0), np.int32(0), 0.0
                    for place in range(size):
                        level = levels[_place(x[place] * inverse + shifted)]
                        total += level
                        squares += level * level
                        product += level * np.float64(x[place])
                    # The squared error of (level - zero) * scale.
                    meant = squares - 2.0 * zero * total + size * np.float64(zero) * zero
                    error = square - 2 * scale * (product - zero * sum_x) + scale * scale * meant
                    if error < least:
                        least, best, shift = error, code, zero
                    spread = size * np.float64(squares) - np.float64(total) * total
                    if spread > 0:
                        step = max((size * product - total * sum_x) / spread, 0.0)
                        start = (sum_x - step * total) / size
            if square == 0:  # exactly zero: a level taken off itself
                best, shift = np.int32(0), levels[255]
            scales[row, number] = np.int8(np.uint8(best))
            zeros[row, number] = np.int8(shift)
            scale = np.int32((best << 20) + (SCALE_EXPONENT << 23)).view(np.float32)
            for place in range(size):
                codes[row, number, place] = nearest[_place(x[place] / scale + np.float32(shift))]
