"""
FP8 as Qwen3 and DeepSeek store it: e4m3, one float32 scale for each square of 128 x 128 weights.

Source:
    `transformers.integrations.finegrained_fp8`, whose quantising and dequantising this repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from melinoe.errors import AttachError
from melinoe.experts.format import Arithmetic, PackedFormat, Shapes, groups_of

BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Fp8(PackedFormat):
    """
    Floats of 8 bits (e4m3), and a float32 scale for each square of weights.

    Parts of a matrix ``(rows, columns)``:

    - ``codes``: float8_e4m3fn ``(rows, columns)``.
    - ``scales``: float32, one for each started square: ``(ceil(rows / 128), ceil(columns / 128))``.
      A weight is its code times the scale, which checkpoints call ``weight_scale_inv``.

    Args:
        rows: Rows that share a scale. A divisor of 128 where matrices stored apart become one, and
            a square ends between them.
    """

    rows: int = BLOCK
    name = "fp8"

    def arithmetic(self, columns: int) -> Arithmetic:
        """How products read a matrix."""
        group = groups_of(columns, BLOCK)
        return Arithmetic("e4m3", group, "none", self.rows, BLOCK // group)

    def matrix_parts(self, rows: int, columns: int) -> Shapes:
        """Give the parts of a matrix; see the class."""
        groups_of(columns, BLOCK)  # refuses rows that the arithmetic could not cut
        return {
            "codes": ((rows, columns), torch.float8_e4m3fn),
            "scales": ((-(-rows // self.rows), -(-columns // BLOCK)), torch.float32),
        }

    def encode_matrix(self, weights: Tensor) -> dict[str, Tensor]:
        """Scale each square so that its largest weight becomes the largest code, and round."""
        if not bool(weights.isfinite().all()):
            raise AttachError(
                "a weight is not finite, so fp8 cannot hold it; serve this model without a format"
            )
        rows, columns = weights.shape
        whole = pad(weights, (0, -columns % BLOCK, 0, -rows % self.rows))
        squares = whole.unflatten(0, (-1, self.rows)).unflatten(2, (-1, BLOCK))
        largest = squares.abs().amax(dim=(1, 3))
        factor = torch.where(largest > 0, _LARGEST / largest, 1.0)
        factor = factor.clamp(max=torch.finfo(torch.float32).max)  # of the smallest weights
        scaled = (squares * factor[:, None, :, None]).clamp(-_LARGEST, _LARGEST)
        codes = scaled.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
        return {"codes": codes.to(torch.float8_e4m3fn), "scales": 1.0 / factor}

    def decode_matrix(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Compute code times scale in float32."""
        scale = parts["scales"].repeat_interleave(self.rows, 0)[:rows]
        return parts["codes"].float() * scale.repeat_interleave(BLOCK, 1)[:, :columns]
