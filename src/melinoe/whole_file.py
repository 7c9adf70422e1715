"""Write files and directories that nobody sees before they are whole; read JSON of any origin."""

import errno
import json
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which cannot lock a directory
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".unfinished"


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """
    Read JSON, UTF-8 with or without a byte-order mark; *hooks* as of `json.loads`.

    Raises:
        ValueError: it is none, is nested deeper than Python reads, or has a whole number that no
            float holds.
    """
    if isinstance(text, bytes):
        text = text.decode()
    try:
        return json.loads(text.removeprefix("\ufeff"), parse_int=_whole, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _whole(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """
    Write a file beside its place and rename it; nothing is left behind if that fails.

    It has the mode of the file that it replaces, else what the umask gives; text is UTF-8. OSError
    where the place cannot be written to, or is a device or a pipe.
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
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """
    A directory beside *path* to work in, deleted when the block ends unless it has been renamed.

    An exception, Ctrl-C and SIGTERM delete it; what a process that was killed has left for the same
    *path* is deleted first. A directory that a living process of this machine works in is kept;
    where directories cannot be locked, every one is.
    """
    remove_unfinished(path)
    made = path.parent / f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}"
    made.mkdir()  # not tempfile's, which no one but the owner may read
    handle = None if fcntl is None else os.open(made, os.O_RDONLY)
    try:
        with _ending_on_sigterm():
            if handle is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                yield made
            finally:
                shutil.rmtree(made, ignore_errors=True)
    finally:
        if handle is not None:
            os.close(handle)


def remove_unfinished(path: Path) -> None:
    """Delete what processes that were killed have left beside *path* for it."""
    if not path.parent.is_dir():
        return
    name = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}" + re.escape(_SUFFIX))
    for one in path.parent.iterdir():
        if name.fullmatch(one.name) and one.is_dir() and not _is_in_use(one):
            shutil.rmtree(one, ignore_errors=True)


def _is_in_use(directory: Path) -> bool:
    """Tell whether a process holds the lock; the system takes it from one that ends in any way."""
    if fcntl is None:
        return True
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Within it, SIGTERM ends the process as an exit does, unless somebody listens already."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: what follows is the clearing up
    sys.exit(128 + number)
