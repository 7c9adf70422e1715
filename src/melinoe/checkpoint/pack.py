"""
Write a checkpoint once in another format: experts packed, or packed ones plain again.

Packed experts lie in the files as they lie in memory: for each part of a block one stacked tensor,
expert after expert, and a checksum of each block, which its first reader compares. All else keeps
the base's names, and is decoded where the base has it packed.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from shutil import copyfile
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from melinoe.checkpoint.files import INDEX, read_raw_config
from melinoe.checkpoint.metadata import describe_base, read_metadata, write_metadata
from melinoe.checkpoint.opening import Checkpoint, open_checkpoint
from melinoe.checkpoint.packed import OWN_METHOD, SUMS, plain_config
from melinoe.checkpoint.safetensors_file import DTYPES, bytes_of, load_whole
from melinoe.checkpoint.sources import checksum
from melinoe.checkpoint.writing import (
    BASE_CARD,
    check_output,
    check_room,
    other_files,
    whole_directory,
)
from melinoe.errors import UnsupportedModelError
from melinoe.experts.format import ExpertFormat
from melinoe.experts.formats import named_format
from melinoe.host_memory import check_host_room, format_bytes, free_host_bytes
from melinoe.whole_file import write_whole

_log = logging.getLogger("melinoe")

# Bytes at which a file ends and the next begins, where there is memory for them.
SHARD_BYTES = 1 << 30
# Experts are read past the page cache by whole blocks of the disk.
_BLOCK = 4096


def pack(name: str, format: str, out: str | Path) -> float:
    """
    Write a checkpoint anew with its experts in *format*; memory of two of the largest tensors.

    ``plain`` writes packed weights as they mean, which any engine reads. Returns how far the first
    expert of each layer is off: the root mean square of the difference over that of the weights.

    OutputExistsError, CheckpointError, WriteError: as `open_checkpoint` and `whole_directory`.
    UnsupportedModelError: no such format, or one that cannot hold these experts or does already.
    BudgetError: the host has too little memory.
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
        experts = [wanted.block_bytes(x.tensors) * x.num_experts for x in checkpoint.layers]
        rest = [prod(x.info.shape) * x.info.dtype.itemsize for x in checkpoint.backbone]
        check_room(out, sum(experts) + sum(rest))
        whole = checkpoint.tensors.values() if wanted.exact else ()
        largest = max(
            [*(experts if not wanted.exact else ()), *rest]
            + [prod(x.info.shape) * x.info.dtype.itemsize for x in whole]
        )
        check_host_room(
            largest + max(largest, _shard_bytes()),
            f"tensors of up to {format_bytes(largest)}, one read and some to be written,",
            "pack on a host with more",
        )
        config = plain_config(read_raw_config(checkpoint.source)[1])
        if not wanted.exact:
            config["quantization_config"] = {
                "quant_method": OWN_METHOD,
                "format": wanted.name,
                "transposed": any(t.transposed for t in checkpoint.layers[0].tensors),
            }
        known, renamed = read_metadata(checkpoint.source) or describe_base(name), {}
        if not wanted.exact and known.pop("outcome", None) is not None:
            renamed = {"README.md": BASE_CARD}  # it says what was measured, of unrounded experts
        write_anew(checkpoint, out, _read(checkpoint, wanted), config, known, renamed)
        return _difference(checkpoint, wanted)


def write_anew(
    checkpoint: Checkpoint,
    out: str | Path,
    groups: Iterator[dict[str, Tensor]],
    config: dict[str, Any],
    metadata: dict[str, Any],
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write *out* of a checkpoint's other files, some *renamed*, and of new tensors and config."""
    with whole_directory(out) as directory:
        write_shards(groups, directory)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        write_whole(directory / "config.json", text + "\n")
        for path in other_files(checkpoint)[0]:
            if path.name not in (INDEX, "config.json"):
                copyfile(path, directory / renamed.get(path.name, path.name))
        write_metadata(directory, metadata)


def _difference(checkpoint: Checkpoint, wanted: ExpertFormat) -> float:
    error = square = 0.0
    for source in checkpoint.experts:
        tensors = source.layer.tensors
        plain = {t.name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in tensors}
        source.read(0, plain)
        for name, meant in wanted.decode(tensors, wanted.encode(tensors, plain)).items():
            error += float((meant.float() - plain[name].float()).square().sum())
            square += float(plain[name].float().square().sum())
    return (error / square) ** 0.5 if square else 0.0


def _read(checkpoint: Checkpoint, wanted: ExpertFormat) -> Iterator[dict[str, Tensor]]:
    """Read the new checkpoint's tensors: a plain one alone, the parts of a layer together."""
    packed = [] if wanted.exact else checkpoint.experts
    readers = [reader for source in packed for reader in source.readers.values()]
    of_experts = {id(place) for reader in readers for place in reader.places()}
    for place in checkpoint.tensors.values():
        if id(place) not in of_experts:
            yield {place.name: load_whole(place)}
    for source in packed:
        stacks = {
            part.name: torch.empty(source.num_experts, *part.shape, dtype=part.dtype, device="cpu")
            for part in wanted.parts(source.layer.tensors)
        }
        sums = torch.empty(source.num_experts, dtype=torch.int64, device="cpu")
        for expert in range(source.num_experts):
            block = {name: stack[expert] for name, stack in stacks.items()}
            source.read_block(expert, wanted, block)
            sums[expert] = checksum(source.layer, wanted, block)
        stored = {f"{source.layer.name}.{name}": stack for name, stack in stacks.items()}
        yield stored | {f"{source.layer.name}{SUMS}": sums}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file whose tensors begin where the disk's blocks do, as far as their sizes let it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    order = sorted(tensors.items(), key=lambda one: (one[1].nbytes % _BLOCK > 0, -one[1].itemsize))
    for name, tensor in order:
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": names[tensor.dtype], "shape": shape, "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _BLOCK)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            file.write(bytes_of(tensor))


def _shard_bytes() -> int:
    """Bytes of a file: less where memory is short, because its tensors wait there."""
    free = free_host_bytes()
    return SHARD_BYTES if free is None else min(SHARD_BYTES, free // 4)


def write_shards(groups: Iterator[dict[str, Tensor]], directory: Path) -> None:
    """Write tensors into files of at most about `SHARD_BYTES`, a group in one, and their index."""
    most = _shard_bytes()
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = 0

    def save() -> None:
        shards.append(list(waiting))
        _save(waiting, directory / f"{len(shards)}.part")
        waiting.clear()

    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group.values())
        if waiting and sum(t.nbytes for t in waiting.values()) + nbytes > most:
            save()
        waiting |= group
        total += nbytes
    save()
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (directory / f"{number}.part").rename(directory / file)
        index |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_whole(directory / INDEX, json.dumps(content, indent=2) + "\n")
