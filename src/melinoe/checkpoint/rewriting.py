"""
Write a changed model as a copy of its base's own files, in which what changed is overwritten.

Names, order, shapes, types and shards stay the base's, and so does every byte of what was not
trained: layers for predicting several tokens, towers for images, buffers, whatever a release of
transformers would leave out or store otherwise.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from shutil import copyfile
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from melinoe.checkpoint.files import Place
from melinoe.checkpoint.mapping import group_by_parameter
from melinoe.checkpoint.opening import Checkpoint
from melinoe.checkpoint.safetensors_file import check_same
from melinoe.checkpoint.sources import Group, convert, is_stored_as_it_is
from melinoe.errors import UnsupportedModelError, WriteError
from melinoe.moe.experts import family, find_experts
from melinoe.moe.routing import find_routers


def check_rewritable(model: Any, checkpoint: Checkpoint) -> None:
    """
    Refuse a base whose experts and routers could not be written back; ask before hours of work.

    Args:
        model: From `load_model`.
        checkpoint: What it was loaded from, open.

    Raises:
        UnsupportedModelError: transformers' rules do not lead back to the names that are stored.
    """
    names = [f"{x.name}.{tensor.name}" for x in find_experts(model) for tensor in x.tensors]
    names += [name for router in find_routers(model) for name, _ in router.parameters()]
    for group, own in _touched(model, checkpoint, names):
        _as_stored(model, group, own)


@torch.no_grad()
def round_as_stored(model: Any, checkpoint: Checkpoint, changed: Collection[str]) -> None:
    """
    Round what changed to the types that the base stores it in, so that *model* is what loads.

    Args:
        model: Loaded from *checkpoint*, then changed; rounded in place.
        checkpoint: Open.
        changed: Full names of the tensors that may have changed.
    """
    for group, own in _touched(model, checkpoint, changed):
        stored = _as_stored(model, group, own)
        if all(place.info.dtype == tensor.dtype for place, tensor in stored):
            continue
        rounded = {place.name: tensor.to(place.info.dtype) for place, tensor in stored}
        for name, tensor in _as_loaded(model, group, own, rounded).items():
            own[name].copy_(tensor)


@torch.no_grad()
def rewrite(model: Any, checkpoint: Checkpoint, changed: Collection[str], directory: Any) -> None:
    """
    Copy the base's weight files into *directory* and overwrite there what changed.

    Tensors that equal the base's are left alone, in whatever type they are stored.

    Args:
        model: Loaded from *checkpoint*, then changed.
        checkpoint: Open.
        changed: Full names of the tensors that may have changed.
        directory: Exists.

    Raises:
        UnsupportedModelError: as `check_rewritable`.
        WriteError: what would be written is not what *model* holds; a fault of the rules.
        OSError: a full disk.

    Cost: every byte of the base copied once; one layer's weights in memory.
    """
    for path in {place.file.path for place in checkpoint.files.values()}:
        copyfile(path, directory / path.name)
    check_same(checkpoint.stamps)  # they were copied by their paths
    opened: dict[str, BinaryIO] = {}
    with ExitStack() as stack:
        for group, own in _touched(model, checkpoint, changed):
            stored = _as_stored(model, group, own)
            made = _as_loaded(model, group, own, {place.name: tensor for place, tensor in stored})
            if not all(torch.equal(made[name], own[name]) for name in own):
                raise WriteError(
                    f"{group.target} of {family(model)} could not be laid out as its base stores "
                    "it; save an adapter instead (--save adapter)"
                )
            for place, tensor in stored:
                name = place.file.path.name
                if name not in opened:
                    opened[name] = stack.enter_context((directory / name).open("r+b"))
                if not _is_stored(place, tensor):
                    _overwrite(opened[name], place, tensor)


def _touched(
    model: Any, checkpoint: Checkpoint, changed: Collection[str]
) -> Iterator[tuple[Group, dict[str, Tensor]]]:
    """Each group of stored tensors of which a changed one is made, and what of *model* it makes."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    # Not by name: what is shared is stored under one of its names, or under several.
    left = {id(tensors[name]): name for name in changed if name in tensors}
    wanted = left.copy()
    for group in group_by_parameter(model, checkpoint.files).values():
        own = {target: tensors[target] for target in group.targets if target in tensors}
        if any(id(tensor) in wanted for tensor in own.values()):
            for tensor in own.values():
                left.pop(id(tensor), None)
            yield group, own
    persistent = model.state_dict().keys()
    for name in left.values():
        if name in persistent:
            raise UnsupportedModelError(
                f"{checkpoint.name} stores nothing for {name} of {family(model)}, so a change of "
                "it cannot be written; save an adapter instead (--save adapter)"
            )


def _as_stored(model: Any, group: Group, own: dict[str, Tensor]) -> list[tuple[Place, Tensor]]:
    """The stored tensors of a group with what *model* holds now, in the model's own type."""
    places = {place.name: place for part in group.tensors.values() for place in part}
    first = own[group.target] if group.target in own else next(iter(own.values()))
    if is_stored_as_it_is(group, tuple(first.shape)):
        made = dict.fromkeys(places, first)
    else:
        made = revert_weight_conversion(model, own)
    if {name: tuple(tensor.shape) for name, tensor in made.items()} != {
        name: place.info.shape for name, place in places.items()
    }:
        raise UnsupportedModelError(
            f"{group.target} of {family(model)} cannot be laid out as this base stores it (first "
            f"{next(iter(places))}); save an adapter instead (--save adapter)"
        )
    return [(places[name], tensor.detach()) for name, tensor in made.items()]


def _as_loaded(
    model: Any, group: Group, own: dict[str, Tensor], stored: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of each of *own* what transformers makes of the stored tensors, in the model's type."""
    wide = next(iter(own.values())).dtype
    if is_stored_as_it_is(group, tuple(own[next(iter(own))].shape)):
        (only,) = stored.values()
        return dict.fromkeys(own, only.to(wide))
    pieces = {
        pattern: [stored[place.name].to(wide) for place in places]
        for pattern, places in group.tensors.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    return convert(group, pieces, shapes, model.config)


def _is_stored(place: Place, tensor: Tensor) -> bool:
    """Whether the base's own file holds these numbers already, as far as their type tells."""
    old = torch.empty(place.info.shape, dtype=place.info.dtype)
    place.file.read(place.name, old)
    return torch.equal(old.to(tensor.dtype), tensor.cpu())


def _overwrite(file: BinaryIO, place: Place, tensor: Tensor) -> None:
    new = tensor.to("cpu", place.info.dtype).contiguous()
    data: Any = new.reshape(-1).view(torch.uint8).numpy()
    file.seek(place.info.start)
    file.write(memoryview(data))
