"""
Find where each expert's weights lie in a checkpoint, and read one expert alone.

The hub keeps one tensor per expert and projection; the model stacks all experts of a layer.
transformers converts one into the other by rules (`conversion_mapping`), a whole layer at a time.
Here the same rules are applied to one expert. The first of three readers that reproduces
transformers is taken:

    Stacked     the parameter is stored as it is: expert e is a range of its bytes
    Rows        one tensor per expert, one above the other: each is read straight into its rows;
                recognised by the rule's name, or by running the rule on small stand-ins
    OneExpert   any other rule that treats all experts alike: run it on expert e's tensors
"""

import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
)

from melinoe.checkpoint.mapping import Group
from melinoe.checkpoint.packed import PackedPlace, Weights
from melinoe.checkpoint.safetensors_file import describe_shape
from melinoe.errors import CheckpointError, UnsupportedModelError
from melinoe.experts.format import PLAIN, ExpertFormat
from melinoe.experts.fp8 import BLOCK
from melinoe.moe.experts import ExpertsLayer


class Piece(NamedTuple):
    """Map rows of one expert's part of a parameter to the stored elements that they are."""

    place: Weights
    first: int  # of the stored elements, counted in row-major order
    row: int
    rows: int


class Reader(Protocol):
    """Read one expert's part of one parameter."""

    def read(self, expert: int, into: Tensor) -> None:
        """Fill *into*, shaped like the parameter without its leading E."""

    def pieces(self, expert: int) -> list[Piece] | None:
        """Name the stored elements that each row is; None where a rule computes them."""

    def places(self) -> list[Weights]:
        """List all stored weights that the parameter is made of."""


class Stacked:
    """Read a parameter that is stored as it is: expert e is a range of its bytes."""

    def __init__(self, place: Weights) -> None:
        self.place = place
        self._size = prod(place.info.shape[1:])
        self._rows = place.info.shape[1] if len(place.info.shape) > 1 else 0

    def places(self) -> list[Weights]:
        """Return the one stored tensor."""
        return [self.place]

    def pieces(self, expert: int) -> list[Piece]:
        """Return the expert's range of the one stored tensor."""
        return [Piece(self.place, expert * self._size, 0, self._rows)]

    def read(self, expert: int, into: Tensor) -> None:
        """Read that range."""
        self.place.read(into, expert * self._size)


class Rows:
    """Read one tensor per expert and projection, one above the other."""

    def __init__(self, parts: Sequence[Sequence[Weights]]) -> None:
        self.parts = parts

    def places(self) -> list[Weights]:
        """Return the tensors of all experts and projections."""
        return [place for part in self.parts for place in part]

    def pieces(self, expert: int) -> list[Piece]:
        """Return the expert's tensor of each projection, from the top."""
        found, row = [], 0
        for part in self.parts:
            found.append(Piece(part[expert], 0, row, rows := part[expert].info.shape[0]))
            row += rows
        return found

    def read(self, expert: int, into: Tensor) -> None:
        """Read each projection into its rows."""
        for place, first, row, rows in self.pieces(expert):
            place.read(into.narrow(0, row, rows), first)


class OneExpert:
    """Run transformers' own rule on the tensors of one expert."""

    def __init__(self, group: Group, parameter: str, shape: Sequence[int], config: Any) -> None:
        self.group, self.parameter, self.shape, self.config = group, parameter, shape, config
        self.listed = isinstance(group.operations[0], MergeModulelist)

    def pieces(self, expert: int) -> None:
        """Return nothing: a rule computes the rows."""

    def places(self) -> list[Weights]:
        """Return all stored tensors of the rule."""
        return self.group.places

    def sources(self, expert: int) -> dict[str, tuple[Weights, int]]:
        """Locate the expert's stored tensor of each source pattern: place and first element."""
        return {
            pattern: (places[expert], 0)
            if self.listed
            else (places[0], expert * prod(places[0].info.shape[1:]))
            for pattern, places in self.group.tensors.items()
        }

    def convert(self, pieces: dict[str, Tensor]) -> Tensor:
        """Make the expert's part ``(1, ...)`` of one tensor for each source pattern."""
        shapes = {self.parameter: (1, *self.shape[1:])}
        lists = {pattern: [piece] for pattern, piece in pieces.items()}
        return self.group.convert(lists, shapes, self.config)[self.parameter]

    def empty(self, device: str) -> dict[str, Tensor]:
        """Make tensors for one expert's stored numbers, by source pattern."""
        found = {}
        for pattern, (place, _) in self.sources(0).items():
            shape = place.info.shape if self.listed else (1, *place.info.shape[1:])
            found[pattern] = torch.empty(shape, dtype=place.info.dtype, device=device)
        return found

    def shape_made(self) -> tuple[int, ...] | None:
        """Run the rule on the meta device, and return the shape; None where it fails."""
        try:
            return tuple(self.convert(self.empty("meta")).shape)
        except Exception:  # whatever a rule trips over whose tensors do not fit
            return None

    def read(self, expert: int, into: Tensor) -> None:
        """Read the expert's tensors and run the rule on them."""
        pieces = self.empty("cpu")
        for pattern, (place, first) in self.sources(expert).items():
            place.read(pieces[pattern], first)
        into.copy_(self.convert(pieces)[0])


def reader_for(
    group: Group, parameter: str, shapes: dict[str, tuple[int, ...]], config: Any
) -> Reader:
    """
    Choose the cheapest reader that gives what transformers would; check shapes, read nothing.

    Args:
        group: The stored tensors and their rule.
        parameter: Full name of the parameter to read, one of ``group.targets``.
        shapes: Full shapes ``(E, ...)`` of the model's experts' parameters, by full name.
        config: The model's config, which some rules look into.

    Raises:
        CheckpointError: tensors of some experts are missing, or have another shape.
        UnsupportedModelError: the rule mixes experts, so that none can be read alone.
    """
    shape, places, operations = shapes[parameter], group.places, group.operations
    if group.is_stored_as(shape):
        if len(places) != 1 or places[0].info.shape != shape:
            raise _mismatch(parameter, shape, places[0])
        return Stacked(places[0])
    patterns = [] if group.converter is None else group.converter.source_patterns
    if isinstance(operations[0], MergeModulelist):
        expected = shape[0] if len(group.targets) == 1 else None
        check_complete(group.tensors, patterns, parameter, expected)
    if len(group.targets) == 1 and _treats_experts_alike(group, shape[0]):
        parts = [group.tensors[p] for p in patterns if p in group.tensors]
        if _stacks_rows(operations) and _rows_fit(parts, shape):
            return Rows(parts)
        one = OneExpert(group, parameter, shape, config)
        if one.shape_made() != (1, *shape[1:]):
            raise _mismatch(parameter, shape, places[0])
        for part in parts:  # the rule was tried on expert 0; the others must look the same
            for place in part:
                if place.info.shape != part[0].info.shape:
                    raise _mismatch(place.name, part[0].info.shape, place)
        return one
    found = rows_by_trial(
        group.tensors, parameter, shape[0], lambda pieces: group.convert(pieces, shapes, config)
    )
    if found is None:
        raise UnsupportedModelError(
            f"the stored tensors of {parameter} (first {places[0].name}) can only be converted all "
            "at once, so no expert can be read alone; load the model with from_pretrained and use "
            "melinoe.attach"
        )
    if not _rows_fit(found, shape):
        raise _mismatch(parameter, shape, places[0])
    return Rows(found)


def _stacks_rows(operations: list) -> bool:
    """Whether a rule stacks the experts, and at most puts projections one above the other."""
    kinds = [(type(op), getattr(op, "dim", None)) for op in operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _rows_fit(parts: list[list[Weights]], shape: tuple[int, ...]) -> bool:
    """Whether all experts' tensors have the same shapes, and together the parameter's."""
    first = [part[0].info.shape for part in parts]
    same = all(place.info.shape == part[0].info.shape for part in parts for place in part)
    rows = sum(s[0] for s in first if s)
    return same and all(s[1:] == shape[2:] for s in first) and rows == prod(shape[1:2])


def _treats_experts_alike(group: Group, num_experts: int) -> bool:
    """Whether the rule computes each expert from its own tensors only."""
    operations = group.operations
    first = operations[0]
    if isinstance(first, MergeModulelist):
        if first.dim != 0:
            return False
        operations = operations[1:]
    elif any(len(t) != 1 or t[0].info.shape[:1] != (num_experts,) for t in group.tensors.values()):
        return False
    return all(
        (type(op) in (Concatenate, Interleave) and op.dim >= 1)
        or (type(op) is Transpose and min(op.dim0, op.dim1) >= 1)
        for op in operations
    )


class ExpertSource:
    """
    Read one MoE layer of a checkpoint expert by expert.

    Args:
        layer: What the layer's experts consist of; its module is on the meta device.
        readers: Parameter name -> reader.

    Attributes:
        format: How the checkpoint stores an expert.

    Raises:
        UnsupportedModelError: some of an expert's matrices are packed otherwise than others, or
            not by rows of the model's own.
    """

    def __init__(self, layer: ExpertsLayer, readers: dict[str, Reader]) -> None:
        self.layer, self.readers = layer, readers
        self.format = _stored_format(layer, readers)

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.layer.num_experts

    def read(self, expert: int, into: Mapping[str, Tensor]) -> None:
        """
        Read one expert straight from the shards; decode it if it is packed.

        Args:
            expert: In ``[0, num_experts)``.
            into: Parameter name -> tensor shaped like the parameter without its leading E;
                every parameter must be there. Converted where types or devices differ.

        Raises:
            CheckpointError: a shard was changed since it was opened, or the disk fails.
        """
        self._check(expert)
        for name, reader in self.readers.items():
            reader.read(expert, into[name])

    def read_block(self, expert: int, format: ExpertFormat, into: Mapping[str, Tensor]) -> None:
        """
        Read one expert as a block of *format*.

        In the format of the checkpoint the parts go straight from the shards; in another packed one
        the expert is decoded, and encoded again.

        Args:
            expert: In ``[0, num_experts)``.
            format: `PLAIN` gives the expert's tensors, as `read`.
            into: Part name -> tensor, as ``format.parts(layer.tensors)`` lists them.

        Raises:
            CheckpointError: as `read`.
            AttachError: a weight that *format* cannot hold.
        """
        self._check(expert)
        if format.exact:
            self.read(expert, into)
            return
        if format != self.format:
            plain = {
                t.name: torch.empty(t.shape, dtype=t.dtype, device="cpu")
                for t in self.layer.tensors
            }
            self.read(expert, plain)
            for name, part in format.encode(self.layer.tensors, plain).items():
                into[name].copy_(part)
            return
        for tensor in self.layer.tensors:
            reader = self.readers[tensor.name]
            if not tensor.is_matrix:
                reader.read(expert, into[tensor.name])
                continue
            for place, first, row, rows in reader.pieces(expert) or ():
                assert isinstance(place, PackedPlace)
                parts = {}
                for kind in place.format.matrix_parts(place.rows, place.columns):
                    part = into[f"{tensor.name}.{kind}"]
                    # A row of the part belongs to so many of the matrix.
                    step = tensor.rows_columns[0] // len(part)
                    whole = rows == tensor.shape[0]
                    parts[kind] = part if whole else part[row // step : (row + rows) // step]
                place.read_parts(parts, first // (place.rows * place.columns))

    def _check(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert {expert} of a layer with {self.num_experts}")


def _stored_format(layer: ExpertsLayer, readers: dict[str, Reader]) -> ExpertFormat:
    """Find out how a layer's experts are stored: plain, or all matrices in one packed format."""
    found: dict[Any, str] = {}
    for tensor in layer.tensors:
        name = f"{layer.name}.{tensor.name}"
        places = readers[tensor.name].places()
        packed = [place for place in places if isinstance(place, PackedPlace)]
        if not packed:
            if tensor.is_matrix:
                found[PLAIN] = name
            continue
        pieces = readers[tensor.name].pieces(0)
        if pieces is None or any(place.transposed != tensor.transposed for place in packed):
            raise UnsupportedModelError(
                f"{name} is stored packed ({packed[0].format.name}) in rows that the model "
                "rearranges, which is not read here; take a checkpoint that is not quantised"
            )
        if len(pieces) > 1 and packed[0].format.name == "fp8" and packed[0].rows % BLOCK:
            raise UnsupportedModelError(
                f"{name} consists of matrices with {packed[0].rows} outputs, whose scales do not "
                f"join in blocks of {BLOCK}; take a checkpoint that is not quantised"
            )
        found |= {place.format: name for place in packed}
        if len(packed) < len(places):
            found[PLAIN] = name
    if len(found) > 1:
        names = " and ".join(f"{format.name} ({name})" for format, name in found.items())
        raise UnsupportedModelError(
            f"experts of one layer are stored in different formats, {names}, which is not read "
            "here; take another checkpoint of the model"
        )
    return next(iter(found), PLAIN)


# --- a rule's effect on one expert, found by running it on stand-ins -----------------------------

Run = Callable[[dict[str, list[Tensor]]], Mapping[str, Tensor]]


def rows_by_trial(
    tensors: Mapping[str, Sequence[Weights]], parameter: str, num_experts: int, run: Run
) -> list[list[Weights]] | None:
    """
    Find out whether a rule only puts stored tensors one above the other, by running it.

    Some rules treat all experts of a layer at once, and their code does not say what becomes of
    one expert. So each stored tensor is given a small stand-in whose every number occurs once, the
    rule *run* is run on those, and the numbers are looked up in the *parameter* that it makes.

    Returns for each position in an expert the tensors of all experts in order; None where the rule
    does anything else, or cannot be run on stand-ins.
    """
    stand_ins, owner = _stand_ins(tensors)
    try:
        made = run(stand_ins)[parameter]
    except Exception:  # whatever a rule trips over that looks at sizes
        return None
    if made.dtype != torch.int64 or made.dim() < 2 or made.shape[0] != num_experts:
        return None
    found: list[list[Weights]] = []
    for expert in made:
        parts, row = [], 0
        while row < expert.shape[0]:
            place, piece = owner.get(int(expert[row].reshape(-1)[0]), (None, None))
            if place is None or piece is None:
                return None
            rows = piece.shape[0]
            if not torch.equal(expert[row : row + rows], piece):
                return None
            parts.append(place)
            row += rows
        found.append(parts)
    if len({len(parts) for parts in found}) != 1:
        return None
    return [list(parts) for parts in zip(*found, strict=True)]


def _stand_ins(
    tensors: Mapping[str, Sequence[Weights]],
) -> tuple[dict[str, list[Tensor]], dict[int, tuple[Weights, Tensor]]]:
    """Make small tensors of unique numbers, and note the owner of each first number."""
    sizes = sorted({n for places in tensors.values() for p in places for n in p.info.shape})
    # Sizes that were different stay different, and even: rules halve.
    small = {size: 2 * rank for rank, size in enumerate(sizes, start=1)}
    stand_ins: dict[str, list[Tensor]] = {}
    owner: dict[int, tuple[Weights, Tensor]] = {}
    following = 0
    for pattern, places in tensors.items():
        stand_ins[pattern] = []
        for place in places:
            shape = [small[n] for n in place.info.shape]
            piece = torch.arange(following, following + prod(shape), device="cpu").reshape(shape)
            stand_ins[pattern].append(piece)
            if piece.dim():
                owner[following] = (place, piece)
            following += piece.numel()
    return stand_ins, owner


# --- whether the stored tensors are all there, and of the right shapes ----------------------------

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_complete(
    tensors: Mapping[str, Sequence[Weights]],
    patterns: Sequence[str],
    parameter: str,
    expected: int | None,
) -> None:
    """
    Check that every source pattern of a rule has one tensor for each expert, 0 to the last.

    Args:
        tensors: Source pattern -> stored tensors.
        patterns: All source patterns of the rule.
        parameter: What the rule makes, for messages.
        expected: Experts; None where the rule makes several parameters of one list.
    """
    for pattern in patterns:
        places = tensors.get(pattern, ())
        found = len(places)
        needs = (
            f"{parameter} needs {expected or 'its'} tensors {pattern} and the checkpoint has "
            f"{found or 'none'}"
        )
        if expected is not None and found > expected:
            raise CheckpointError(
                f"{needs}; the weights are of another model than the config, use one model's"
            )
        if found == 0 or (expected is not None and found < expected):
            raise CheckpointError(
                f"{needs}; a shard or a part of its index is missing, download it again"
            )
        in_names = [_NUMBER.findall(place.name) for place in places]
        if ".*." not in pattern or not all(in_names):
            continue
        numbers = [int(one[-1]) for one in in_names]
        if numbers != list(range(found)):
            raise CheckpointError(
                f"{needs}, but has them for experts {', '.join(map(str, numbers))}; a shard or a "
                "part of its index is missing, download it again"
            )


def _mismatch(parameter: str, shape: tuple[int, ...], place: Weights) -> CheckpointError:
    return CheckpointError(
        f"{place.name} has shape {describe_shape(place.info.shape)}, which does not fit "
        f"{parameter} of shape {describe_shape(shape)}; the weights are of another model than "
        "the config"
    )
