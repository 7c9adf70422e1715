"""Write a model as a checkpoint of the hub's layout: all of it, or nothing."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from melinoe.checkpoint.metadata import write_metadata
from melinoe.checkpoint.unfinished import unfinished
from melinoe.errors import OutputExistsError, WriteError
from melinoe.moe.experts import find_experts


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

    Raises:
        OutputExistsError: *out* is taken.
        WriteError: a full disk, or another reason why it cannot be written.
    """
    path = check_output(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(path) as directory:
            yield directory
            os.chmod(directory, 0o755)
            os.replace(directory, path)  # replaces an empty directory, and no other
    except (OSError, SafetensorError) as error:
        raise WriteError(
            f"{path} could not be written ({reason_of(error)}); free some space there, or "
            "choose another place"
        ) from error


def write_model(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    metadata: dict[str, Any],
    also: Callable[[Path], None] | None = None,
) -> None:
    """
    Write weights, config, tokenizer and ``melinoe.json`` to *out*.

    They are written to a directory beside it, which takes the name only when it is whole. The
    weights get the hub's own names, one tensor per expert where the family's checkpoints have
    that, so that other engines read them.

    Args:
        model: A transformers model with all its weights in it.
        tokenizer: Its tokenizer, or None.
        out: The directory to make.
        metadata: For ``melinoe.json``.
        also: Called with the directory, to write more into it.

    Raises:
        OutputExistsError: *out* is taken.
        WriteError: a full disk, or another reason why it cannot be written; nothing is left there.
        AttachError: the experts' weights are in a runtime's store; detach it first.
    """
    check_output(out)
    find_experts(model)
    with whole_directory(out) as directory:
        model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        write_metadata(directory, metadata)
        if also is not None:
            also(directory)
