"""
MXFP4 as gpt-oss stores it: floats of 4 bits (e2m1), 32 neighbours of a row share a power of two.

Source:
    OCP Microscaling Formats (MX) 1.0; `transformers.integrations.mxfp4` for the order of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from melinoe.errors import AttachError, UnsupportedModelError
from melinoe.experts.format import Arithmetic, PackedFormat, Shapes
from melinoe.experts.integer import pack_pairs
from melinoe.experts.packed_dot import E2M1

GROUP = 32
_BIAS = 127  # of the exponent that a scale is


@dataclass(frozen=True)
class Mxfp4(PackedFormat):
    """
    Levels of e2m1, and a power of two for each 32 neighbours.

    Parts of a matrix ``(rows, columns)``:

    - ``codes``: uint8 ``(rows, columns / 2)``, the even column in the lower half of its byte. A
      checkpoint's ``blocks`` of an expert are the same bytes, shaped ``(rows, columns / 32, 16)``.
    - ``scales``: uint8 ``(rows, columns / 32)``, exponents of two with bias 127.
    """

    name = "mxfp4"

    def arithmetic(self, columns: int) -> Arithmetic:
        """How products read a matrix."""
        return Arithmetic("e2m1", GROUP)

    def matrix_parts(self, rows: int, columns: int) -> Shapes:
        """Give the parts of a matrix; see the class."""
        if columns % GROUP:
            raise UnsupportedModelError(
                f"experts with {columns} inputs cannot be stored as mxfp4, because that is no "
                f"multiple of {GROUP}; choose int4 or int8"
            )
        return {
            "codes": ((rows, columns // 2), torch.uint8),
            "scales": ((rows, columns // GROUP), torch.uint8),
        }

    def encode_matrix(self, weights: Tensor) -> dict[str, Tensor]:
        """Round *weights* by the standard's rule: the largest of a group gives its exponent."""
        if not bool(weights.isfinite().all()):
            raise AttachError(
                "a weight is not finite, so mxfp4 cannot hold it; serve this model without a format"
            )
        groups = weights.unflatten(1, (-1, GROUP))
        _, exponent = torch.frexp(groups.abs().amax(dim=2))  # amax = m * 2**exponent, .5 <= m < 1
        exponent = (exponent - 3).clamp(-_BIAS, _BIAS)
        scaled = torch.ldexp(groups, -exponent[..., None]).flatten(1)
        levels = torch.tensor(E2M1[:8], device=weights.device)
        middle = (levels[1:] + levels[:-1]) / 2
        # In the middle of two levels the even code wins, as in IEEE arithmetic.
        magnitude = scaled.abs()
        codes = torch.bucketize(magnitude, middle)
        tie = magnitude == middle[codes.clamp(max=6)]
        codes = codes + (tie & (codes % 2 == 1))
        codes = codes | (scaled < 0).to(codes.dtype) << 3
        return {
            "codes": pack_pairs(codes.to(torch.uint8)),
            "scales": (exponent + _BIAS).to(torch.uint8),
        }

    def decode_matrix(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Compute level times power of two, exactly."""
        codes = parts["codes"]
        levels = torch.tensor(E2M1, device=codes.device)
        levels = levels[torch.stack([codes & 15, codes >> 4], dim=-1).int()]
        exponent = parts["scales"].int()[..., None] - _BIAS
        return torch.ldexp(levels.reshape(rows, -1, GROUP), exponent).reshape(rows, columns)
