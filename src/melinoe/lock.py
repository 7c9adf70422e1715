"""One writer at a time: a lock beside a file or directory, which ends with its process."""

import functools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from melinoe.errors import OutputExistsError, WriteError


@contextmanager
def held(path: str | Path) -> Iterator[None]:
    """
    Hold the lock of *path*, ``.<name>.lock`` beside it, which is removed at the end.

    The system takes it from a process that ends in any way. The directory that *path* will be in is
    made. OutputExistsError: another process, which is named, holds it; WriteError: nothing can be
    written there.
    """
    from filelock import FileLock, Timeout  # here: it would slow every --help

    path = Path(path).expanduser().absolute()
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        who = ""
        with suppress(OSError):
            who = f" ({file.read_text(encoding='utf-8').strip()})"
        raise OutputExistsError(
            f"another run{who} is writing to {path}; wait for it, or choose another place"
        ) from None
    except OSError as error:
        raise WriteError(
            f"nothing can be written to {path.parent} ({error.strerror}); choose another place"
        ) from error
    try:
        with suppress(OSError):  # a word for others, no more; Windows lets no one write there now
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()


def holding(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a command hold, while it runs, the lock of what its argument *name* says it writes."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(*arguments: Any, **named: Any) -> Any:
            path = named.get(name)
            if path is None or os.environ.get("RANK", "0") != "0":
                return command(*arguments, **named)
            with held(path):
                return command(*arguments, **named)

        return run

    return decorate
