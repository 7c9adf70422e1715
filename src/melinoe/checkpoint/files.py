"""Read a checkpoint's config and index, open its shards, and check them before any read."""

import contextlib
import json
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from melinoe.checkpoint.hub import first_line, is_directory, locate
from melinoe.checkpoint.packed import check_packing, find_packing
from melinoe.checkpoint.safetensors_file import Place, SafetensorsFile
from melinoe.errors import CheckpointError, UnsupportedModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_raw_config(name: str, download: bool = True) -> tuple[Path, dict]:
    """
    Find and read ``config.json``: its path and contents.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    path = locate(name, "config.json", download)
    if path is None and is_directory(name):
        raise CheckpointError(f"{name} has no config.json; give a whole checkpoint's directory")
    if path is None:
        raise CheckpointError(
            f"{name} is no directory here, and there is no such model in the local cache or on the "
            "hub as far as it can be reached; check the name, or download it where there is a "
            "network"
        )
    return path, read_object(path)


def read_object(path: Path, way_out: str = "download it again") -> dict[str, Any]:
    """
    Read the JSON object that a file holds, with or without a byte-order mark.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        json.dumps(raw, ensure_ascii=False).encode()  # half a character could not be written
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({first_line(error)}); {way_out}"
        ) from None
    return raw


def read_config(name: str, download: bool = True) -> PreTrainedConfig:
    """
    Read the model's config, as of plain weights. Code from the hub is never run.

    Raises:
        CheckpointError: no readable ``config.json``, or weights packed in a way that is not read.
        UnsupportedModelError: transformers does not know the family.
    """
    path, raw = read_raw_config(name, download)
    packing = find_packing(raw)
    if packing is not None:
        check_packing(packing, name)
    family = raw.get("model_type")
    if not family:
        raise CheckpointError(f"{path} names no model_type; give a transformers model's config")
    try:
        with without_mark(path) as plain:
            config = AutoConfig.from_pretrained(plain, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers cannot read the config of family {family!r} ({first_line(error)}); "
            "use a family that transformers itself implements"
        ) from None
    _forget_packing(config)
    return config


def _forget_packing(config: Any) -> None:
    """Take out what would make transformers build a quantised model."""
    for key in ("quantization_config", "compression_config"):
        if hasattr(config, key):
            delattr(config, key)
    for part in getattr(config, "sub_configs", None) or ():
        if (inner := getattr(config, part, None)) is not None:
            _forget_packing(inner)


@contextlib.contextmanager
def without_mark(path: Path) -> Iterator[Path]:
    """Give *path*, or for a while a copy that transformers can read, without byte-order mark."""
    blob = path.read_bytes()
    if not blob.startswith(BOM_UTF8):
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        plain = Path(directory) / path.name
        plain.write_bytes(blob.removeprefix(BOM_UTF8))
        yield plain


def open_shards(name: str, download: bool = True) -> dict[str, Place]:
    """
    Open every shard, check its header, and say where each stored tensor lies, by its stored name.

    Raises:
        CheckpointError: no safetensors weights; a missing or torn shard; an index that names a
            tensor its shard does not hold.
    """
    single = locate(name, SINGLE, download)
    if single is not None:
        file = SafetensorsFile(single)
        return {key: Place(file, key, info) for key, info in file.tensors.items()}
    index = locate(name, INDEX, download)
    if index is None:
        if any(locate(name, pickled, download) for pickled in PICKLED):
            raise CheckpointError(
                f"{name} has only pickled .bin weights, which are never opened here; "
                "convert it to safetensors with transformers' save_pretrained"
            )
        if is_directory(name):
            raise CheckpointError(f"{name} has no {SINGLE} and no {INDEX}; download its weights")
        raise CheckpointError(
            f"{name} has no {SINGLE} and no {INDEX} in the local cache or on the hub as far as it "
            "can be reached; download its weights where there is a network"
        )
    return _open_index(name, index, download)


def _open_index(name: str, index: Path, download: bool) -> dict[str, Place]:
    """Open the shards of an index, and check that each holds what the index says."""
    weight_map = _weight_map(index)
    files: dict[str, SafetensorsFile] = {}
    try:
        for filename in sorted(set(weight_map.values())):
            path = locate(name, filename, download)
            if path is None:
                raise CheckpointError(
                    f"the shard {filename} that {index} names is missing; download it again"
                )
            files[filename] = SafetensorsFile(path)
        for key, filename in weight_map.items():
            if key not in files[filename].tensors:
                raise CheckpointError(
                    f"the shard {files[filename].path} does not hold {key}, which the index "
                    "says it does; download both again"
                )
    except BaseException:
        for file in files.values():
            file.close()
        raise
    # Like transformers, take what the shards hold even where the index forgot to say so.
    places = {k: Place(f, k, info) for f in files.values() for k, info in f.tensors.items()}
    places |= {k: Place(files[f], k, files[f].tensors[k]) for k, f in weight_map.items()}
    return places


def close_shards(places: dict[str, Place]) -> None:
    """Close every file that *places* points into."""
    for file in {id(place.file): place.file for place in places.values()}.values():
        file.close()


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index: stored name -> name of a file beside it."""
    found = read_object(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    # Also holds back what would lead out of the directory.
    beside = [isinstance(n, str) and Path(n).name == n and n.endswith(SUFFIX) for n in names]
    if not isinstance(found, dict) or not names or not all(beside):
        odd = f": {names[beside.index(False)]!r}" if names and not all(beside) else ""
        raise CheckpointError(
            f"the index {index} is not readable (its weight_map names no {SUFFIX} file beside "
            f"it{odd}); put the shards there and name them so, or download both again"
        )
    return found


def has_weights(name: str, download: bool = True) -> bool:
    """
    Whether a checkpoint has weight files of any kind, pickled ones included.

    Without *download*, a hub checkpoint whose shards are not all in the local cache has none.
    """
    if locate(name, SINGLE, download):
        return True
    index = locate(name, INDEX, download)
    if index is not None and not (download or is_directory(name)):
        return all(locate(name, shard, download) for shard in set(_weight_map(index).values()))
    return index is not None or any(locate(name, pickled, download) for pickled in PICKLED)
