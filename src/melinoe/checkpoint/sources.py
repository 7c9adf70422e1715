"""
Find where each expert's weights lie in a checkpoint, and read one expert alone.

The hub keeps one tensor per expert and projection; the model stacks all experts of a layer.
transformers converts one into the other by rules (`conversion_mapping`), a whole layer at a time.
Here the same rules are applied to one expert: stored tensors that lie one above the other in the
parameter are read straight into their rows (`Reader`); any other rule that treats all experts
alike is run on the expert's tensors (`Converted`).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from functools import reduce
from math import gcd, prod
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from melinoe.checkpoint.packed import PackedPlace, Weights
from melinoe.checkpoint.safetensors_file import Place, bytes_of, describe_shape
from melinoe.errors import CheckpointError, UnsupportedModelError
from melinoe.experts.format import PLAIN, ExpertFormat
from melinoe.experts.fp8 import BLOCK, Fp8
from melinoe.moe.experts import PLAIN_DTYPES, ExpertsLayer

# --- stored tensors by the parameter that they belong to ------------------------------------------


class Group(NamedTuple):
    """Hold the stored tensors that one rule turns into one or more parameters of the model."""

    target: str  # the first of the parameters, by its full name in the model
    targets: tuple[str, ...]
    converter: WeightConverter | None  # None: a renaming at most
    tensors: dict[str, list[Weights]]  # source pattern -> tensors, in transformers' order

    @property
    def places(self) -> list[Weights]:
        """List all stored tensors of the group."""
        return [place for part in self.tensors.values() for place in part]

    @property
    def operations(self) -> list:
        """List the steps of the rule."""
        return [] if self.converter is None else list(self.converter.operations)

    def is_stored_as(self, shape: tuple[int, ...]) -> bool:
        """Whether the one stored tensor is the parameter, which has this *shape*."""
        operations = self.operations
        if len(operations) == 1 and getattr(operations[0], "check_dims", False):
            # A transposition that leaves a tensor of the right shape alone.
            return self.places[0].info.shape == shape
        return not operations

    def convert(
        self, pieces: dict[str, list[Tensor]], shapes: dict[str, tuple[int, ...]], config: Any
    ) -> dict[str, Tensor]:
        """Run the rule on *pieces*, tensors by source pattern; return tensors by parameter."""
        converter: Any = deepcopy(self.converter)
        for pattern, tensors in pieces.items():
            for tensor in tensors:
                converter.add_tensor(self.target, pattern, pattern, tensor)
        made = converter.convert(self.target, model=_Shapes(shapes), config=config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


class _Shapes(NamedTuple):
    """Stand in for the model where a rule asks it for a parameter's shape."""

    shapes: dict[str, tuple[int, ...]]

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")


def group_by_parameter(model: Any, places: Mapping[str, Weights]) -> dict[str, Group]:
    """
    Find the stored tensors of each parameter, by transformers' renamings and rules.

    The key is the first parameter that a rule makes; names that the model does not know are kept.
    CheckpointError where two stored tensors are the same parameter.

    Source:
        `convert_and_load_state_dict_in_model` of transformers 5.23, whose order of tensors within
        a group and whose second try without renaming are kept.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = model.state_dict()
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    for key in sorted(places, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if target not in known and key in known:
            target, pattern = rename_source_key(key, [], [], prefix, known)
        rule = None if pattern is None else rule_of[pattern]
        if target not in groups:
            targets: tuple[str, ...] = (target,)
            if rule is not None and len(rule.target_patterns) > 1:
                first = rule.target_patterns[0]
                targets = tuple(target.replace(first, one, 1) for one in rule.target_patterns)
            groups[target] = Group(target, targets, rule, {})
        tensors = groups[target].tensors
        tensors.setdefault(pattern or key, []).append(places[key])
        if len(tensors) > 1 and rule is None:
            raise CheckpointError(
                f"the stored tensors {next(iter(tensors))} and {key} are both the model's "
                f"{target}; delete the one that is not meant, or download the checkpoint again"
            )
    return groups


def refuse_integers(model: Any, groups: dict[str, Group]) -> None:
    """Refuse weights of types that only mean something together with scales."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    used = [group for group in groups.values() if not parameters.keys().isdisjoint(group.targets)]
    for place in [place for group in used for place in group.places]:
        if place.info.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"{place.name} is stored as {str(place.info.dtype).removeprefix('torch.')}, which "
                "means something only with scales, and the checkpoint has none for it; download it "
                "again, or take one that is not quantised"
            )


def split(
    groups: dict[str, Group], experts: Collection[str]
) -> tuple[dict[str, Group], list[Weights]]:
    """Part the groups of *experts*, names of parameters, from the places of the backbone."""
    wanted = set(experts)
    of_expert: dict[str, Group] = {}
    backbone: list[Weights] = []
    for group in groups.values():
        hits = wanted.intersection(group.targets)
        if not hits:
            backbone += group.places
        elif len(hits) < len(group.targets):
            raise UnsupportedModelError(
                f"this family's checkpoint keeps {sorted(hits)[0]} together with weights that are "
                "no experts, so its experts cannot be read alone; load it with from_pretrained and "
                "use melinoe.attach"
            )
        else:
            of_expert |= dict.fromkeys(hits, group)
    return of_expert, backbone


# --- one expert's part of a parameter -------------------------------------------------------------


class Piece(NamedTuple):
    """Map rows of one expert's part of a parameter to the stored elements that they are."""

    place: Weights
    first: int  # of the stored elements, counted in row-major order
    row: int
    rows: int


class Reader:
    """
    Read one expert's part of a parameter whose rows are stored as they are. *parts* are, from the
    top of the parameter, the stored tensors of all experts, one each; or if *stacked* one stored
    tensor, the parameter itself.
    """

    def __init__(self, parts: Sequence[Sequence[Weights]], stacked: bool = False) -> None:
        self.parts, self.stacked = parts, stacked

    def places(self) -> list[Weights]:
        """List all stored weights that the parameter is made of."""
        return [place for part in self.parts for place in part]

    def pieces(self, expert: int) -> list[Piece] | None:
        """Name the stored elements that each row is; None where a rule computes them."""
        if self.stacked:
            place = self.parts[0][0]
            _, *own = place.info.shape
            return [Piece(place, expert * prod(own), 0, own[0] if own else 0)]
        found, row = [], 0
        for part in self.parts:
            found.append(Piece(part[expert], 0, row, rows := part[expert].info.shape[0]))
            row += rows
        return found

    def read(self, expert: int, into: Tensor) -> None:
        """Fill *into*, shaped like the parameter without its leading E."""
        for place, first, row, rows in self.pieces(expert) or ():
            place.read(into.narrow(0, row, rows) if into.dim() else into, first)


class Converted(Reader):
    """Run transformers' own rule on one expert's share of stored tensors ``(E, ...)``."""

    def __init__(self, group: Group, parameter: str, shape: Sequence[int], config: Any) -> None:
        super().__init__([group.places])
        self.group, self.parameter, self.shape, self.config = group, parameter, shape, config

    def pieces(self, expert: int) -> None:
        """Return nothing: a rule computes the rows."""

    def read(self, expert: int, into: Tensor) -> None:
        """Read the expert's share and run the rule on it."""
        shares = self._shares("cpu")
        for (share,), (place,) in zip(shares.values(), self.group.tensors.values(), strict=True):
            place.read(share, expert * share.numel())
        into.copy_(self._convert(shares)[0])

    def shape_made(self) -> tuple[int, ...] | None:
        """Run the rule on the meta device, and return the shape; None where it fails."""
        try:
            return tuple(self._convert(self._shares("meta")).shape)
        except Exception:  # whatever a rule trips over whose tensors do not fit
            return None

    def _shares(self, device: str) -> dict[str, list[Tensor]]:
        """Make tensors for one expert's stored numbers, by source pattern."""
        return {
            pattern: [torch.empty((1, *p.info.shape[1:]), dtype=p.info.dtype, device=device)]
            for pattern, (p,) in self.group.tensors.items()
        }

    def _convert(self, shares: dict[str, list[Tensor]]) -> Tensor:
        shapes = {self.parameter: (1, *self.shape[1:])}
        return self.group.convert(shares, shapes, self.config)[self.parameter]


# Rules by which one tensor for each expert is stacked, projections one above the other.
_STACKS = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def reader_for(group: Group, parameter: str, shape: tuple[int, ...], config: Any) -> Reader:
    """
    Choose the cheapest reader that gives *parameter*, ``(E, ...)``, as transformers would.
    CheckpointError: tensors of some experts are missing, or have another shape;
    UnsupportedModelError: the rule mixes experts, so that none can be read alone.
    """
    places, operations = group.places, group.operations
    odd = None
    if group.is_stored_as(shape):
        if len(places) == 1 and places[0].info.shape == shape:
            return Reader([places], stacked=True)
        odd = places[0]
    elif [(type(op), getattr(op, "dim", None)) for op in operations] in _STACKS:
        assert group.converter is not None
        _check_complete(group, parameter, shape[0])
        parts = [group.tensors[pattern] for pattern in group.converter.source_patterns]
        first = [part[0].info.shape for part in parts]
        unlike = [p for part in parts for p in part if p.info.shape != part[0].info.shape]
        rows = sum(one[0] for one in first if one)
        if not unlike and all(s[1:] == shape[2:] for s in first) and rows == prod(shape[1:2]):
            return Reader(parts)
        odd = (unlike or places)[0]
    elif len(group.targets) == 1 and all(
        len(part) == 1 and part[0].info.shape[:1] == shape[:1] for part in group.tensors.values()
    ) and all(
        (type(op) in (Concatenate, Interleave) and op.dim >= 1)
        or (type(op) is Transpose and min(op.dim0, op.dim1) >= 1)
        for op in operations
    ):  # fmt: skip
        one = Converted(group, parameter, shape, config)
        if one.shape_made() == (1, *shape[1:]):
            return one
        odd = places[0]
    if odd is None:
        raise UnsupportedModelError(
            f"the stored tensors of {parameter} (first {places[0].name}) can only be converted all "
            "at once, so no expert can be read alone; load the model with from_pretrained and use "
            "melinoe.attach"
        )
    raise CheckpointError(
        f"{odd.name} has shape {describe_shape(odd.info.shape)}, which does not fit {parameter} of "
        f"shape {describe_shape(shape)}; the weights are of another model than the config"
    )


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _check_complete(group: Group, parameter: str, expected: int) -> None:
    """Check that every source pattern of a rule has one tensor for each expert, 0 to the last."""
    assert group.converter is not None
    for pattern in group.converter.source_patterns:
        places = group.tensors.get(pattern, ())
        needs = (
            f"{parameter} needs {expected} tensors {pattern} and the checkpoint has "
            f"{len(places) or 'none'}"
        )
        again = "a shard or a part of its index is missing, download it again"
        if len(places) > expected:
            raise CheckpointError(
                f"{needs}; the weights are of another model than the config, use one model's"
            )
        if len(places) < expected:
            raise CheckpointError(f"{needs}; {again}")
        in_names = [_NUMBER.findall(place.name) for place in places]
        if ".*." in pattern and all(in_names):
            numbers = [int(one[-1]) for one in in_names]
            if numbers != list(range(expected)):
                has = ", ".join(map(str, numbers))
                raise CheckpointError(f"{needs}, but has them for experts {has}; {again}")


# --- one layer ------------------------------------------------------------------------------------


class ExpertSource:
    """
    Read one MoE layer of a checkpoint expert by expert; *format* is how it stores them.

    Where *sums* are stored, an expert's block is compared with its own when it is first read.
    UnsupportedModelError where some of an expert's matrices are packed otherwise than others, or
    not by rows of the model's own.
    """

    def __init__(
        self, layer: ExpertsLayer, readers: dict[str, Reader], sums: Place | None = None
    ) -> None:
        self.layer, self.readers = layer, readers
        self.format = _stored_format(layer, readers)
        self._sums = sums
        self._known = bytearray(layer.num_experts)  # whether a block was compared

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.layer.num_experts

    def read(self, expert: int, into: Mapping[str, Tensor]) -> None:
        """
        Read one expert as plain weights, by parameter name, into tensors of any type or device.
        """
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert {expert} of a layer with {self.num_experts}")
        if self._sums is not None and not self._known[expert]:
            parts = self.format.parts(self.layer.tensors)
            block = {p.name: torch.empty(p.shape, dtype=p.dtype, device="cpu") for p in parts}
            self.read_block(expert, self.format, block)
        for name, reader in self.readers.items():
            reader.read(expert, into[name])

    def read_block(self, expert: int, format: ExpertFormat, into: Mapping[str, Tensor]) -> None:
        """
        Read one expert as a block of *format*: straight from the shards, or encoded here.

        *into* is by part name, as ``format.parts(layer.tensors)`` lists them. AttachError where
        *format* cannot hold a weight; CheckpointError where a block is not what was packed.
        """
        if format.exact:
            self.read(expert, into)
        elif format != self.format:
            tensors = self.layer.tensors
            plain = {t.name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in tensors}
            self.read(expert, plain)
            for name, part in format.encode(tensors, plain).items():
                into[name].copy_(part)
        else:
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
                        if rows != tensor.shape[0]:  # a row of the part may belong to several
                            step = tensor.rows_columns[0] // len(part)
                            part = part[row // step : (row + rows) // step]
                        parts[kind] = part
                    place.read_parts(parts, first // (place.rows * place.columns))
            self._compare(expert, into)

    def _compare(self, expert: int, block: Mapping[str, Tensor]) -> None:
        """Compare a block with its checksum, once."""
        if self._sums is None or self._known[expert]:
            return
        wanted = torch.empty(1, dtype=self._sums.info.dtype, device="cpu")
        self._sums.read(wanted, expert)
        if int(wanted) != checksum(self.layer, self.format, block):
            raise CheckpointError(
                f"expert {expert} of {self.layer.name} in {self._sums.file.path} is not what was "
                "packed; write or download the checkpoint again"
            )
        self._known[expert] = True


def checksum(layer: ExpertsLayer, format: ExpertFormat, block: Mapping[str, Tensor]) -> int:
    """Compute the CRC-32 of the packed matrices of a *block* on the CPU; some 2 GB/s."""
    plain = {tensor.name for tensor in layer.tensors}  # biases, which are read in other types too
    packed = (part.name for part in format.parts(layer.tensors) if part.name not in plain)
    return reduce(lambda sum, name: crc32(bytes_of(block[name]), sum), packed, 0)


def _stored_format(layer: ExpertsLayer, readers: dict[str, Reader]) -> ExpertFormat:
    """Find out how a layer's experts are stored: plain, or all matrices in one packed format."""
    found: dict[Any, str] = {}
    fp8, joined = [], False
    for tensor in layer.tensors:
        name = f"{layer.name}.{tensor.name}"
        places, pieces = readers[tensor.name].places(), readers[tensor.name].pieces(0)
        packed = [place for place in places if isinstance(place, PackedPlace)]
        if len(packed) < len(places) and tensor.is_matrix:
            found[PLAIN] = name
        if packed and (
            pieces is None or any(place.transposed != tensor.transposed for place in packed)
        ):
            raise UnsupportedModelError(
                f"{name} is stored packed ({packed[0].format.name}) in rows that the model "
                "rearranges, which is not read here; take a checkpoint that is not quantised"
            )
        found |= {place.format: name for place in packed}
        fp8 += [place for place in packed if isinstance(place.format, Fp8)]
        joined |= pieces is not None and len(pieces) > 1
    if len(found) > 1:
        names = " and ".join(f"{format.name} ({name})" for format, name in found.items())
        raise UnsupportedModelError(
            f"experts of one layer are stored in different formats, {names}, which is not read "
            "here; take another checkpoint of the model"
        )
    if joined and any(place.rows % BLOCK for place in fp8):
        # Matrices whose last square is cut become one: scales for as many rows as divide all.
        finer = Fp8(gcd(BLOCK, *(place.rows for place in fp8)))
        for place in fp8:
            place.format = finer
        return finer
    return next(iter(found), PLAIN)
