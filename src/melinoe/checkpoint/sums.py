"""SHA-256 of files, as a checkpoint's own records hold it."""

import hashlib
from pathlib import Path
from typing import Any

# Written anew once a checkpoint is there: its own record, and its card.
CHANGING = ("melinoe.json", "README.md")


def sum_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as JSON holds them. Cost: all of it is read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def sums_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Sums by name of all files in a directory that was written just now, but its own record."""
    return {
        path.relative_to(directory).as_posix(): sum_of(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in CHANGING
    }
