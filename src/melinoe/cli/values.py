"""Refuse values that no option could use: devices for files, numbers that are none."""

import functools
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# What a shell opens for a command: `<(...)`, and standard input by its name.
_OPENED = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
# Text that a command reads as it stands, and that names no file.
_TEXTS = frozenset({"prompt", "system", "api_key"})
_LARGEST = 2**63 - 1


def checked(command: Callable[..., Any]) -> Callable[..., Any]:
    """Make *command* look at all its values before it runs."""

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        for name, value in values.items():
            for one in _each(value):
                if isinstance(one, int | float):
                    check_number(name, one)
                elif name not in _TEXTS:
                    check_place(one)
        return command(**values)

    return run


def check_number(name: str, value: float) -> None:
    """
    Refuse infinity, what is no number, and integers that need more than 63 bits.

    Raises:
        MelinoeError: *value* is one of those.
    """
    if not math.isfinite(value) if isinstance(value, float) else abs(value) > _LARGEST:
        shown = value if isinstance(value, float) else f"{str(value)[:12]}..."
        raise MelinoeError(f"--{name.replace('_', '-')} cannot be {shown}; give a finite number")


def check_place(place: str | Path) -> None:
    """
    Refuse a pipe, a device or a socket: reading one may never end, and writing replaces it.

    Raises:
        MelinoeError: *place* is one; the sentence says which.
    """
    text = os.fspath(place)
    if text.startswith(_OPENED):
        return
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(text).st_mode))
    except (OSError, ValueError):
        return  # nothing is there, or could be: whoever opens it says so
    if kind is not None:
        raise MelinoeError(f"{text} is {kind}, not a file; give the path of a file or a directory")


def _each(value: Any) -> Iterator[str | Path | int | float]:
    if isinstance(value, str | Path | int | float):
        yield value
    elif isinstance(value, Iterable):
        for one in value:
            yield from _each(one)
