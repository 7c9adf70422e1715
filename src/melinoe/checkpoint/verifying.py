"""Record the SHA-256 of a checkpoint's files, and compare the files with it later."""

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from melinoe.checkpoint.backbone import load_backbone
from melinoe.checkpoint.files import locate, pinned, read_raw_config
from melinoe.checkpoint.metadata import read_metadata
from melinoe.checkpoint.opening import open_checkpoint
from melinoe.errors import CheckpointError

# A large file in the hub's cache is named by the SHA-256 of its bytes.
_NAMED_BY_SUM = re.compile(r"[0-9a-f]{64}")
# Written anew once a checkpoint is there: its own record, and its card.
CHANGING = ("melinoe.json", "README.md")


def sum_of(path: Path) -> dict[str, Any]:
    """Compute the size and SHA-256 of a file. Cost: all of it is read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def sums_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Compute by name the sums of all files in a directory, but for its own record."""
    return {
        path.relative_to(directory).as_posix(): sum_of(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in CHANGING
    }


class Verified(NamedTuple):
    """Count the files of a checkpoint that were read and compared."""

    recorded: int  # with the sums in its ``melinoe.json``
    named: int  # with the sums by which the hub's cache names them
    unknown: int  # shards of which nobody has recorded a sum: read, no more
    fingerprint: bool  # whether its routers were compared with ``melinoe.json``


def verify(name: str) -> Verified:
    """
    Read all of a checkpoint, and compare it byte by byte with what is recorded of it. The weights
    beside the experts are in memory for a while. CheckpointError names every file that is missing,
    not what was recorded, or not readable.
    """
    source = pinned(name, read_raw_config(name)[0])
    metadata = read_metadata(source)
    recorded = metadata.get("files") or {}
    with open_checkpoint(name) as checkpoint:  # what is torn is said before the long reading
        files = [(file, locate(source, file), wanted) for file, wanted in recorded.items()]
        named = unknown = 0
        for path in checkpoint.stamps:
            if path.name not in recorded:
                blob = path.resolve().name
                known = _NAMED_BY_SUM.fullmatch(blob) is not None
                files.append((path.name, path, {"sha256": blob} if known else {}))
                named, unknown = named + known, unknown + (not known)
        problems = [
            f"{file} {problem}"
            for file, path, wanted in files
            if (problem := _problem(path, wanted)) is not None
        ]
        if problems:
            raise CheckpointError(
                f"{name} is not what was written: {'; '.join(problems)}; write or download it again"
            )
        load_backbone(checkpoint)  # compares the fingerprint
    return Verified(len(recorded), named, unknown, "fingerprint" in metadata)


def _problem(path: Path | None, wanted: dict[str, Any]) -> str | None:
    if path is None:
        return "is missing"
    try:
        found = sum_of(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if wanted.items() <= found.items():
        return None
    if wanted.get("bytes", found["bytes"]) != found["bytes"]:
        return f"has {found['bytes']} bytes instead of {wanted['bytes']}"
    return "has other contents"
