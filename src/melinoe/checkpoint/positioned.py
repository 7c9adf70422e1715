"""Read a file at an offset: by one system call where there is one, else under a lock."""

import os
import threading

# Windows opens files as text unless told otherwise.
BINARY = os.O_RDONLY | getattr(os, "O_BINARY", 0)

_ONCE_BYTES = 1 << 24
_lock = threading.Lock()


def read_at(handle: int, into: memoryview, offset: int) -> int:
    """
    Read into *into* from *offset* on, whatever other threads read from the same file.

    Args:
        handle: A file that is open for reading.
        into: Bytes that can be written to.
        offset: The first byte to read.

    Returns:
        How many bytes were read, at most ``len(into)`` and often fewer; 0 at the file's end.

    Raises:
        OSError: the disk fails.
    """
    if hasattr(os, "preadv"):
        return os.preadv(handle, [into], offset)
    with _lock:  # Windows and macOS: the position belongs to the open file, so one at a time
        os.lseek(handle, offset, os.SEEK_SET)
        got = os.read(handle, min(len(into), _ONCE_BYTES))
    into[: len(got)] = got
    return len(got)
