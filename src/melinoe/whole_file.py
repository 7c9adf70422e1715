"""Write a file so that a reader sees the old one or the new, never a part."""

import errno
import os
import secrets
from pathlib import Path
from shutil import copymode


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """
    Write a file beside its place and rename it; nothing is left behind if that fails.

    The file has the mode of the one that it replaces, else what the umask gives.

    Args:
        path: In a directory that exists.
        content: Text is written as UTF-8.

    Raises:
        OSError: the place cannot be written to, or is a device or a pipe, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file, so it is not replaced by one", str(path))
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        # Not a file of tempfile's, which no one but its owner may read.
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
