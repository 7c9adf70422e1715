"""
Where each expert's weights lie in a checkpoint, and how to read one of them alone.

A checkpoint and a model in memory call things differently: the hub keeps one tensor per expert and
projection, the model stacks all experts of a layer. transformers knows the way from one to the
other (`conversion_mapping`), a whole layer at a time. Here the same rules are applied to a single
expert. There are four ways, and the first that reproduces transformers is taken:

    Stacked     the parameter is stored as it is: expert e is a range of its bytes
    Rows        one tensor per expert, laid one under the other: each goes straight to its rows;
                found by the rule's name, or by running it on stand-ins (`tracing`)
    OneExpert   any other rule that treats the experts alike: the rule, run on expert e's tensors
    WholeLayer  the rest: the rule, run on all experts; the layer last read is kept
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from melinoe.checkpoint.files import Place
from melinoe.checkpoint.fitting import check_complete, check_shape, mismatch
from melinoe.checkpoint.tracing import rows_by_trial


class Group(NamedTuple):
    """Stored tensors that one rule turns into one or more parameters of the model."""

    target: str  # the first of the parameters, by its full name in the model
    targets: tuple[str, ...]
    converter: WeightConverter | None  # None: a renaming at most
    tensors: dict[str, list[Place]]  # source pattern -> tensors, in transformers' order


class Reader(Protocol):
    """Reads one expert's part of one parameter."""

    def read(self, expert: int, into: torch.Tensor) -> None:
        """Fill *into*, shaped like the parameter without its leading E."""


class Stacked:
    """The parameter as it is stored: expert e is a range of its bytes."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def read(self, expert: int, into: torch.Tensor) -> None:
        """As `Reader.read`."""
        self.place.file.read(self.place.name, into, first=expert * into.numel())


class Rows:
    """One tensor per expert and projection, laid one under the other."""

    def __init__(self, parts: Sequence[Sequence[Place]]) -> None:
        self.parts = parts

    def read(self, expert: int, into: torch.Tensor) -> None:
        """As `Reader.read`."""
        row = 0
        for part in self.parts:
            file, name, info = part[expert]
            rows = info.shape[0]
            file.read(name, into.narrow(0, row, rows))
            row += rows


class OneExpert:
    """transformers' own rule, run on the tensors of one expert."""

    def __init__(self, group: Group, parameter: str, shape: Sequence[int], config: Any) -> None:
        self.group, self.parameter, self.shape, self.config = group, parameter, shape, config
        self.listed = isinstance(_operations(group)[0], MergeModulelist)

    def convert(self, expert: int, device: str = "cpu") -> torch.Tensor:
        """The expert's part as ``(1, ...)``; on device "meta" only its shape, nothing is read."""
        pieces = {
            p: [self._piece(places, expert, device)] for p, places in self.group.tensors.items()
        }
        shapes = {self.parameter: (1, *self.shape[1:])}
        return convert(self.group, pieces, shapes, self.config)[self.parameter]

    def _piece(self, places: list[Place], expert: int, device: str) -> torch.Tensor:
        file, name, info = places[expert] if self.listed else places[0]
        shape = info.shape if self.listed else (1, *info.shape[1:])
        piece = torch.empty(shape, dtype=info.dtype, device=device)
        if device != "meta":
            file.read(name, piece, first=0 if self.listed else expert * piece.numel())
        return piece

    def read(self, expert: int, into: torch.Tensor) -> None:
        """As `Reader.read`."""
        into.copy_(self.convert(expert)[0])


class LayerCache:
    """Parameters of the layer last converted, shared by the readers of one checkpoint."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lock = threading.Lock()
        self.kept: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()


class WholeLayer:
    """transformers' own rule, run on all experts of a layer; costs that layer's bytes in memory."""

    def __init__(
        self, group: Group, parameter: str, shapes: dict[str, tuple[int, ...]], config: Any,
        cache: LayerCache,
    ) -> None:  # fmt: skip
        self.group, self.parameter, self.shapes, self.config = group, parameter, shapes, config
        self.cache = cache

    def convert(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Every parameter that the rule makes; on device "meta" only the shapes."""
        pieces: dict[str, list[torch.Tensor]] = {}
        for pattern, places in self.group.tensors.items():
            pieces[pattern] = []
            for file, name, info in places:
                piece = torch.empty(info.shape, dtype=info.dtype, device=device)
                if device != "meta":
                    file.read(name, piece)
                pieces[pattern].append(piece)
        return convert(self.group, pieces, self.shapes, self.config)

    def read(self, expert: int, into: torch.Tensor) -> None:
        """As `Reader.read`."""
        with self.cache.lock:
            kept = self.cache.kept
            if self.group.target not in kept:
                while len(kept) >= self.cache.capacity:
                    kept.popitem(last=False)  # before the next is made: never one too many
                kept[self.group.target] = self.convert()
            kept.move_to_end(self.group.target)
            into.copy_(kept[self.group.target][self.parameter][expert])


def reader_for(
    group: Group, parameter: str, shapes: dict[str, tuple[int, ...]], config: Any, cache: LayerCache
) -> Reader:
    """
    The cheapest reader that gives what transformers would, checked by shape without reading.

    Args:
        group: The stored tensors and their rule.
        parameter: Full name of the parameter to read, one of ``group.targets``.
        shapes: Full shapes ``(E, ...)`` of the model's experts' parameters, by full name.
        config: The model's config, which some rules look into.
        cache: Shared by all readers of one checkpoint.

    Raises:
        CheckpointError: tensors of some experts are missing, or have another shape.
    """
    shape = shapes[parameter]
    places = [place for part in group.tensors.values() for place in part]
    operations = _operations(group)
    if is_stored_as_it_is(group, shape):
        if len(places) != 1 or places[0].info.shape != shape:
            raise mismatch(parameter, shape, places[0])
        return Stacked(places[0])
    if isinstance(operations[0], MergeModulelist):
        expected = shape[0] if len(group.targets) == 1 else None
        check_complete(group.tensors, _patterns(group), parameter, expected)
    if len(group.targets) == 1 and _alike(group, operations, shape[0]):
        parts = [group.tensors[p] for p in _patterns(group) if p in group.tensors]
        if _rows(operations) and _rows_fit(parts, shape):
            return Rows(parts)
        one = OneExpert(group, parameter, shape, config)
        check_shape(lambda: one.convert(0, "meta"), parameter, (1, *shape[1:]), places[0])
        for part in parts:  # the rule was tried on expert 0; the others must look the same
            for place in part:
                if place.info.shape != part[0].info.shape:
                    raise mismatch(place.name, part[0].info.shape, place)
        return one
    whole = WholeLayer(group, parameter, shapes, config, cache)
    found = rows_by_trial(
        group.tensors, parameter, shape[0], lambda pieces: convert(group, pieces, shapes, config)
    )
    if found is not None and _rows_fit(found, shape):
        return Rows(found)
    check_shape(lambda: whole.convert("meta")[parameter], parameter, shape, places[0])
    return whole


class _Shapes:
    """Stands in for the model where a rule asks it for a parameter's shape."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name], device="meta")


def is_stored_as_it_is(group: Group, shape: tuple[int, ...]) -> bool:
    """Whether the one stored tensor of a group is the parameter, which has this *shape*."""
    operations = _operations(group)
    if _optional(operations):
        return next(iter(group.tensors.values()))[0].info.shape == shape
    return not operations


def convert(
    group: Group, pieces: dict[str, list[torch.Tensor]], shapes: dict, config: Any
) -> dict[str, torch.Tensor]:
    """
    Run a group's rule on *pieces*.

    Args:
        group: Its rule is not changed.
        pieces: Source pattern -> tensors, in the group's order.
        shapes: Full name -> shape of the parameters that the rule may ask for.
        config: The model's config.

    Returns:
        Full parameter name -> tensor.
    """
    converter: Any = deepcopy(group.converter)
    for pattern, tensors in pieces.items():
        for tensor in tensors:
            converter.add_tensor(group.target, pattern, pattern, tensor)
    made = converter.convert(group.target, model=_Shapes(shapes), config=config)
    return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def _operations(group: Group) -> list:
    return [] if group.converter is None else list(group.converter.operations)


def _patterns(group: Group) -> list[str]:
    return [] if group.converter is None else group.converter.source_patterns


def _optional(operations: list) -> bool:
    """A transposition that leaves a tensor of the right shape alone."""
    return len(operations) == 1 and getattr(operations[0], "check_dims", False)


def _rows(operations: list) -> bool:
    """Stack the experts, then at most lay the projections one under the other."""
    kinds = [(type(op), getattr(op, "dim", None)) for op in operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _rows_fit(parts: list[list[Place]], shape: tuple[int, ...]) -> bool:
    """Every expert's tensors have the same shapes, and together the parameter's."""
    first = [part[0].info.shape for part in parts]
    same = all(place.info.shape == part[0].info.shape for part in parts for place in part)
    rows = sum(s[0] for s in first if s)
    return same and all(s[1:] == shape[2:] for s in first) and rows == prod(shape[1:2])


def _alike(group: Group, operations: list, num_experts: int) -> bool:
    """Whether the rule treats experts independently, so that it may be run on one of them."""
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
