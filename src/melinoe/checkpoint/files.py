"""Find a checkpoint's files, in a directory or on the hub, and check them before any read."""

import json
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from melinoe.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from melinoe.errors import CheckpointError, UnsupportedModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Place(NamedTuple):
    """One stored tensor: the file that holds it, its name there, its header entry."""

    file: SafetensorsFile
    name: str
    info: TensorInfo


def locate(name: str, filename: str, download: bool = True) -> Path | None:
    """
    One file of a checkpoint, or None where the checkpoint has no such file.

    Args:
        name: A directory, or the name of a repository on the hub.
        filename: The file's name inside it.
        download: Fetch a hub file that is not in the local cache; without it such a file counts
            as absent.

    Raises:
        CheckpointError: the directory or the repository cannot be reached.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        path = directory / filename
        return path if path.is_file() else None
    if directory.exists():
        raise CheckpointError(f"{name} is a file; give the directory that holds the checkpoint")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"the directory {name} does not exist; check the path")
    try:
        found = cached_file(
            name,
            filename,
            local_files_only=not download,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=download,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no directory here, and the hub did not give {filename} "
            f"({first_line(error)}); check the name, or download it where there is a network"
        ) from None
    return None if found is None else Path(found)


def read_raw_config(name: str, download: bool = True) -> tuple[Path, dict]:
    """
    Path and contents of ``config.json``.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    path = locate(name, "config.json", download)
    if path is None and Path(name).expanduser().is_dir():
        raise CheckpointError(f"{name} has no config.json; give a whole checkpoint's directory")
    if path is None:
        raise CheckpointError(
            f"{name} is no directory here, and there is no such model in the local cache or on the "
            "hub as far as it can be reached; check the name, or download it where there is a "
            "network"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download it again") from None
    return path, raw


def read_config(name: str, download: bool = True) -> PreTrainedConfig:
    """
    The model's config, refused if its weights are quantised. Code from the hub is never run.

    Raises:
        CheckpointError: no readable ``config.json``, or a quantised checkpoint.
        UnsupportedModelError: transformers does not know the family.
    """
    path, raw = read_raw_config(name, download)
    kind = quantisation(raw)
    if kind is not None:
        raise CheckpointError(
            f"{name} is quantised ({kind}), which is not supported; use its bf16 or fp16 checkpoint"
        )
    family = raw.get("model_type")
    if not family:
        raise CheckpointError(f"{path} names no model_type; give a transformers model's config")
    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers cannot read the config of family {family!r} ({first_line(error)}); "
            "use a family that transformers itself implements"
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")


def quantisation(config: dict) -> str | None:
    """The kind of quantisation that a raw config (or its text part) declares, or None."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            settings = part["quantization_config"]
            found = settings.get("quant_method") if isinstance(settings, dict) else None
            return str(found or "of an unnamed kind")
    return None


def open_shards(name: str, download: bool = True) -> dict[str, Place]:
    """
    Open every shard, check its header, and say where each stored tensor lies.

    Args:
        name: A directory, or the name of a repository on the hub.
        download: Fetch hub files that are not in the local cache.

    Returns:
        Stored name -> `Place`. Close the files with `close_shards`.

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
        raise CheckpointError(f"{name} has no {SINGLE} and no {INDEX}; download its weights")
    return _open_index(name, index, download)


def _open_index(name: str, index: Path, download: bool) -> dict[str, Place]:
    """The tensors of a sharded checkpoint, each checked against the header of its shard."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        filenames = sorted(set(weight_map.values()))
        if not filenames or any(Path(f).name != f for f in filenames):
            raise ValueError("its weight_map names no shard beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the index {index} is not readable ({error}); download it again"
        ) from None
    files: dict[str, SafetensorsFile] = {}
    try:
        for filename in filenames:
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


def has_weights(name: str, download: bool = True) -> bool:
    """Whether a checkpoint has weight files of any kind, pickled ones included."""
    return any(locate(name, filename, download) for filename in (SINGLE, INDEX, *PICKLED))
