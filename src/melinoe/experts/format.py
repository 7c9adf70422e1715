"""
The contract for how an expert is stored: one block of bytes, alike on disk, in memory and in slots.

An expert is a few tensors of its module (`gate_up_proj`, `down_proj`, biases). A format says of
which parts its block consists, makes the parts from the tensors, and defines which tensors the
parts mean. A new format is one file with a subclass of `PackedFormat`, and a line in `FORMATS`.

In a packed block each matrix lies by rows of its output, neighbours of a row beside each other,
whatever its module's orientation; its scales lie by row and group. Biases stay as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from melinoe.errors import UnsupportedModelError

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each part of a matrix, by what it holds: codes, scales, ..."""


@dataclass(frozen=True)
class Part:
    """
    One tensor of one expert: of its module, by the parameter's *name*, or of its packed block,
    where what the part holds follows, as in ``down_proj.codes``; *transposed* where the module
    stores the matrix as ``(in, out)``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of it in one expert."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_matrix(self) -> bool:
        """Whether it is a projection, which formats pack; a bias is not."""
        return len(self.shape) == 2

    @property
    def rows_columns(self) -> tuple[int, int]:
        """Outputs and inputs of a matrix, whichever way its module stores it."""
        first, second = self.shape
        return (second, first) if self.transposed else (first, second)


class ExpertFormat(ABC):
    """
    One way to store an expert; *name* as users write it. *exact*: a block holds the module's
    tensors as they are, so that transformers' own functions compute from slots.
    """

    name: str
    exact: bool = False

    @abstractmethod
    def parts(self, tensors: Sequence[Part]) -> tuple[Part, ...]:
        """List the parts of an expert's block; UnsupportedModelError: a shape it cannot hold."""

    @abstractmethod
    def encode(self, tensors: Sequence[Part], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the parts of one expert on the CPU; AttachError: a weight it cannot hold."""

    @abstractmethod
    def decode(self, tensors: Sequence[Part], block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weights that a block means: matrices in float32, biases as they are."""

    def block_bytes(self, tensors: Sequence[Part]) -> int:
        """Bytes of one expert's block, without padding between its parts."""
        return sum(part.nbytes for part in self.parts(tensors))

    def bits_per_weight(self, tensors: Sequence[Part]) -> float:
        """Bits of a block per weight of its expert, scales and biases included."""
        return 8 * self.block_bytes(tensors) / sum(math.prod(t.shape) for t in tensors)


@dataclass(frozen=True)
class Arithmetic:
    """
    How compiled products read a packed matrix.

    *codes*: ``uint4``, ``e2m1`` or ``levels``, two to a byte; ``uint8`` or ``e4m3``. *group*:
    neighbours of a row that share a scale and an offset. *offset*: ``none``; ``minimum``, which is
    added; ``zero``, which is taken off the code; or ``symmetric``: half the codes is taken off.
    Rows and groups may share scales.
    """

    codes: str
    group: int
    offset: str = "none"
    rows_per_scale: int = 1
    groups_per_scale: int = 1


class PackedFormat(ExpertFormat):
    """A format that packs each matrix by itself, given as ``(out, in)``, and keeps biases."""

    @abstractmethod
    def arithmetic(self, columns: int) -> Arithmetic:
        """How products read a matrix whose rows have so many *columns*."""

    @abstractmethod
    def matrix_parts(self, rows: int, columns: int) -> Shapes:
        """Give the parts of a matrix ``(rows, columns)``."""

    @abstractmethod
    def encode_matrix(self, weights: Tensor) -> dict[str, Tensor]:
        """Make the parts of float32 *weights* ``(rows, columns)``."""

    @abstractmethod
    def decode_matrix(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Compute the float32 weights ``(rows, columns)`` that *parts* mean."""

    def parts(self, tensors: Sequence[Part]) -> tuple[Part, ...]:
        """Pack matrices, and keep biases."""
        found: list[Part] = []
        for tensor in tensors:
            if not tensor.is_matrix:
                found.append(tensor)
                continue
            made = self.matrix_parts(*tensor.rows_columns)
            found += [Part(f"{tensor.name}.{kind}", *what) for kind, what in made.items()]
        return tuple(found)

    def encode(self, tensors: Sequence[Part], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pack each matrix as ``(out, in)``."""
        block: dict[str, Tensor] = {}
        for tensor in tensors:
            values = weights[tensor.name].detach()
            if not tensor.is_matrix:
                block[tensor.name] = values
                continue
            matrix = values.T if tensor.transposed else values
            made = self.encode_matrix(matrix.float().contiguous())
            block |= {f"{tensor.name}.{kind}": part for kind, part in made.items()}
        return block

    def decode(self, tensors: Sequence[Part], block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn each matrix as its module has it."""
        weights: dict[str, Tensor] = {}
        for tensor in tensors:
            if not tensor.is_matrix:
                weights[tensor.name] = block[tensor.name]
                continue
            rows, columns = tensor.rows_columns
            kinds = self.matrix_parts(rows, columns)
            own = {kind: block[f"{tensor.name}.{kind}"] for kind in kinds}
            matrix = self.decode_matrix(own, rows, columns)
            weights[tensor.name] = matrix.T if tensor.transposed else matrix
        return weights


class Plain(ExpertFormat):
    """The module's own tensors, in 16 or 32 bits, as they are."""

    name = "plain"
    exact = True

    def parts(self, tensors: Sequence[Part]) -> tuple[Part, ...]:
        """Return *tensors* themselves."""
        return tuple(tensors)

    def encode(self, tensors: Sequence[Part], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return *weights* themselves."""
        return {tensor.name: weights[tensor.name].detach() for tensor in tensors}

    def decode(self, tensors: Sequence[Part], block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the block's tensors, matrices in float32."""
        return {t.name: block[t.name].float() if t.is_matrix else block[t.name] for t in tensors}


PLAIN = Plain()


def groups_of(columns: int, group: int | None) -> int:
    """
    Give the number of neighbours of a row that share a scale: at most *group*, and no rest.
    UnsupportedModelError: rows that cannot be cut into groups of 8 or more.
    """
    size = columns if group is None else math.gcd(columns, group)
    if size % 8:
        raise UnsupportedModelError(
            f"experts with {columns} inputs cannot be packed, because that is no multiple of 8; "
            "serve this model without a format"
        )
    return size
