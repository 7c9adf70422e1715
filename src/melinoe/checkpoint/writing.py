"""Write a model as a checkpoint of the hub's layout: all of it, or nothing."""

import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from melinoe.checkpoint.export_rules import other_results
from melinoe.checkpoint.files import read_raw_config
from melinoe.checkpoint.metadata import METADATA, update_metadata, write_metadata
from melinoe.checkpoint.opening import Checkpoint, open_checkpoint
from melinoe.checkpoint.other_files import copy_other_files, other_files
from melinoe.checkpoint.rewriting import rewrite
from melinoe.checkpoint.sums import sums_of
from melinoe.checkpoint.unfinished import unfinished
from melinoe.errors import OutputExistsError, WriteError
from melinoe.moe.experts import find_experts

_log = logging.getLogger("melinoe")


def check_output(out: str | Path) -> Path:
    """
    The directory *out*, if a checkpoint may be written there; ask before hours of work.

    Raises:
        OutputExistsError: it is a file, or a directory that is not empty.
    """
    path = Path(out).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputExistsError(f"{path} exists and is not empty; choose another place for output")
    return path


def check_room(out: str | Path, needed_bytes: int) -> None:
    """
    Refuse a disk that cannot take what will be written; ask before hours of work.

    Raises:
        WriteError: less than *needed_bytes* are free where *out* will be.
    """
    place = Path(out).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise WriteError(
            f"{out} will take {_in_words(needed_bytes)}, but only {_in_words(free)} are free "
            "there; free some space, or choose another place for output"
        )


def _in_words(amount_bytes: int) -> str:
    """In the largest unit of which there is a tenth."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if amount_bytes >= size / 10:
            return f"{amount_bytes / size:,.1f} {unit}"
    return f"{amount_bytes / 2**10:.1f} KiB"


def reason_of(error: BaseException) -> str:
    """An error of the operating system, or of safetensors' writer, in its own few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).strip()


@contextmanager
def whole_directory(out: str | Path) -> Iterator[Path]:
    """
    A directory to fill, which takes the name *out* when the block ends, and is gone if it fails.

    Its ``melinoe.json``, if it gets one, is given the sums of all other files, which costs one
    more reading of them.

    Raises:
        OutputExistsError: *out* is taken.
        WriteError: a full disk, or another reason why it cannot be written.
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


def write_model(
    model: Any,
    base: str,
    out: str | Path,
    metadata: dict[str, Any],
    changed: Collection[str],
    also: Callable[[Path], None] | None = None,
) -> None:
    """
    Write a changed model to *out*: its base's own files, in which what changed is overwritten.

    They are written to a directory beside it, which takes the name only when it is whole. Weights
    keep the base's names, shards and types, and config, tokenizer and all else its bytes; its
    card becomes ``BASE_README.md``. Left out, with a warning, are weights in other files than
    those that were read, and directories.

    Args:
        model: From `load_model`, then changed; with all its weights in it.
        base: What it was loaded from: a directory, or a name on the hub.
        out: The directory to make.
        metadata: For ``melinoe.json``.
        changed: Full names of the model's tensors that may have changed.
        also: Called with the directory, to write more into it.

    Raises:
        OutputExistsError: *out* is taken.
        CheckpointError: the base can no longer be opened.
        WriteError: a full disk, or another reason why it cannot be written; nothing is left there.
        UnsupportedModelError: as `check_rewritable`.
        AttachError: the experts' weights are in a runtime's store; detach it first.
    """
    check_output(out)
    find_experts(model)
    with open_checkpoint(base) as checkpoint, whole_directory(out) as directory:
        rewrite(model, checkpoint, changed, directory)
        copy_other_files(checkpoint, directory)
        _warn_of_other_engines(directory, out)
        write_metadata(directory, metadata)
        if also is not None:
            also(directory)


def _warn_of_other_engines(directory: Path, out: str | Path) -> None:
    """Say in one line who would compute something else, without a word, from what was written."""
    found = other_results(read_raw_config(str(directory))[1])
    for engines in dict.fromkeys(one.engines for one in found):
        settings = " and ".join(one.what for one in found if one.engines == engines)
        _log.warning(
            "%s: %s compute something else from it (%s); see `melinoe doctor %s --export`",
            out, engines, settings, out,
        )  # fmt: skip


def bytes_of(checkpoint: Checkpoint) -> int:
    """Add up the bytes of the base's files that `write_model` copies."""
    shards = {place.file.path for place in checkpoint.files.values()}
    others, _ = other_files(checkpoint)
    return sum(path.stat().st_size for path in (*shards, *others))
