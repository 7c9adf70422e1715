"""
Write a changed model as a checkpoint: its base's own files, in which what changed is overwritten.

Names, order, shapes, types and shards stay the base's, and so does every byte of what was not
trained: layers for predicting several tokens, towers for images, buffers, whatever a release of
transformers would leave out or store otherwise. The directory appears whole or not at all.
"""

import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from melinoe.checkpoint.export_rules import other_results
from melinoe.checkpoint.files import (
    INDEX,
    SINGLE,
    first_line,
    is_directory,
    locate,
    read_raw_config,
    split_revision,
)
from melinoe.checkpoint.metadata import METADATA, update_metadata, write_metadata
from melinoe.checkpoint.opening import Checkpoint, open_checkpoint
from melinoe.checkpoint.packed import PackedPlace, Weights
from melinoe.checkpoint.safetensors_file import bytes_of, check_same
from melinoe.checkpoint.sources import ExpertSource, Group, group_by_parameter
from melinoe.checkpoint.verifying import sums_of
from melinoe.errors import OutputExistsError, UnsupportedModelError, WriteError
from melinoe.host_memory import format_bytes
from melinoe.moe.experts import family, find_experts
from melinoe.moe.routing import find_routers
from melinoe.whole_file import unfinished

_log = logging.getLogger("melinoe")

OwnExpert = Callable[[ExpertSource, str, int], Tensor]
"""From a layer, a parameter's name and an expert: its changed tensor, to be written."""


def write_model(
    model: Any,
    base: str,
    out: str | Path,
    metadata: dict[str, Any],
    changed: Collection[str],
    also: Callable[[Path], None] | None = None,
    experts: OwnExpert | None = None,
) -> None:
    """
    Write a changed model to *out*; the base's card becomes ``BASE_README.md``.

    *model* is from `load_model`, with all its weights; or from `load_backbone`, with *experts*,
    which gives the changed tensors of one expert at a time. *changed*: full names of tensors that
    may have. *also* may write more into the directory. Weights in other files than those that were
    read, and directories, are left out, with a warning.

    OutputExistsError, WriteError: as `whole_directory`. CheckpointError: the base can no longer be
    opened. UnsupportedModelError: as `check_rewritable`. AttachError: the experts' weights are in
    an engine's store; detach it first.
    """
    check_output(out)
    if experts is None:
        find_experts(model)
    with open_checkpoint(base) as checkpoint, whole_directory(out) as directory:
        rewrite(model, checkpoint, changed, directory, experts)
        files, left = other_files(checkpoint)
        for path in files:
            copyfile(path, directory / (BASE_CARD if path.name == _CARD else path.name))
        if left:
            _log.warning(
                "%s: left out of the copy, as no part of what was read: %s",
                checkpoint.name, ", ".join(left),
            )  # fmt: skip
        found = other_results(read_raw_config(str(directory))[1])
        for engines in dict.fromkeys(one.engines for one in found):
            settings = " and ".join(one.what for one in found if one.engines == engines)
            _log.warning(
                "%s: %s compute something else from it (%s); see `melinoe doctor %s --export`",
                out, engines, settings, out,
            )  # fmt: skip
        write_metadata(directory, metadata)
        if also is not None:
            also(directory)


# --- the directory -------------------------------------------------------------------------------


def check_output(out: str | Path) -> Path:
    """Return the directory *out*; OutputExistsError if it is a file, or not empty."""
    path = Path(out).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputExistsError(f"{path} exists and is not empty; choose another place for output")
    return path


def check_room(out: str | Path, needed_bytes: int) -> None:
    """Refuse, with a WriteError, a disk with less than *needed_bytes* free where *out* will be."""
    place = Path(out).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise WriteError(
            f"{out} will take {format_bytes(needed_bytes)}, but only {format_bytes(free)} are free "
            "there; free some space, or choose another place for output"
        )


def reason_of(error: BaseException) -> str:
    """Say in a few words why the system, or safetensors' writer, failed."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).strip()


@contextmanager
def whole_directory(out: str | Path) -> Iterator[Path]:
    """
    Give a directory to fill, which becomes *out* when the block ends, and is gone if it fails. Its
    ``melinoe.json``, if it gets one, is given the sums of all other files. OutputExistsError: *out*
    is taken; WriteError: it cannot be written.
    """
    path = check_output(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(path) as directory:
            yield directory
            if (directory / METADATA).is_file():
                update_metadata(directory, files=sums_of(directory))
            if path.is_dir():
                path.rmdir()  # empty, or it fails: Windows renames to no place that is taken
            os.replace(directory, path)
    except (OSError, SafetensorError) as error:
        raise WriteError(
            f"{path} could not be written ({reason_of(error)}); free some space there, or "
            "choose another place"
        ) from error


# --- weights -------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """One expert's share of a parameter, or a group: what is written at once."""

    own: dict[str, Tensor]  # the model's tensors, by full name
    # Where each piece of them is stored: place, first element there, and the numbers.
    stored: list[tuple[Weights, int, Tensor]]
    # Makes *own* of the numbers, as transformers does when it loads them; None: they are views.
    load: Callable[[list[Tensor]], dict[str, Tensor]] | None = None


def check_rewritable(model: Any, checkpoint: Checkpoint) -> None:
    """
    Refuse a base whose experts and routers could not be written back; ask before hours of work.
    UnsupportedModelError: they are packed, or no rule leads back to the names that are stored.
    """
    names = [f"{x.name}.{tensor.name}" for x in checkpoint.layers for tensor in x.tensors]
    names += [name for router in find_routers(model) for name, _ in router.parameters()]

    def blank(source: ExpertSource, name: str, expert: int) -> Tensor:
        tensor = next(one for one in source.layer.tensors if one.name == name)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    for _ in _parts(model, checkpoint, names, blank, only_first=True):
        pass


@torch.no_grad()
def round_as_stored(model: Any, checkpoint: Checkpoint, changed: Collection[str]) -> None:
    """Round *changed* tensors in place to the types that the base stores, as they will load."""
    has = {name for name, one in model.named_parameters(remove_duplicate=False) if one.numel()}
    for part in _parts(model, checkpoint, [name for name in changed if name in has]):
        _round(part)


def _round(part: _Part) -> None:
    own, stored, load = part
    if all(place.info.dtype == tensor.dtype for place, _, tensor in stored):
        return
    rounded = [tensor.to(place.info.dtype) for place, _, tensor in stored]
    if load is None:
        for (_, _, tensor), new in zip(stored, rounded, strict=True):
            tensor.copy_(new)
    else:
        for name, tensor in load(rounded).items():
            own[name].copy_(tensor)


@torch.no_grad()
def rewrite(
    model: Any,
    checkpoint: Checkpoint,
    changed: Collection[str],
    directory: Path,
    experts: OwnExpert | None = None,
) -> None:
    """
    Copy the base's weight files into *directory* and overwrite there what changed. Tensors that
    equal the base's are left alone, in whatever type they are stored. What *experts* gives is
    rounded here. A few copies of one expert are in memory.
    """
    for path in checkpoint.stamps:
        copyfile(path, directory / path.name)
    check_same(checkpoint.stamps)  # they were copied by their paths
    for part in _parts(model, checkpoint, changed, experts):
        if experts is not None:
            _round(part)
        own, stored, load = part
        made = own if load is None else load([tensor for _, _, tensor in stored])
        if not all(torch.equal(made[name], tensor) for name, tensor in own.items()):
            raise _other_layout(model, next(iter(own)), stored[0][0])
        for place, first, tensor in stored:
            old = torch.empty(tensor.shape, dtype=place.info.dtype, device="cpu")
            place.read(old, first)
            if not torch.equal(old.to(tensor.dtype), tensor.cpu()):
                with (directory / place.file.path.name).open("r+b") as file:
                    file.seek(place.info.start + first * place.info.dtype.itemsize)
                    file.write(bytes_of(tensor.to("cpu", place.info.dtype)))


def _parts(
    model: Any,
    checkpoint: Checkpoint,
    changed: Collection[str],
    experts: OwnExpert | None = None,
    only_first: bool = False,
) -> Iterator[_Part]:
    """List the parts of *model* that may have changed; with *only_first* of experts 0 alone."""
    for part in _all_parts(model, checkpoint, changed, experts, only_first):
        for place, _, _ in part.stored:
            if isinstance(place, PackedPlace):
                raise UnsupportedModelError(
                    f"{place.name} is stored packed ({place.format.name}), and changed weights are "
                    "not packed again; save an adapter instead (--save adapter), which `melinoe "
                    "merge --format` packs, or first unpack the base (`melinoe pack BASE --format "
                    "plain --out DIR`)"
                )
        yield part


def _all_parts(
    model: Any,
    checkpoint: Checkpoint,
    changed: Collection[str],
    experts: OwnExpert | None,
    only_first: bool,
) -> Iterator[_Part]:
    sources = {
        f"{one.layer.name}.{key}": (one, key) for one in checkpoint.experts for key in one.readers
    }

    def whole(name: str) -> Tensor:
        if experts is None or name not in sources:
            return tensors[name].detach()
        source, key = sources[name]
        return torch.stack([experts(source, key, one) for one in range(source.num_experts)])

    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    # Not by name: what is shared is stored under one of its names, or under several.
    left = {id(tensors[name]): name for name in changed if name in tensors}
    wanted = left.copy()
    by_expert = set()
    for source in checkpoint.experts:
        for tensor_name, reader in source.readers.items():
            name = f"{source.layer.name}.{tensor_name}"
            if id(tensors.get(name)) not in wanted or reader.pieces(0) is None:
                continue  # not changed; or written as a group, for a rule computes its rows
            by_expert.add(name)
            left.pop(id(tensors[name]), None)
            for expert in range(1 if only_first else source.num_experts):
                own = (
                    tensors[name].detach()[expert]
                    if experts is None
                    else experts(source, tensor_name, expert)
                )
                yield _Part(
                    {name: own},
                    [
                        (place, first, own.narrow(0, row, rows) if own.dim() else own)
                        for place, first, row, rows in reader.pieces(expert) or ()
                    ],
                )
    for group in group_by_parameter(model, checkpoint.tensors).values():
        names = [name for name in group.targets if name in tensors]
        if any(id(tensors[name]) in wanted for name in {*names} - by_expert):
            for name in names:
                left.pop(id(tensors[name]), None)
            yield _group_part(model, group, {name: whole(name) for name in names})
    persistent = model.state_dict().keys()
    for name in left.values():
        if name in persistent:
            raise UnsupportedModelError(
                f"{checkpoint.name} stores nothing for {name} of {family(model)}, so a change of "
                "it cannot be written; save an adapter instead (--save adapter)"
            )


def _group_part(model: Any, group: Group, own: dict[str, Tensor]) -> _Part:
    """Find where all tensors of a group are stored, such as a router's."""
    first = own.get(group.target, next(iter(own.values())))
    places = {place.name: place for place in group.places}
    shape = tuple(first.shape)
    if group.is_stored_as(shape) and [p.info.shape for p in places.values()] == [shape]:
        return _Part({group.target: first}, [(group.places[0], 0, first)])
    made = revert_weight_conversion(model, own)
    if {name: tuple(tensor.shape) for name, tensor in made.items()} != {
        name: place.info.shape for name, place in places.items()
    }:
        raise _other_layout(model, group.target, group.places[0])
    shapes = {n: tuple(t.shape) for n, t in own.items()}

    def load(tensors: list[Tensor]) -> dict[str, Tensor]:
        by_name = dict(zip(made, tensors, strict=True))
        pieces = {
            pattern: [by_name[place.name].to(first.dtype) for place in part]
            for pattern, part in group.tensors.items()
        }
        return group.convert(pieces, shapes, model.config)

    return _Part(own, [(places[name], 0, tensor) for name, tensor in made.items()], load)


def _other_layout(model: Any, name: str, place: Weights) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} of {family(model)} cannot be laid out as this base stores it (first "
        f"{place.name}); save an adapter instead (--save adapter)"
    )


# --- everything that is no weight, copied as it is -----------------------------------------------

BASE_CARD = "BASE_README.md"
_CARD = "README.md"
# Weights in any format; what an index tells is of weights too.
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".ot", ".nemo", ".index.json",
)  # fmt: skip


def copied_bytes(checkpoint: Checkpoint) -> int:
    """Add up the bytes of the base's files that `write_model` copies."""
    files = (*checkpoint.stamps, *other_files(checkpoint)[0])
    return sum(path.stat().st_size for path in files)


def other_files(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """
    List the files beside a checkpoint's weights, fetched from the hub where it is one of its names.
    Gives files to copy, the index that was read among them, and names of what is left out: weights
    that were not read, directories, ``adapter_config.json``.
    """
    source = checkpoint.source
    config = locate(source, "config.json")
    assert config is not None  # it was read
    if not is_directory(source):
        repository, revision = split_revision(source)
        ignored = [f"*{ending}" for ending in _WEIGHTS] + ["*/*"]
        try:
            snapshot_download(repository, revision=revision, ignore_patterns=ignored)
        except Exception as error:  # the hub's client lets through errors of many libraries
            _log.warning(
                "%s: the hub does not say which files it has (%s); those that are here are copied",
                source, first_line(error),
            )  # fmt: skip
    read = {path.name for path in checkpoint.stamps}
    files, left = [], []
    for path in sorted(config.parent.iterdir()):
        if path.is_file() and path.name == INDEX and SINGLE not in read:
            files.append(path)
        elif path.name in read or path.name.startswith((".", "melinoe")):
            continue  # copied with the weights; of the hub's own tools; a run's record and figures
        elif path.is_dir() or path.name.endswith(_WEIGHTS) or path.name == "adapter_config.json":
            left.append(path.name)
        else:
            files.append(path)
    return files, left
