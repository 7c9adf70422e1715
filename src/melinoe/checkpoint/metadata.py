"""``melinoe.json``: what is known about a checkpoint beyond its weights."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from melinoe.checkpoint.files import locate
from melinoe.errors import CheckpointError

METADATA = "melinoe.json"


def read_metadata(name: str | Path) -> dict[str, Any]:
    """
    The contents of a checkpoint's ``melinoe.json``; empty where it has none.

    Args:
        name: A directory, or the name of a repository on the hub.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    path = locate(str(name), METADATA)
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not readable ({error}); delete it, or write the checkpoint again"
        ) from None
    return found


def write_metadata(directory: str | Path, metadata: dict[str, Any]) -> None:
    """
    Write ``melinoe.json`` into an existing directory; a reader sees the old or the new, whole.

    Args:
        directory: The checkpoint's directory.
        metadata: What JSON can hold, without NaN: origin, settings, measured locality.
    """
    text = json.dumps(metadata, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(prefix=f".{METADATA}.", dir=directory)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, Path(directory) / METADATA)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
