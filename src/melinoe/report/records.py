"""
Read measurement records: JSON objects from files or from memory, checked before they are used.

A `.jsonl` file holds one record a line, a `.json` file one record or a list of them. A record is
a plain dict with a ``kind``; a benchmark's result has ``benchmark`` instead. Every mean is an
estimate ``{"mean", "low", "high", "n"}``: *low* and *high* are its 95 % interval over *n* items.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from melinoe.errors import DataError
from melinoe.report.schema import Record, check


@dataclass
class Measurements:
    """Checked records by kind, in the order read, and what a reader should know about them."""

    by_kind: dict[str, list[Record]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Record]:
        """Give the records of one *kind*; an empty list where none was read."""
        return self.by_kind.get(kind, [])

    def first(self, kind: str) -> Record | None:
        """Give the first record of one *kind*, or ``None``."""
        return next(iter(self.of(kind)), None)


Source = Record | Path | str
Sources = Measurements | Iterable[Source] | Source


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        message = f"{where}: not JSON ({error}); measure again, or take this record out"
        raise DataError(message) from error


def _from_file(path: Path) -> Iterable[tuple[Any, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); name a file of records") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; name a file of JSON records") from error
    if path.suffix == ".jsonl":
        # Not splitlines: strings may hold Unicode's own line ends, which JSON leaves as they are.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _parse(line, where), where
    elif path.suffix == ".json":
        whole = _parse(text, str(path))
        if isinstance(whole, list):
            for index, item in enumerate(whole, start=1):
                yield item, f"{path}, record {index}"
        else:
            yield whole, str(path)
    else:
        raise DataError(f"{path} is neither .jsonl nor .json; name a file of records")


def _files(source: Path) -> list[Path]:
    """Give the file itself, or a directory's record files in the order of their names."""
    if not source.is_dir():
        return [source]
    found = sorted(path for path in source.iterdir() if path.suffix in (".json", ".jsonl"))
    if not found:
        raise DataError(f"{source} has no .json or .jsonl file; name where records are")
    return found


def read_records(sources: Sources) -> Measurements:
    """
    Read and check records.

    Args:
        sources: Records, paths of `.jsonl` and `.json` files or of directories of them, or both;
            a single one may stand alone. What this function gave passes through.

    Returns:
        The records by kind. Kinds that a report does not show are left out, with a note.

    Raises:
        DataError: a file cannot be read, holds no record at all, or holds a malformed one; the
            message names file and line.
    """
    if isinstance(sources, Measurements):
        return sources
    if isinstance(sources, str | Path | Mapping):
        sources = [sources]
    found = Measurements()
    unknown: dict[str, int] = {}
    for number, source in enumerate(sources, start=1):
        if isinstance(source, str | Path):
            items = [item for path in _files(Path(source)) for item in _from_file(path)]
            if not items:
                raise DataError(f"{source} holds no record; run the measurement that writes it")
        else:
            items = [(source, f"record {number}")]
        for record, where in items:
            kind = check(record, where)
            if kind is None:
                unknown[record["kind"]] = unknown.get(record["kind"], 0) + 1
            else:
                found.by_kind.setdefault(kind, []).append(record)
    for kind, count in unknown.items():
        plural = "records" if count > 1 else "record"
        found.notes.append(f"{count} {plural} of unknown kind {kind!r} ignored.")
    if not found.by_kind and not unknown:
        raise DataError("there are no records to report; run a measurement first")
    return found
