"""
int8 and int4: neighbours of a row share a scale, and a weight is ``code * scale + offset``.

The offset of a group is one of three: a minimum of its own (what is made here), a whole zero point
(``-zero * scale``: GPTQ, AWQ, compressed-tensors), or half the codes (symmetric:
``-2 ** (bits - 1) * scale``). With scales in 16 bits each product is exact in float32, so that
fused and unfused arithmetic round alike and every machine decodes the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from melinoe.errors import AttachError
from melinoe.experts.format import Arithmetic, PackedFormat, Shapes, groups_of


@dataclass(frozen=True)
class Integer(PackedFormat):
    """
    Unsigned codes of 8 or 4 bits, rounded to the nearest.

    Parts of a matrix ``(rows, columns)``:

    - ``codes``: uint8 ``(rows, columns)``; of 4 bits ``(rows, columns / 2)``, the even column in
      the lower half of its byte.
    - ``scales``: *scale_dtype* ``(rows, columns / group)``.
    - ``minimums``, float16, or ``zeros``, uint8: shaped as the scales; neither if symmetric.

    Args:
        bits: 8 or 4.
        group: Neighbours that share a scale; None for a whole row. Where it does not divide a
            row, the largest number that divides both is taken.
        offset: ``minimum``, ``zero`` or ``symmetric``.
        scale_dtype: float16, bfloat16 or float32.
    """

    bits: int
    group: int | None = 64
    offset: str = "minimum"
    scale_dtype: torch.dtype = torch.float16

    @property
    def name(self) -> str:  # type: ignore[override]
        """``int8`` or ``int4``, with the group where it is not 64."""
        return f"int{self.bits}" + ("" if self.group == 64 else f"-g{self.group or 'row'}")

    def arithmetic(self, columns: int) -> Arithmetic:
        """How products read a matrix."""
        shared = groups_of(columns, self.group)
        group = math.gcd(shared, 128)  # what is unrolled is compiled in a second, not in minutes
        return Arithmetic(f"uint{self.bits}", group, self.offset, groups_per_scale=shared // group)

    def matrix_parts(self, rows: int, columns: int) -> Shapes:
        """Give the parts of a matrix; see the class."""
        shape = (rows, columns // groups_of(columns, self.group))
        parts: Shapes = {
            "codes": ((rows, columns * self.bits // 8), torch.uint8),
            "scales": (shape, self.scale_dtype),
        }
        if self.offset == "minimum":
            parts["minimums"] = (shape, torch.float16)
        elif self.offset == "zero":
            parts["zeros"] = (shape, torch.uint8)
        return parts

    def encode_matrix(self, weights: Tensor) -> dict[str, Tensor]:
        """
        Round *weights* to codes that cover the whole group: each is off by half a scale at most,
        for scales are rounded up and minimums down. AttachError: a weight that is no finite float16
        number.
        """
        if self.offset == "zero" or self.scale_dtype != torch.float16:
            raise ValueError("only float16 scales with minimums, or symmetric codes, are made here")
        rows, columns = weights.shape
        group = groups_of(columns, self.group)
        groups = weights.view(rows, -1, group)
        low, high = (found.double().numpy() for found in (groups.amin(2), groups.amax(2)))
        if not max(abs(low).max(), abs(high).max()) < 60000:
            raise AttachError(
                f"a weight is not finite or outside float16's range, so {self.name} cannot hold "
                "it; serve this model without a format"
            )
        parts = {}
        if self.offset == "symmetric":
            half = 2 ** (self.bits - 1)
            scale = _up(np.maximum(-low, high) / (half - 1))
            minimum = -half * scale.astype(np.float64)
        else:
            parts["minimums"] = torch.from_numpy(_down(low))
            minimum = _down(low).astype(np.float64)
            scale = _up((high - minimum) / (2**self.bits - 1))
        parts["scales"] = torch.from_numpy(scale)
        step = parts["scales"].double()[..., None]
        codes = (groups.double() - torch.from_numpy(minimum)[..., None]).div_(
            step.where(step > 0, torch.inf)
        )
        codes = codes.round_().clamp_(0, 2**self.bits - 1).byte().reshape(rows, columns)
        parts["codes"] = pack_pairs(codes, self.bits)
        return parts

    def decode_matrix(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Compute ``code * scale + offset`` in float32."""
        scale = parts["scales"].float()[..., None]
        codes = parts["codes"]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1)
        numbers = codes.reshape(rows, scale.shape[1], -1).float()
        if self.offset == "minimum":
            weights = numbers * scale + parts["minimums"].float()[..., None]
        elif self.offset == "zero":
            weights = (numbers - parts["zeros"].float()[..., None]) * scale
        else:
            weights = (numbers - 2 ** (self.bits - 1)) * scale
        return weights.reshape(rows, columns)


def pack_pairs(codes: Tensor, bits: int = 4) -> Tensor:
    """Lay codes of 4 bits two to a byte, the even column below; those of 8 stay."""
    return codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4


def _up(values: np.ndarray) -> np.ndarray:
    """The nearest float16 that is not below."""
    near = values.astype(np.float16)
    return np.where(near < values, np.nextafter(near, np.float16(np.inf)), near)


def _down(values: np.ndarray) -> np.ndarray:
    """The nearest float16 that is not above."""
    near = values.astype(np.float16)
    return np.where(near > values, np.nextafter(near, np.float16(-np.inf)), near)
