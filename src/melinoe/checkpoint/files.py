"""Find, read and check a checkpoint's files: in a directory, the hub's cache or on the hub."""

import contextlib
import json
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from melinoe.checkpoint.packed import PACKING_KEYS, check_packing
from melinoe.checkpoint.safetensors_file import Place, SafetensorsFile
from melinoe.errors import CheckpointError, UnsupportedModelError
from melinoe.whole_file import parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def is_directory(name: str) -> bool:
    """Tell a directory from a name on the hub."""
    return _path(name).is_dir()


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # of nobody here; so there is nothing
        return Path(name)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``"org/model@v1.0"`` at the ``@``; a directory is never split, whatever its name."""
    if is_directory(name):
        return name, None
    repository, _, revision = name.partition("@")
    return repository, revision or None


def hub_arguments(name: str) -> dict[str, str]:
    """Return the arguments by which transformers' ``from_pretrained`` takes *name*."""
    repository, revision = split_revision(name)
    return {"pretrained_model_name_or_path": repository, "revision": revision or "main"}


def pinned(name: str, path: Path) -> str:
    """Add to *name* the commit that *path*, one of its files, came from; not to a directory."""
    if is_directory(name) or path.parent.parent.name != "snapshots":
        return name
    return f"{split_revision(name)[0]}@{path.parent.name}"


def locate(name: str, filename: str, download: bool = True) -> Path | None:
    """
    Find one file of a checkpoint, a directory or ``org/model@revision`` of the hub; None where it
    has no such file, nor without *download* or a hub the local cache. CheckpointError: no such
    path, repository or revision; the hub fails.
    """
    directory = _path(name)
    if directory.is_dir():
        path = directory / filename
        return path if path.is_file() else None
    if directory.exists():
        raise CheckpointError(f"{name} is a file; give the directory that holds the checkpoint")
    repository, revision = split_revision(name)
    if repository.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"the directory {name} does not exist; check the path")
    try:
        found = cached_file(
            repository,
            filename,
            revision=revision,
            local_files_only=not download,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=download,
        )
    except Exception as error:  # the hub's client lets through errors of many libraries
        raise CheckpointError(
            f"{name} is no directory here, and the hub did not give {filename} "
            f"({first_line(error)}); check the name, the network and the room on the disk"
        ) from None
    return None if found is None else Path(found)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with what it announces, or its type's name."""
    lines = str(error).strip().split("\n")
    said = " ".join(map(str.strip, lines[:2])) if lines[0].endswith(":") else lines[0]
    return said.rstrip(".") or type(error).__name__


# --- config --------------------------------------------------------------------------------------


def read_raw_config(name: str, download: bool = True) -> tuple[Path, dict]:
    """Find and read ``config.json``: its path and contents; CheckpointError where there is none."""
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
    """Read the JSON object that a file holds, with or without a byte-order mark."""
    try:
        raw = parse_json(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        json.dumps(raw, ensure_ascii=False).encode()  # half a character could not be written
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({first_line(error)}); {way_out}"
        ) from None
    return raw


def read_config(name: str, download: bool = True) -> PreTrainedConfig:
    """
    Read the model's config, as of plain weights. Code from the hub is never run. CheckpointError:
    not readable, or weights packed in a way that is not read; UnsupportedModelError: transformers
    does not know the family.
    """
    path, raw = read_raw_config(name, download)
    check_packing(raw, name)
    family = raw.get("model_type")
    if not family:
        raise CheckpointError(f"{path} names no model_type; give a transformers model's config")
    try:
        with without_mark(path) as plain:
            config = AutoConfig.from_pretrained(plain, trust_remote_code=False)
    except Exception as error:
        known = isinstance(family, str) and family in CONFIG_MAPPING
        raise UnsupportedModelError(
            f"transformers cannot read the config of family {family!r} ({first_line(error)}); "
            + ("give its own" if known else "use a family that transformers itself implements")
        ) from None
    _forget_packing(config)
    return config


def _forget_packing(config: Any) -> None:
    """Take out what would make transformers build a quantised model."""
    for key in PACKING_KEYS:
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


# --- shards --------------------------------------------------------------------------------------


def open_shards(name: str, download: bool = True) -> dict[str, Place]:
    """Open every shard, check its header, and map stored names to where tensors lie."""
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
        way_out = "; download its weights"
        if not is_directory(name):
            way_out = (
                " in the local cache or on the hub as far as it can be reached; download its "
                "weights where there is a network"
            )
        raise CheckpointError(f"{name} has no {SINGLE} and no {INDEX}{way_out}")
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
    return places | {k: Place(files[f], k, files[f].tensors[k]) for k, f in weight_map.items()}


def close_shards(places: dict[str, Place]) -> None:
    """Close every file that *places* points into."""
    for place in places.values():
        place.file.close()


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index: stored name -> name of a file beside it."""
    found = read_object(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    # Also holds back what would lead out of the directory.
    odd = [
        n
        for n in names
        if not (isinstance(n, str) and Path(n).name == n and n.endswith(SUFFIX))
    ]  # fmt: skip
    if not isinstance(found, dict) or not names or odd:
        which = f": {odd[0]!r}" if odd else ""
        raise CheckpointError(
            f"the index {index} is not readable (its weight_map names no {SUFFIX} file beside "
            f"it{which}); put the shards there and name them so, or download both again"
        )
    return found


def has_weights(name: str) -> bool:
    """Whether all weight files of a checkpoint are here, pickled ones included."""
    if locate(name, SINGLE, download=False):
        return True
    index = locate(name, INDEX, download=False)
    if index is not None and not is_directory(name):
        return all(locate(name, x, download=False) for x in set(_weight_map(index).values()))
    return index is not None or any(locate(name, pickled, download=False) for pickled in PICKLED)
