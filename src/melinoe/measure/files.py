"""Write records to files: appended a line at a time, or whole; never half a record."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from melinoe.errors import DataError
from melinoe.whole_file import write_whole


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """
    Append one record as one line, whole or not at all; the file and its folder are made.

    DataError: the place cannot be written to, or the record holds a number that is not finite.
    """
    line = (_text(record, None) + "\n").encode()
    with _named(Path(path)) as target:
        # O_APPEND keeps lines of two writers apart; a text buffer could cut one into pieces.
        handle = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        written = 0
        try:
            while written < len(line):
                written += os.write(handle, line[written:])
        except OSError:  # the disk took only a part of the line: take that part back
            os.ftruncate(handle, os.fstat(handle).st_size - written)
            raise
        finally:
            os.close(handle)


def write_json(path: str | Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write *value* as JSON: the file appears whole or not at all, in place of an earlier one."""
    text = _text(value, 1) + "\n"
    with _named(Path(path)) as target:
        write_whole(target, text)


@contextmanager
def _named(target: Path) -> Iterator[Path]:
    """Make the target's folder, and name the target where it cannot be written to."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield target
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
