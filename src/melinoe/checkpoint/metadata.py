"""``melinoe.json``: what is known about a checkpoint beyond its weights."""

import json
from pathlib import Path
from typing import Any

from melinoe.checkpoint.hub import locate
from melinoe.checkpoint.metadata_schema import SCHEMA_VERSION, VERSION_FIELD, check_metadata
from melinoe.errors import CheckpointError
from melinoe.whole_file import write_whole

METADATA = "melinoe.json"


def read_metadata(name: str | Path) -> dict[str, Any]:
    """
    The checked contents of a checkpoint's ``melinoe.json``; empty where it has none.

    The file's own ``schema_version`` is checked and left out; a file without one is read as the
    first version. Fields that this release does not know are kept as they are.

    Args:
        name: A directory, or the name of a repository on the hub.

    Raises:
        CheckpointError: not a JSON object, a field that is not what it should be, or a file that
            a newer release wrote.
    """
    path = locate(str(name), METADATA)
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        json.dumps(found, ensure_ascii=False).encode()  # half a character could not be written
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable ({error}); delete it, or write the checkpoint again"
        ) from None
    version = found.pop(VERSION_FIELD, 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{path} has the {VERSION_FIELD} {version!r}, which is no version; delete the file, or "
            "write the checkpoint again"
        )
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has {VERSION_FIELD} {version} and this release reads up to {SCHEMA_VERSION}; "
            "update melinoe"
        )
    if problem := check_metadata(found):
        raise CheckpointError(
            f"{path} is malformed: {problem}; delete it, or write the checkpoint again"
        )
    return found


def update_metadata(directory: str | Path, **fields: Any) -> dict[str, Any]:
    """
    Set *fields* of a checkpoint's ``melinoe.json``, and return all of it.

    Raises:
        CheckpointError: as `read_metadata`.
        ValueError: a field that is not what it should be; nothing is written.
    """
    metadata = {**read_metadata(directory), **fields}
    if problem := check_metadata(metadata):
        raise ValueError(f"melinoe.json cannot hold this: {problem}")
    write_metadata(directory, metadata)
    return metadata


def write_metadata(directory: str | Path, metadata: dict[str, Any]) -> None:
    """
    Write ``melinoe.json`` into an existing directory; a reader sees the old or the new, whole.

    Args:
        directory: The checkpoint's directory.
        metadata: What JSON can hold, without NaN: origin, settings, measured locality. The
            file's ``schema_version`` is added.
    """
    stamped = {VERSION_FIELD: SCHEMA_VERSION, **metadata}
    text = json.dumps(stamped, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(Path(directory) / METADATA, text)
