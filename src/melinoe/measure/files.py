"""Records to files: appended a line at a time, or written whole; never half a record."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melinoe.errors import DataError
from melinoe.whole_file import write_whole


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """
    Append one record as one line, whole or not at all; the file and its folder are made.

    Raises:
        DataError: the place cannot be written to, or the record holds a number that is not finite.
    """
    line = (_text(record, None) + "\n").encode()
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # O_APPEND keeps lines of two writers apart; a text buffer could cut one into pieces.
        handle = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _write_line(handle, line)
        finally:
            os.close(handle)
    except OSError as error:
        raise DataError(
            f"cannot write to {target} ({error.strerror}); choose another place"
        ) from None


def _write_line(handle: int, line: bytes) -> None:
    """Write all of *line*; where the disk holds a part of it alone, take that part back."""
    written = os.write(handle, line)
    try:
        while written < len(line):
            written += os.write(handle, line[written:])
    except OSError:
        os.ftruncate(handle, os.fstat(handle).st_size - written)
        raise


def write_json(path: str | Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """
    Write *value* as JSON: the file appears whole or not at all, in place of an earlier one.

    Raises:
        DataError: as `append_jsonl`.
    """
    text = _text(value, 1) + "\n"
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text)
    except OSError as error:
        raise DataError(
            f"cannot write to {target} ({error.strerror}); choose another place"
        ) from None


def _text(value: Any, indent: int | None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        raise DataError(
            "a record holds a number that is not finite; look for what went wrong before it"
        ) from None
