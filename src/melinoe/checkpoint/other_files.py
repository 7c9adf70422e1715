"""Everything in a checkpoint that is no weight: found, and copied as it is."""

import logging
from pathlib import Path
from shutil import copyfile

from huggingface_hub import snapshot_download

from melinoe.checkpoint.files import INDEX, SINGLE
from melinoe.checkpoint.hub import first_line, is_directory, locate, split_revision
from melinoe.checkpoint.opening import Checkpoint

BASE_CARD = "BASE_README.md"

_log = logging.getLogger("melinoe")
_CARD = "README.md"
# Weights in any format; what an index tells is of weights too.
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".ot", ".nemo", ".index.json",
)  # fmt: skip


def other_files(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """
    The files beside a checkpoint's weights, fetched from the hub where it is one of its names.

    Returns:
        Files to copy, the index that was read among them; names of what is left out: weights
        that were not read, directories, ``adapter_config.json``.
    """
    directory = _fetched(checkpoint.source)
    read = {place.file.path.name for place in checkpoint.files.values()}
    index = INDEX if SINGLE not in read else None
    files, left = [], []
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name == index:
            files.append(path)
        elif path.name in read or path.name.startswith((".", "melinoe")):
            continue  # copied with the weights; of the hub's own tools; a run's record and figures
        elif path.is_dir() or path.name.endswith(_WEIGHTS) or path.name == "adapter_config.json":
            left.append(path.name)
        else:
            files.append(path)
    return files, left


def copy_other_files(checkpoint: Checkpoint, directory: Path) -> None:
    """
    Copy what `other_files` gives; the base's card becomes `BASE_CARD`, for ours takes its place.

    Raises:
        OSError: a full disk.
    """
    files, left = other_files(checkpoint)
    for path in files:
        copyfile(path, directory / (BASE_CARD if path.name == _CARD else path.name))
    if left:
        _log.warning(
            "%s: left out of the copy, as no part of what was read: %s",
            checkpoint.name, ", ".join(left),
        )  # fmt: skip


def _fetched(source: str) -> Path:
    """The directory of all files of *source* that are here or can be had, weights aside."""
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
    return config.parent
