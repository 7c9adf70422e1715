"""
Rows of files and hub data sets, each with the place where it stands.

    .jsonl .json   one object a line, or one list of objects; both also as .gz
    .csv           a header line; every cell is text, an empty one is absent; also as .gz
    .parquet       one row a row

A file of another name is read as JSON lines. A byte-order mark, either kind of line end and blank
lines at the end are all the same. What cannot be read is refused by file and line.
"""

import csv
import gzip
import logging
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from melinoe.errors import DataError
from melinoe.whole_file import parse_json

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# What `datasets` writes beside the data.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

Rows = Iterator[tuple[str, Any]]


def read_rows(path_or_hub_name: str | Path, split: str = "train") -> Rows:
    """
    Read the rows of a file, of a directory's files by name, or of a hub data set.

    *path_or_hub_name* is a path if one exists there; else a name on the hub, with its configuration
    after a colon: ``openai/gsm8k:main``; *split* is of the hub's. Yields ``file:line``,
    ``file[row]`` or ``hub-name[row]``, and what stands there. DataError where something cannot be
    read.
    """
    path = Path(path_or_hub_name)
    try:
        there = path.exists()
    except OSError as error:  # a name too long, a directory that may not be looked into
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if there:
        for file in data_files(path):
            yield from _read_file(file)
    elif _suffix(path) in SUFFIXES:
        raise DataError(f"{path} does not exist; check the path")
    else:
        yield from _read_hub(str(path_or_hub_name), split)


def data_files(path: str | Path) -> list[Path]:
    """List the data files that *path* names: itself, or what a directory holds, by name."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} is neither a file nor a directory; name one")
    try:
        there = sorted(one for one in path.iterdir() if not one.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None
    files = [x for x in there if x.is_file() and _suffix(x) in SUFFIXES and x.name not in _ABOUT]
    if not files:
        raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file; name one that does")
    if rest := [one.name for one in there if one not in files]:
        say_once(f"not read in {path}: {', '.join(rest)}")
    return files


@cache
def say_once(text: str) -> None:
    """Log a warning that reading the same data again would repeat."""
    log.warning("%s", text)


def named_counts(counts: Mapping[str, int]) -> str:
    """Write counts by name, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return ", ".join(f"{name} (in {count})" for name, count in ordered)


def _suffix(path: Path) -> str:
    """Give the ending that names a file's format: of ``rows.jsonl.gz`` it is ``.jsonl``."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read_file(path: Path) -> Rows:
    kind = _suffix(path)
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    read, newline = (_read_csv, "") if kind == ".csv" else (_read_json, None)
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        # Bytes that are no UTF-8 come through, and are found line by line.
        given: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
        with opened(path, "rt", newline=newline, **given) as file:
            yield from read(path, file)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}); check the file") from None


def _read_json(path: Path, file: TextIO) -> Rows:
    blank, begun = 0, False
    for number, line in enumerate(file, start=1):
        if not line.strip():
            blank = blank or number
            continue
        if not begun and line.lstrip().startswith("["):
            text = line + file.read()
            rows = _parse(text, str(path), "write one list of objects, or one object per line")
            for index, row in enumerate(rows):
                yield f"{path}[{index}]", row
            return
        begun = True
        if blank:
            raise DataError(f"{path}:{blank} is empty; remove the line")
        comma = " and no comma after it" if line.rstrip().endswith("},") else ""
        source = f"{path}:{number}"
        yield source, _parse(line, source, f"write one object per line{comma}")


def _parse(text: str, source: str, way_out: str) -> Any:
    _check_utf8(text, source)
    try:
        return parse_json(text, object_pairs_hook=_object)
    except ValueError as error:
        raise DataError(f"{source} is not JSON ({_first_line(error)}); {way_out}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"one of the keys {', '.join(found)} stands twice in one object")
    return found


def _read_csv(path: Path, file: TextIO) -> Rows:
    csv.field_size_limit(2**31 - 1)  # of the whole module, which stops at 128 KiB a cell otherwise
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1 names a column twice; give each a name of its own")
        for cells in reader:
            source = f"{path}:{reader.line_num}"
            _check_utf8("".join(cells), source)
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{source} has {len(cells)} cells and the header {len(header)}; write as many, "
                    "and quotes around text that holds commas"
                )
            if cells:
                yield source, {key: cell or None for key, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num} is not CSV ({error}); mend the line") from None


def _check_utf8(text: str, source: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        raise DataError(f"{source} is not UTF-8 text (byte 0x{byte:02x}); convert it") from None


def _read_parquet(path: Path) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}[{number}]", row
                    number += 1
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path}[{number}] cannot be read ({_first_line(error)}); check the file"
        ) from error


def _read_hub(name: str, split: str) -> Rows:
    # Slow to import, and needed for hub names only.
    from datasets import load_dataset

    dataset_name, _, configuration = name.partition(":")
    number = -1
    try:
        dataset = load_dataset(dataset_name, configuration or None, split=split)
        for number, row in enumerate(dataset):
            yield f"{name}[{number}]", row
    except Exception as error:  # the library raises many kinds, for one fact: it is not to be had
        reason = _first_line(error)
        if number >= 0:
            raise DataError(f"{name}[{number + 1}] cannot be read ({reason})") from error
        raise DataError(
            f"no file and no hub data set {name} with split {split} can be read ({reason}); "
            "check the name, or give a file"
        ) from error
