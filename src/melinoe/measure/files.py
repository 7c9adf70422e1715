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

    Raises:
        DataError: the place cannot be written to, or the record holds a number that is not finite.
    """
    line = (_text(record, None) + "\n").encode()
    with _named(Path(path)) as target:
        # O_APPEND keeps lines of two writers apart; a text buffer could cut one into pieces.
        handle = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _write_line(handle, line)
        finally:
            os.close(handle)


def _write_line(handle: int, line: bytes) -> None:
    """Write all of *line*; where the disk takes only a part of it, take that part back."""
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


def training_record(
    model: str, log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Return the record of kind ``training``.

    Args:
        model: Label of the run.
        log: One mapping per logged step, with ``step`` and the losses: ``loss``, ``nll``,
            ``cache``, …; entries without a step (summaries) are left out.
        settings: Those of the run.

    Raises:
        DataError: no step was logged.
    """
    steps = [dict(entry) for entry in log if "step" in entry]
    if not steps:
        raise DataError("the training run logged no step; log at least one")
    return {"kind": "training", "model": model, "log": steps, "settings": dict(settings)}
