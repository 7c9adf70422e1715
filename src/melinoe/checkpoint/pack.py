"""
Write a checkpoint once in another format: experts packed, or packed ones plain again.

Packed experts lie in the files as they lie in memory: for each part of a block one stacked tensor,
expert after expert. All else keeps the base's names, and is decoded where the base has it packed.
"""

import json
import logging
from collections.abc import Iterator
from math import prod
from pathlib import Path
from shutil import copyfile
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from melinoe.checkpoint.files import INDEX, read_raw_config
from melinoe.checkpoint.metadata import describe_base, read_metadata, write_metadata
from melinoe.checkpoint.opening import Checkpoint, open_checkpoint
from melinoe.checkpoint.packed import OWN_METHOD, Weights, plain_config
from melinoe.checkpoint.safetensors_file import DTYPES
from melinoe.checkpoint.sources import ExpertSource
from melinoe.checkpoint.writing import check_output, check_room, other_files, whole_directory
from melinoe.errors import UnsupportedModelError
from melinoe.experts.format import ExpertFormat
from melinoe.experts.formats import named_format
from melinoe.whole_file import write_whole

_log = logging.getLogger("melinoe")

# Bytes at which a file ends and the next begins.
SHARD_BYTES = 4 << 30


class _Stack(NamedTuple):
    """Describe one tensor to be written: its type and shape, and what fills it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: Weights | None  # stored weights to copy,
    source: ExpertSource | None = None  # or the layer whose experts' part this is
    part: str = ""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def pack(name: str, format: str, out: str | Path) -> None:
    """
    Write a checkpoint anew with its experts in *format*.

    Args:
        name: A directory, or a name on the hub.
        format: ``int8``, ``int4``, ...: as `melinoe.experts.formats.FORMATS` names them. ``plain``
            writes packed weights as they mean, which any engine reads; the others `melinoe.load`
            reads.
        out: The directory to make; whole or not at all.

    Raises:
        OutputExistsError: *out* is taken.
        CheckpointError: *name* cannot be opened.
        UnsupportedModelError: there is no such format, it cannot hold these experts, or they are
            stored so already.
        WriteError: a full disk, or another reason why it cannot be written.

    Cost: the largest stored tensor in memory, beside the file system's cache.
    """
    check_output(out)
    wanted = named_format(format)
    with open_checkpoint(name) as checkpoint:
        if all(source.format == wanted for source in checkpoint.experts):
            raise UnsupportedModelError(
                f"{name} holds its experts as {format} already; choose another format"
            )
        has = next((s.format for s in checkpoint.experts if not s.format.exact), None)
        if has is not None and not wanted.exact:
            _log.warning(
                "%s holds its experts as %s, which are rounded a second time to %s: pack the "
                "checkpoint that they were made from, or serve this one as it is",
                name, has.name, format,
            )  # fmt: skip
        stacks = list(_stacks(checkpoint, wanted))
        check_room(out, sum(stack.nbytes for stack in stacks))
        with whole_directory(out) as directory:
            _write(stacks, wanted, directory)
            _write_config(checkpoint, wanted, directory)
            for path in other_files(checkpoint)[0]:
                if path.name not in (INDEX, "config.json"):
                    copyfile(path, directory / path.name)
            metadata = read_metadata(checkpoint.source) or describe_base(name)
            write_metadata(directory, metadata)


def _stacks(checkpoint: Checkpoint, wanted: ExpertFormat) -> Iterator[_Stack]:
    """List all tensors of the new checkpoint."""
    packed = [] if wanted.exact else checkpoint.experts
    of_experts = {
        id(place)
        for source in packed
        for tensor in source.layer.tensors
        for place in source.readers[tensor.name].places()
    }
    for place in checkpoint.tensors.values():
        if id(place) not in of_experts:
            yield _Stack(place.name, place.info.dtype, place.info.shape, place)
    for source in packed:
        for part in wanted.parts(source.layer.tensors):
            shape = (source.num_experts, *part.shape)
            name = f"{source.layer.name}.{part.name}"
            yield _Stack(name, part.dtype, shape, None, source, part.name)


def _write(stacks: list[_Stack], wanted: ExpertFormat, directory: Path) -> None:
    """Write the tensors into files of about `SHARD_BYTES`, a layer in one, and their index."""
    shards: list[list[_Stack]] = [[]]
    filled, last = 0, None
    for stack in stacks:
        new_layer = stack.source is None or stack.source is not last
        if filled and filled + stack.nbytes > SHARD_BYTES and new_layer:
            shards.append([])
            filled = 0
        shards[-1].append(stack)
        filled, last = filled + stack.nbytes, stack.source
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (directory / file).open("wb") as opened:
            _write_shard(shard, wanted, opened)
        index |= {stack.name: file for stack in shard}
    total = sum(stack.nbytes for stack in stacks)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_whole(directory / INDEX, json.dumps(content, indent=2) + "\n")


def _write_shard(shard: list[_Stack], wanted: ExpertFormat, file: BinaryIO) -> None:
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for stack in shard:
        starts[stack.name], end = end, end + stack.nbytes
        header[stack.name] = {
            "dtype": words[stack.dtype],
            "shape": stack.shape,
            "data_offsets": [starts[stack.name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    origin = file.tell()

    def put(stack: _Stack, tensor: Tensor, index: int = 0) -> None:
        data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        file.seek(origin + starts[stack.name] + index * len(data))
        file.write(memoryview(data))

    for stack in shard:
        if stack.place is not None:
            whole = torch.empty(stack.shape, dtype=stack.dtype, device="cpu")
            stack.place.read(whole)
            put(stack, whole)
    for source in dict.fromkeys(stack.source for stack in shard if stack.source is not None):
        parts = wanted.parts(source.layer.tensors)
        block = {p.name: torch.empty(p.shape, dtype=p.dtype, device="cpu") for p in parts}
        own = [stack for stack in shard if stack.source is source]
        for expert in range(source.num_experts):
            source.read_block(expert, wanted, block)
            for stack in own:
                put(stack, block[stack.part], expert)


def _write_config(checkpoint: Checkpoint, wanted: ExpertFormat, directory: Path) -> None:
    """Write the base's config, with what is said there of packing replaced."""
    config = plain_config(read_raw_config(checkpoint.source)[1])
    if not wanted.exact:
        transposed = any(tensor.transposed for tensor in checkpoint.layers[0].tensors)
        config["quantization_config"] = {
            "quant_method": OWN_METHOD,
            "format": wanted.name,
            "transposed": transposed,
        }
    write_whole(directory / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
